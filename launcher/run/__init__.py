"""The folder of a run, and what is written there of the machine that made it."""
