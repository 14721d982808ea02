"""MLflow as a mirror of the runs' folders."""
