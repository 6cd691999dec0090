"""The FUSE requests that the relay answers itself, as bytes.

    request header, 40 bytes   len u32, opcode u32, unique u64, nodeid u64, uid u32, gid u32, pid u32, extension u16, padding u16
    READ, 40 bytes             fh u64, offset u64, size u32, flags u32, lock owner u64, open flags u32, padding u32
    WRITE, 40 bytes + data     fh u64, offset u64, size u32, flags u32, lock owner u64, open flags u32, padding u32
    FALLOCATE, 32 bytes        fh u64, offset u64, length u64, mode u32, padding u32
    reply header, 16 bytes     len u32, -errno i32, unique u64
    WRITE reply, 8 bytes       size u32, padding u32
    INTERRUPT, 8 bytes         interrupted u64
    INIT, 64 bytes             major u32, minor u32, readahead u32, flags u32, flags2 u32, ...
    INIT reply, 64 bytes       major u32, minor u32, readahead u32, flags u32, max background u16, congestion u16,
                               max write u32, time granularity u32, max pages u16, ...

Source: include/uapi/linux/fuse.h. Knows layouts only; performs nothing.
"""

from __future__ import annotations

from struct import Struct
from typing import Final

FORGET: Final = 2
READ: Final = 15
WRITE: Final = 16
RELEASE: Final = 18
INIT: Final = 26
RELEASEDIR: Final = 29
INTERRUPT: Final = 36
BATCH_FORGET: Final = 42
FALLOCATE: Final = 43

#: The kernel sends these in the background, and no process waits for them.
RELEASES: Final = frozenset((RELEASE, RELEASEDIR))

#: Requests that want no reply: FORGET, BATCH_FORGET and INTERRUPT; and RELEASE, which gets one before it is passed on.
NO_REPLY: Final = RELEASES | {FORGET, BATCH_FORGET, INTERRUPT}

#: Header of a request, and of READ, WRITE and FALLOCATE their first fields too.
HEADER: Final = Struct("<IIQQ")
IO: Final = Struct("<IIQQ24xQI")
_UNIQUE_AT: Final = 8
_NO_UNIQUE: Final = bytes(8)
#: The first field of INTERRUPT: `unique` of the request that no process waits for any more.
INTERRUPTED: Final = Struct("<40xQ")
#: Unique and handle of a WRITE.
WRITTEN_TO: Final = Struct("<8xQ24xQ")
FALLOCATION: Final = Struct("<IIQQ24xQQI")
IO_BYTES: Final = 80
REQUEST_HEADER_BYTES: Final = 40
USER: Final = Struct("<I")
USER_AT: Final = 24

REPLY: Final = Struct("<IiQ")
REPLY_BYTES: Final = REPLY.size
WRITTEN: Final = Struct("<IiQII")

PUNCH_HOLE: Final = 0x03
ZERO_RANGE: Final = 0x11

#: The largest request, in pages: so many stores a load waits for at most if one request is before it.
REQUEST_PAGES: Final = 64
REQUEST_BYTES: Final = REQUEST_PAGES * 4096
#: Requests that the kernel may have under way at once, waiting stores included. It bounds the memory that those take: 2 MiB, which
#: is there from the start (Pager.warm). With 64, swap stalled in a guest without free memory: the heap had to grow for waiting
#: stores.
REQUESTS_UNDER_WAY: Final = 8

#: Set in the `unique` of a request that the kernel hands out again.
RESENT: Final = 1 << 63
#: A notification (unique 0) that asks for that: FUSE_NOTIFY_RESEND in the place of an error. Linux 6.9; EINVAL before.
RESEND: Final = REPLY.pack(REPLY_BYTES, 7, 0)

_INIT_LIMITS: Final = Struct("<HHIIH")
_INIT_LIMITS_AT: Final = REPLY_BYTES + 16
_INIT_REPLY_BYTES: Final = REPLY_BYTES + 64
_OLD_INIT_REPLY_BYTES: Final = REPLY_BYTES + 24
_MINOR: Final = Struct("<I")
_MINOR_AT: Final = REQUEST_HEADER_BYTES + 4
#: Minor version of the protocol. From 14 on libfuse splices requests into a pipe, and the kernel allocates pages for that
#: (fuse_lowlevel.c).
_MINOR_WITHOUT_SPLICE: Final = 13


def decline_splice(request: memoryview) -> None:
    """Have libfuse read its requests with read(2): INIT says that the kernel is too old for splicing."""
    (minor,) = _MINOR.unpack_from(request, _MINOR_AT)
    _MINOR.pack_into(request, _MINOR_AT, min(minor, _MINOR_WITHOUT_SPLICE))


def limit_requests(reply: bytearray) -> None:
    """Set our limits in libfuse's reply to INIT, extended to today's length; an error reply is left as it is."""
    _, error, unique = REPLY.unpack_from(reply)
    if error or len(reply) < _OLD_INIT_REPLY_BYTES:
        return
    # libfuse answers an old minor version (`decline_splice`) with the short reply, which has no place for `max pages`.
    if len(reply) < _INIT_REPLY_BYTES:
        reply.extend(bytes(_INIT_REPLY_BYTES - len(reply)))
        REPLY.pack_into(reply, 0, len(reply), 0, unique)
    _, _, max_write, granularity, _ = _INIT_LIMITS.unpack_from(reply, _INIT_LIMITS_AT)
    limits = (REQUESTS_UNDER_WAY, REQUESTS_UNDER_WAY * 3 // 4, min(max_write, REQUEST_BYTES), granularity, REQUEST_PAGES)
    _INIT_LIMITS.pack_into(reply, _INIT_LIMITS_AT, *limits)


def copy_request(into: memoryview, head: memoryview, data: memoryview) -> None:
    """Copy a request, its `unique` last: who finds that finds all of it."""
    into[IO_BYTES : IO_BYTES + len(data)] = data
    into[_UNIQUE_AT + 8 : IO_BYTES] = head[_UNIQUE_AT + 8 : IO_BYTES]
    into[:_UNIQUE_AT] = head[:_UNIQUE_AT]
    into[_UNIQUE_AT : _UNIQUE_AT + 8] = head[_UNIQUE_AT : _UNIQUE_AT + 8]


def clear_unique(head: memoryview) -> None:
    """Say that there is no request at `head`."""
    # With one 8-byte write: struct would write byte by byte, and a process that is killed meanwhile leave another number there.
    head[_UNIQUE_AT : _UNIQUE_AT + 8] = _NO_UNIQUE


def error_reply(unique: int, errno: int) -> bytes:
    """The reply that says `errno`."""
    return REPLY.pack(REPLY_BYTES, -errno, unique)


def done_reply(unique: int, errno: int, written_bytes: int) -> bytes:
    """The reply to a WRITE of `written_bytes`, or to a discard (0), that ended with `errno`."""
    if errno:
        return error_reply(unique, errno)
    return written_reply(unique, written_bytes) if written_bytes else empty_reply(unique)


def empty_reply(unique: int) -> bytes:
    """The reply of success with nothing to say."""
    return REPLY.pack(REPLY_BYTES, 0, unique)


def written_reply(unique: int, size: int) -> bytes:
    """The reply to a WRITE of `size` bytes."""
    return WRITTEN.pack(WRITTEN.size, 0, unique, size, 0)
