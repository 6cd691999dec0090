"""The signals of the process that runs the tests, as every test needs them: none ignored, none blocked.

A caller may ignore SIGINT (a job in the background of a script) or SIGCHLD (then no exit code can be read), or block signals. All
of that is inherited, by the tests and by what they start, and a test that sends such a signal would wait for ever.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

#: Whose disposition a test or something that it starts relies on. Python ignores SIGPIPE and SIGXFSZ, and resets them in children.
NEEDED: Final = (
    signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM, signal.SIGTERM, signal.SIGCHLD,
    signal.SIGVTALRM, signal.SIGXCPU,
)  # fmt: skip


@contextmanager
def usual_signals() -> Iterator[None]:
    """Neither ignored nor blocked inside; as before afterwards. A handler that somebody set stays."""
    mask = signal.pthread_sigmask(signal.SIG_SETMASK, ())
    ignored = [number for number in NEEDED if signal.getsignal(number) is signal.SIG_IGN]
    for number in ignored:
        # Python's own, where it has one: it raises KeyboardInterrupt, and is the default in what is started
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    try:
        yield
    finally:
        for number in ignored:
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
