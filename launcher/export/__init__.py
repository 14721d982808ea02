"""Writes a run's model as a folder of the Hugging Face hub's format, and reads such a folder back."""
