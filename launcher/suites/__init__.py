"""Trains the many runs of a suite on one machine."""
