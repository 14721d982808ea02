"""Probing tasks: labelled texts with which one asks what an encoder has learned."""
