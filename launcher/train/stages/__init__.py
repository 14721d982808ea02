"""Trainings in stages: what one starts from, which of its parts are still, and what both have taken together."""
