"""Many trainings on one machine."""
