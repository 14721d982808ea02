make typecheck 2>&1 | tail -30
