"""The former name of `launcher.analyze`, for scripts that were written before it was renamed."""
