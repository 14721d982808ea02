"""Suites compared with one another."""
