"""Reads the folders of runs and suites for a report, leniently."""
