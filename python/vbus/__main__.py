"""`python -m vbus` is the command `vbus`."""

import sys

from vbus.cli import main

sys.exit(main())
