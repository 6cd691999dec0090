"""The commands that fill Redis: records of sessions, users, scores, cached bodies, counters.

Texts come from `prose`. Identities and tokens are random, as in real use. Every third cached body is compressed. Pure, and the same
for the same seed.

Source: the Redis serialization protocol (RESP 2).
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from random import Random
from typing import Final

_EPOCH_S: Final = 1_700_000_000
_AGENTS: Final = (
    "Mozilla/5.0 (X11; Linux x86_64; rv:128.0) Gecko/20100101 Firefox/128.0",
    "Mozilla/5.0 (Windows NT 10.0; Win64; x64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/126.0.0.0 Safari/537.36",
    "Mozilla/5.0 (iPhone; CPU iPhone OS 17_5 like Mac OS X) AppleWebKit/605.1.15 (KHTML, like Gecko) Version/17.5 Mobile",
)

Word = str | bytes | int | float


def encoded(*words: Word) -> bytes:
    """The bytes of one command."""
    parts = [word if isinstance(word, bytes) else str(word).encode() for word in words]
    return b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%s\r\n" % (len(part), part) for part in parts)


def commands(users: int, prose: str, seed: int = 1) -> Iterator[bytes]:
    """The commands for that many users; the answer to each is one line."""
    random = Random(seed)
    for number in range(users):
        yield encoded("SET", f"session:{random.randbytes(16).hex()}", _session(random, number))
        yield encoded("HSET", f"user:{number}", *_user(random, number, prose))
        yield encoded("ZADD", f"board:{number % 50}", random.expovariate(1e-3), f"user:{number}")
        yield encoded("RPUSH", f"recent:{number}", *(random.randrange(10 * users) for _ in range(random.randrange(1, 40))))
        yield encoded("INCRBY", f"visits:{number}", random.randrange(1, 100_000))
        if number % 4 == 0:
            yield encoded("SETEX", f"cache:/articles/{number}", 86_400, _body(random, number, prose))


def _session(random: Random, number: int) -> str:
    started = _EPOCH_S + random.randrange(10**7)
    return json.dumps({
        "user": number, "token": random.randbytes(24).hex(), "agent": random.choice(_AGENTS), "started": started,
        "seen": started + random.randrange(10**5), "address": ".".join(str(random.randrange(256)) for _ in range(4)),
        "cart": [{"item": random.randrange(10**5), "count": random.randrange(1, 4)} for _ in range(random.randrange(5))],
    })  # fmt: skip


def _user(random: Random, number: int, prose: str) -> list[Word]:
    """The fields and values of a user."""
    name = f"{random.choice(_NAMES)} {random.choice(_NAMES)}"
    about = cut(random, prose, random.randrange(20, 200))
    mail = f"{name.replace(' ', '.').lower()}{number}@example.org"
    joined = _EPOCH_S + random.randrange(10**7)
    return ["name", name, "mail", mail, "balance", round(random.gauss(90, 60), 2), "joined", joined, "about", about]


def _body(random: Random, number: int, prose: str) -> bytes:
    text = cut(random, prose, random.randrange(500, 8000)).encode()
    return zlib.compress(text) if number % 3 == 0 else text


def cut(random: Random, prose: str, length: int) -> str:
    """A random part of `prose` of that many characters."""
    at = random.randrange(max(len(prose) - length, 1))
    return prose[at : at + length]


_NAMES: Final = (
    "Ada", "Alan", "Anders", "Barbara", "Bertrand", "Bjarne", "Charles", "Dennis", "Donald", "Edsger", "Frances", "Grace", "Guido",
    "Herbert", "Ivan", "Jean", "John", "Joseph", "Karen", "Ken", "Kristen", "Leslie", "Linus", "Margaret", "Niklaus", "Ole-Johan",
    "Peter", "Radia", "Robin", "Shafi", "Sophie", "Stephen", "Tim", "Tony", "Whitfield",
)  # fmt: skip
