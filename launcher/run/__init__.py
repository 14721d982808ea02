"""The folders of runs and suites, and what is written there about the machine that made them."""
