"""`python -m moe_testbed.launcher` does the same as the `moe-testbed` command."""

import sys

from moe_testbed.launcher.cli.main import main

sys.exit(main())
