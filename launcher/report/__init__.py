"""The report of a suite and the comparison of suites: `write` makes them, of what the other folders here offer."""
