"""Fills redis-server with values and verifies them, pipelined over a socket.

Source: the Redis serialization protocol (RESP 2).
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Final

from tools.bench.toucher import WrongBytes

#: Requests that are outstanding at once.
BATCH: Final = 256
#: What redis 7.0 has beside each value: its key, two objects and a place in the table (181 MiB for 160,000 values of 1000 bytes).
VALUE_BESIDE_BYTES: Final = 186
#: A factor that moves the values of neighbouring keys far apart.
SPREAD: Final = 2654435761


class RedisClient:
    """Sets and verifies keys, many at a time. Each value is a different piece of `base`."""

    def __init__(self, stream: io.BufferedIOBase, base: bytes, value_bytes: int) -> None:
        self._stream = stream
        self._base = base
        self._value_bytes = value_bytes

    def value(self, number: int) -> bytes:
        """The value of key number `number`."""
        at = number * SPREAD % (len(self._base) - self._value_bytes)
        return self._base[at : at + self._value_bytes]

    def fill(self, count: int) -> None:
        """Set the first `count` keys."""
        for first in range(0, count, BATCH):
            some = range(first, min(first + BATCH, count))
            self._ask([(b"SET", redis_key(one), self.value(one)) for one in some], [b"+OK\r\n" for _ in some])

    def verify(self, numbers: Sequence[int]) -> None:
        """Raise WrongBytes if one of these keys has another value."""
        self._ask([(b"GET", redis_key(one)) for one in numbers], [_bulk(self.value(one)) for one in numbers])

    def ping(self) -> None:
        """Ask for something small."""
        self._ask([(b"PING",)], [b"+PONG\r\n"])

    def digest(self) -> str:
        """The server's checksum of all keys and values. The server has to allow DEBUG."""
        self._stream.write(redis_request([b"DEBUG", b"DIGEST"]))
        self._stream.flush()
        answer = self._stream.readline()
        if not answer.startswith(b"+"):
            raise EOFError(f"redis-server gave no digest: {answer.decode(errors='replace').strip() or 'it ended'}")
        return answer[1:].strip().decode()

    def _ask(self, requests: Sequence[Sequence[bytes]], answers: Sequence[bytes]) -> None:
        self._stream.write(b"".join(map(redis_request, requests)))
        self._stream.flush()
        wanted = b"".join(answers)
        answer = self._stream.read(len(wanted))
        if len(answer) < len(wanted):
            raise EOFError("redis-server ended")
        if answer != wanted:
            raise WrongBytes(f"redis answered {answer[:64]!r} and not {wanted[:64]!r}, or so later")


def redis_key(number: int) -> bytes:
    """The key that redis-benchmark makes of key:__rand_int__."""
    return b"key:%012d" % number


def redis_request(words: Sequence[bytes]) -> bytes:
    """The bytes of a command on the socket."""
    return b"*%d\r\n" % len(words) + b"".join(map(_bulk, words))


def _bulk(word: bytes) -> bytes:
    return b"$%d\r\n%s\r\n" % (len(word), word)
