"""Suites as SLURM job arrays."""
