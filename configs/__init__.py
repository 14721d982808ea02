"""Embedded YAML: models, mixes, experiments and suites, read with `importlib.resources`."""
