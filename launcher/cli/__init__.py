"""The `moe-testbed` command: arguments only; the work is done by what the commands call."""
