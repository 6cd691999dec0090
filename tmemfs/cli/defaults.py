"""Where things are unless an option says otherwise."""

from pathlib import Path
from typing import Final

MOUNTPOINT: Final = Path("/run/tmemfs")
BACKING: Final = Path("/var/lib/tmemfs/backing")
LOG: Final = Path("/var/log/tmemfs.log")
