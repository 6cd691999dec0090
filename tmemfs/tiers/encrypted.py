"""The encrypted tier: any tier, with what it is given encrypted before and decrypted after. Encryption is on by default.

AES-256 in counter mode under the key of the mount. The 128-bit counter is

    bits 64-127  the sequence number of the segment
    bits 0-63    the number of the 16-byte block in the segment, from 0 on

so any sectors of an extent are decrypted without the rest. The keystream of a block is used for one plaintext only: a segment never
changes once it is written, and no two have the same sequence number under one key. docs/format.md has the argument and says what
this protects from. It does not authenticate: a record's checksum finds accidents, and nothing stops who can write to the backing.

A write is encrypted into a buffer of its own, never in place: the frame serves loads meanwhile. A read is decrypted in place, in
the caller's buffer. The library releases the interpreter's lock for both.

Thread-safety: all methods may run at once, as the protocol demands. MOST_WRITERS writes at once have a cipher and a buffer each, so
that one is encrypted while others are written; more than that wait. Each thread that reads has a cipher of its own.

Invariant: 1. The buffers have been faulted in and no code is used for the first time once the swap is served (`Reader.warm`).
"""

from __future__ import annotations

import mmap
import queue
import threading
from typing import Final

from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CTR

from tmemfs.system.key import Key
from tmemfs.tiers.tier import MOST_WRITERS, Extent, Tier
from tmemfs.units import SECTOR_BYTES, SEGMENT_BYTES

_AES_BLOCK_BYTES: Final = 16
_COUNTER_BYTES: Final = 16
_SEQUENCE_SHIFT: Final = 64
#: No segment has it, so its keystream may be used for anything that nobody sees.
_NO_SEQUENCE: Final = 0


class EncryptedTier:
    """`inner`, which sees only what is encrypted with `key`. `close` ends both."""

    is_encrypted = True

    def __init__(self, inner: Tier, key: Key) -> None:
        self._inner: Final = inner
        self._key: Final = key
        self._readers: Final = _CipherOfThread(key)
        self._writers: Final = queue.SimpleQueue[_Writer]()
        for _ in range(MOST_WRITERS):
            self._writers.put(_Writer(key))

    @property
    def name(self) -> str:
        """That of the inner tier, as the three below."""
        return self._inner.name

    @property
    def capacity_bytes(self) -> int:
        """Encryption takes no space."""
        return self._inner.capacity_bytes

    @property
    def most_extents(self) -> int | None:
        """An extent for each of the inner tier's."""
        return self._inner.most_extents

    @property
    def sector_bytes(self) -> int:
        """A multiple of the cipher's block."""
        return self._inner.sector_bytes

    @property
    def can_discard(self) -> bool:
        """Whether the inner tier can."""
        return self._inner.can_discard

    def write(self, extent: Extent, data: memoryview, sequence: int, for_cleaning: bool = False) -> None:
        """Encrypt `data`, then write it."""
        writer = self._writers.get()
        try:
            self._inner.write(extent, writer.encrypted(data, sequence), sequence, for_cleaning)
        finally:
            self._writers.put(writer)

    def read(self, extent: Extent, offset: int, into: memoryview, sequence: int) -> None:
        """Read, then decrypt in place."""
        # Before the read: a thread's first one makes its cipher, also the one of `Reader.warm`, which finds nothing to read.
        cipher = self._readers.cipher
        self._inner.read(extent, offset, into, sequence)
        cipher.apply(sequence, offset, into, into)

    def discard(self, extents: tuple[Extent, ...]) -> None:
        """Discard, in the inner tier."""
        self._inner.discard(extents)

    def close(self) -> None:
        """Close the inner tier, and forget the key: what is left of its contents cannot be read from now on."""
        try:
            self._inner.close()
        finally:
            self._key.forget()


class _KeystreamCipher:
    """Adds the keystream of `key`: that encrypts what is not encrypted, and decrypts what is. Not for two threads at once."""

    def __init__(self, key: Key) -> None:
        # One context for all: `reset_nonce` takes 0.3 us, a new context 7 us and memory.
        self._context: Final = Cipher(AES256(key.view), CTR(bytes(_COUNTER_BYTES))).encryptor()
        # Its code is in RAM from now on: reading it from a file may not be possible when memory is short.
        self.apply(_NO_SEQUENCE, 0, memoryview(bytes(SECTOR_BYTES)), memoryview(bytearray(SECTOR_BYTES)))

    def apply(self, sequence: int, offset: int, source: memoryview, into: memoryview) -> None:
        """Set `into` to `source`, which lies at byte `offset` (a multiple of a sector) of the segment, with the keystream added."""
        counter = sequence << _SEQUENCE_SHIFT | offset // _AES_BLOCK_BYTES
        self._context.reset_nonce(counter.to_bytes(_COUNTER_BYTES, "big"))
        self._context.update_into(source, into)


class _Writer:
    """A cipher, and a page-aligned, faulted-in buffer for a segment. For one thread at a time."""

    def __init__(self, key: Key) -> None:
        self._cipher: Final = _KeystreamCipher(key)
        # Shared: a process that is forked later writes to the same pages, and needs no copies of them when memory is short.
        flags = mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
        self._buffer: Final = memoryview(mmap.mmap(-1, SEGMENT_BYTES, flags=flags))

    def encrypted(self, data: memoryview, sequence: int) -> memoryview:
        """`data`, encrypted: borrowed until the next call."""
        found = self._buffer[: len(data)]
        self._cipher.apply(sequence, 0, data, found)
        return found


class _CipherOfThread(threading.local):
    """A cipher for the calling thread."""

    def __init__(self, key: Key) -> None:
        self.cipher: Final = _KeystreamCipher(key)
