"""The properties that every router promises: each a function of a trial that says what it found or raises Violation."""
