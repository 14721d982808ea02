"""Checkpoints: saved whole, restored, and regrouped for another number of ranks."""
