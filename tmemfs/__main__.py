"""`python -m tmemfs`."""

import sys

from tmemfs.cli import main

sys.exit(main())
