"""Memory safety: what a daemon does to its process so that it goes on while the machine has no memory, and what of it is in effect.

A daemon that serves swap must not wait for memory which only it could free. So its heap is set up not to shrink, the collector
leaves alone what is there from the start, and its memory is locked, or faulted in ahead of need.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Final

from tmemfs.system import memory

log = logging.getLogger(__name__)

#: For lz4's tables of 256 KiB, which it keeps on the stack, and a few frames of C and Python.
_STACK_BYTES: Final = 512 << 10
#: How long a thread keeps the interpreter while another waits: a request should not wait for a report.
_SWITCH_S: Final = 0.0005
#: What imports map and (nearly) nobody calls, 16 MB of it, which locking would keep. LC_CTYPE is the locale's table of letters. Of
#: _rust, the library of the package cryptography, the cipher's code is called: that is locked when it is touched again.
_HARDLY_CALLED: Final = (
    "LC_CTYPE",
    "libcrypto.", "libssl.", "_ssl.", "_hashlib.", "liblzma.", "_lzma.", "libbz2.", "_bz2.", "libz.", "libexpat.",
    "_cffi_backend.", "_rust.abi3.",
)  # fmt: skip


class MemorySafety:
    """Sets this process up; `outcomes` says by name which measures are in effect."""

    def __init__(self) -> None:
        self._outcomes: dict[str, int] = {}

    @property
    def outcomes(self) -> Mapping[str, int]:
        """1 for each measure that is in effect, 0 for one that is not. The same mapping each time."""
        return self._outcomes

    def prepare_process(self) -> None:
        """Set up heap, stacks and priority. Before the first thread."""
        threading.stack_size(_STACK_BYTES)  # 8 MiB by default, which would count as locked (docs/decisions/0001)
        sys.setswitchinterval(_SWITCH_S)
        # The collector last: it trims what the imports have left of the heap, before the heap is locked.
        for outcome in (
            memory.no_core_dump(),
            memory.heap_settings(),
            memory.io_flusher(),
            memory.oom_score_adjust(),
            memory.realtime(),
            memory.freeze_garbage(),
        ):
            self._outcomes[outcome.name] = int(outcome.ok)
            if not outcome.ok:
                log.info("%s could not be enabled (%s): see tmemfs doctor", outcome.name, outcome.detail)

    def prefer_for_oom_killer(self, other: int) -> None:
        """Where the OOM killer does not spare this process, have it choose it rather than process `other`."""
        self._outcomes["oom_worker_first"] = not self._outcomes["oom_score_adj_set"] and int(memory.be_killed_before(other).ok)

    @contextmanager
    def ordinary_priority(self) -> Iterator[None]:
        """In the block, which may wait for memory, give way to those who write pages out."""
        memory.ordinary_thread()
        try:
            yield
        finally:
            self.restore_priority()

    def restore_priority(self) -> None:
        """Back to the priority of `prepare_process`, in a process that was forked without it, too."""
        if self._outcomes.get("realtime"):
            memory.realtime()

    def lock_current(self) -> None:
        """Lock what is mapped so far, except for code that hardly anybody calls."""
        self.note_lock(memory.lock_current())
        memory.drop_code(_HARDLY_CALLED)

    def note_lock(self, outcome: memory.Outcome) -> None:
        """Memory counts as locked only if all of it is."""
        self._outcomes["memory_locked"] = self._outcomes.get("memory_locked", 1) & int(outcome.ok)
