"""One training on the hosts of a cluster, started by one deepspeed command."""
