"""Asks what an encoder has learned: linear layers on its states, fine-tuning, and what both would find without it."""
