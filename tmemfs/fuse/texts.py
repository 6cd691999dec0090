"""The texts that readers of control files are given: rendered when they are read, shared, and bounded in memory.

The first read of a handle and each read at offset 0 render a text; an open does not. Root always gets a new one. The other users
share one: an attribute is rendered for them once per SHARED_S, so the cost of rendering does not grow with the number of readers. A
write ends the sharing, so no reader is shown the value before it.

Later reads of the handle come from the same text, so that the pieces fit together. Texts are kept for the handles that read last,
up to one limit for root and one for all other users. A handle that was idle while others read loses its text, and the rest of what
it reads comes from a newer one. One number of the old text is kept, its length, so that a read at the old end still returns EOF.

Invariants:
1. The texts kept for other users take at most OTHERS_BYTES and one text per attribute. Those kept for root take ROOT_BYTES, or one
   text if that is larger.
2. Nothing is kept of a handle that was released, and no shared texts once the last handle is released.

Knows nothing of FUSE. Thread-safety: one thread.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Final

#: To render every file once takes 0.9 ms, `metrics` alone 0.4. With readers of all files that is 1% of one core.
SHARED_S: Final = 0.1
OTHERS_BYTES: Final = 256 << 10
ROOT_BYTES: Final = 4 << 20

Render = Callable[[], bytes]


class _Kept:
    """Texts by handle: those that were read last, of `limit_bytes` in all, but at least one."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._texts: OrderedDict[int, bytes] = OrderedDict()
        self._bytes = 0

    def get(self, handle: int) -> bytes | None:
        text = self._texts.get(handle)
        if text is not None:
            self._texts.move_to_end(handle)
        return text

    def put(self, handle: int, text: bytes) -> None:
        self.drop(handle)
        self._texts[handle] = text
        self._bytes += len(text)
        while self._bytes > self._limit_bytes and len(self._texts) > 1:
            self._bytes -= len(self._texts.popitem(last=False)[1])

    def drop(self, handle: int) -> None:
        self._bytes -= len(self._texts.pop(handle, b""))


class Texts:
    """Texts of attributes for readers; `now` gives seconds."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._roots = _Kept(ROOT_BYTES)
        self._others = _Kept(OTHERS_BYTES)
        self._shared: dict[int, tuple[float, bytes]] = {}
        self._ends: dict[int, int] = {}

    def read(self, handle: int, attribute: int, is_root: bool, render: Render, offset: int, size: int) -> bytes:
        """At most `size` bytes at `offset` of the text that `handle` reads of `attribute`."""
        kept = self._roots if is_root else self._others
        text = kept.get(handle) if offset else None
        if text is None:
            # The text was dropped, but its end is known: this read must find it, or the reader would never be done.
            if offset and offset >= self._ends.get(handle, offset + 1):
                return b""
            text = render() if is_root else self._share(attribute, render)
            kept.put(handle, text)
            self._ends[handle] = len(text)
        return text[offset : offset + size]

    def forget_shared(self) -> None:
        """Have the next read render a new text: a value has changed."""
        self._shared.clear()

    def release(self, handle: int) -> None:
        """`handle` is closed."""
        self._roots.drop(handle)
        self._others.drop(handle)
        self._ends.pop(handle, None)
        if not self._ends:
            self._ends.clear()  # frees its table, which has grown with the largest number of handles
            self._shared.clear()

    def _share(self, attribute: int, render: Render) -> bytes:
        until, text = self._shared.get(attribute, (0.0, b""))
        now = self._now()
        if now >= until:
            text = render()
            self._shared[attribute] = now + SHARED_S, text
        return text
