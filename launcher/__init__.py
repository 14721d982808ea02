"""What a user runs: configuration, training, comparison of runs, reports and the command line."""
