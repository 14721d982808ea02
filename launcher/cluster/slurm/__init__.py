"""Trains suites as SLURM job arrays."""
