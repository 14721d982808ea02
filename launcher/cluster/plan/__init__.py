"""How a training would lie on a cluster, in ranks, bytes and links; nothing is started."""
