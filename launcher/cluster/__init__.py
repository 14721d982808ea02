"""Many GPUs of many nodes: what a cluster is, how a training lies on it, and how it is started there."""
