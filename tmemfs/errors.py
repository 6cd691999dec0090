"""The errors tmemfs raises. Each message says what is wrong and what to do next; errno exists only at the edges.

TmemfsError
  BadValue      the caller wrote something that is not a value of this kind          (EINVAL, exit code 2)
  OutOfRange    a value of the right kind that cannot be honoured                     (ERANGE, exit code 2)
  Busy          right now something else stands in the way                            (EBUSY,  exit code 2)
  Refused       the environment lacks what is needed: rights, device, directory       (exit code 2)
  NoAnswer      a mount does not answer in time                                       (exit code 2)
  NoSpace       no tier can take the page: it stays where it was                      (ENOSPC)
  FellShort     a shrink freed less than it was asked for                             (EAGAIN, exit code 1)
  TierError     a tier failed to read or write                                        (EIO)
  Corrupt       what a tier returned is not what was written there                    (EIO)
  BackingFull   a tier has no space for a write                                       (state says so; the store waits)
"""

from __future__ import annotations

from typing import Final

#: Says why a thread could not be started: with that error.
NO_THREADS: Final = "not enough threads can be created ({}): raise pids.max or RLIMIT_NPROC"


class TmemfsError(Exception):
    """Something a user can act on; the message names the next step."""


class BadValue(TmemfsError, ValueError):
    """Not a value of this kind."""


class OutOfRange(TmemfsError, ValueError):
    """A value of the right kind, out of the range that can be honoured."""


class Busy(TmemfsError):
    """Something else stands in the way at the moment."""


class Refused(TmemfsError):
    """The environment lacks something: rights, a device, a directory."""


class NoAnswer(Refused):
    """A mount does not answer in time."""


class NoSpace(TmemfsError):
    """No tier can take the page."""


class FellShort(TmemfsError):
    """A shrink freed less than it was asked for; the message says why."""


class TierError(TmemfsError):
    """A tier failed to read or write."""


class BackingFull(TierError):
    """A tier has no space for a write."""


class Corrupt(TierError):
    """A tier returned other bytes than were written to it."""
