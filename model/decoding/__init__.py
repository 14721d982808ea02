"""Writes text with a language model."""
