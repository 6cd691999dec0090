"""How many examples a state machine tries: TMEMFS_EXAMPLES times as many as usual, for a longer search than each run can afford."""

from __future__ import annotations

import os
from typing import Final

FACTOR: Final = int(os.environ.get("TMEMFS_EXAMPLES", "1"))
