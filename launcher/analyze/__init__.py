"""Analyses the routing of existing checkpoints on labelled text: models of the Hugging Face hub's format, and our
runs."""
