"""Mirrors the folders of runs and suites to MLflow."""
