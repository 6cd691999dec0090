"""The tier that a daemon's options ask for: made new, or of the descriptors that another version's process has handed over.

Its descriptors are all that another process needs: 'backing', the locked file or device, and 'key', if it is encrypted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module

from tmemfs.options import Options
from tmemfs.system.key import Key
from tmemfs.system.memory_safety import MemorySafety
from tmemfs.tiers.file import FileTier
from tmemfs.tiers.in_memory import MemoryTier
from tmemfs.tiers.tier import Tier


@dataclass(frozen=True, slots=True)
class OpenTier:
    """A tier that is in use in another process: its descriptors, and what was found out when it was opened."""

    fds: Mapping[str, int]
    capacity_bytes: int
    can_discard: bool


def import_cipher(options: Options) -> None:
    """Import what encryption needs, if it is on: 2 MB, which those who do not encrypt need not pay.

    To be called before `MemorySafety.lock_current`, which releases its library: what is used of that is touched when the tier is
    made, and stays.
    """
    if options.encrypt and options.backing:
        import_module("tmemfs.tiers.encrypted")


def open_tier(options: Options, safety: MemorySafety, adopted: OpenTier | None = None) -> tuple[Tier, dict[str, int]]:
    """Where segments go, and its descriptors. An `adopted` one keeps its contents. Raises Refused, Busy, OSError."""
    if options.backing is None:
        return MemoryTier(0), {}
    if adopted is None:
        tier = FileTier(options.backing)
    else:
        tier = FileTier.adopt(options.backing, adopted.fds["backing"], adopted.capacity_bytes, adopted.can_discard)
    if not options.encrypt:
        return tier, {"backing": tier.fd}
    # Not at the top: see import_cipher.
    from tmemfs.tiers.encrypted import EncryptedTier

    key = Key.create() if adopted is None else Key.adopt(adopted.fds["key"])
    safety.note_lock(key.lock)
    return EncryptedTier(tier, key), {"backing": tier.fd, "key": key.fd}
