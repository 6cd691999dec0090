"""Bugs: errors that tmemfs does not know, logged once per place in the code.

A bug on the page path may come with every request, and any user may ask for a control file that has one. One line per place keeps
the log readable, and nobody fills it by asking again.

Thread-safety: `note` from any thread. Two threads that meet the same bug first at the same time may both log it.
"""

from __future__ import annotations

import logging
import traceback
from contextlib import suppress

log = logging.getLogger(__name__)


class Bugs:
    """The places whose bugs were logged."""

    def __init__(self) -> None:
        self._places: set[str] = set()

    def note(self, error: Exception) -> None:
        """Log `error`, unless an error of the same place was logged before. Never raises."""
        with suppress(Exception):  # the request is answered also where there is no memory for a line in the log
            place = repr(traceback.extract_tb(error.__traceback__)[-1:])
            if place not in self._places:
                self._places.add(place)
                log.error("bug in tmemfs, please report it", exc_info=error)
