"""What the options of a second `up` ask for against what runs, by the control files, the record and the table of swaps."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Final

from tmemfs.cli.control_io import read_control, read_stat
from tmemfs.cli.targets import Target
from tmemfs.errors import Busy
from tmemfs.system import swapdev
from tmemfs.system.memory import total_ram_bytes
from tmemfs.units import SEGMENT_BYTES, format_size, parse_seconds, parse_size

#: Returns the value that runs if it differs from the text of the option, else None.
_Compare = Callable[[Target, str], str | None]


def refuse_differences(target: Target, given: Mapping[str, str]) -> None:
    """Raise Busy if options differ from what runs, naming them; BadValue for a value that cannot be parsed."""
    found = {option: now for option, text in given.items() if (now := _COMPARES[option](target, text)) is not None}
    if found:
        said = "; ".join(f"--{option} {given[option]} was given, and it is {now}" for option, now in found.items())
        raise Busy(
            f"{target.mountpoint} is up with other options: {said}. Nothing was changed: leave them out, change limits and codec "
            f"by 'tmemfs set', or run 'tmemfs down {target.mountpoint}' first"
        )


def _size(target: Target, text: str) -> str | None:
    now = int(read_stat(target.places[0])["swap_size"])
    return None if parse_size(text) == now else format_size(now)


def _pool_max(target: Target, text: str) -> str | None:
    now = int(read_control(target.places[0], "pool.max"))
    # the daemon rounds down to whole segments too
    wanted = parse_size(text, total_ram_bytes()) // SEGMENT_BYTES * SEGMENT_BYTES
    return None if wanted == now else format_size(now)


def _backing_max(target: Target, text: str) -> str | None:
    now = int(read_control(target.places[0], "backing.max"))
    # a share is of what was free at the start, which nobody knows any more: its text is compared instead of its size
    wanted = parse_size(text, 0)
    recorded = _recorded(target, "backing-max")
    is_same = text == recorded if not wanted else wanted == now
    return None if is_same else f"{format_size(now)}" + (f" ({recorded})" if recorded else "")


def _codec(target: Target, text: str) -> str | None:
    now = next(word[1:-1] for word in read_control(target.places[0], "codec").split() if word.startswith("["))
    if text == now:
        return None
    # 'zstd' and 'zstd:1' are the same codec; only here is the codec module, with its libraries, worth loading
    from tmemfs.store.codec import parse_codec

    return None if parse_codec(text).name == now else now


def _choice(key: str) -> _Compare:
    def compare(target: Target, text: str) -> str | None:
        now = next(word[1:-1] for word in read_control(target.places[0], key).split() if word.startswith("["))
        return None if text == now else now

    return compare


def _watchdog(target: Target, text: str) -> str | None:
    now = read_control(target.places[0], "watchdog").strip()
    wanted = text.strip().lower()
    is_same = wanted == now if "off" in (wanted, now) else parse_seconds(text) == float(now)
    return None if is_same else now


def _path(option: str) -> _Compare:
    def compare(target: Target, text: str) -> str | None:
        now = _recorded(target, option)
        # without a record, of an older version, nothing is known to differ
        return None if now is None or os.path.realpath(now) == os.path.realpath(text) else now

    return compare


def _priority(target: Target, text: str) -> str | None:
    entries = [entry for loop in target.loops() if (entry := swapdev.swap_on_device(loop.device))]
    return next((str(entry.priority) for entry in entries if entry.priority != int(text)), None)


def _encrypt(target: Target, text: str) -> str | None:
    # by the record: without a backing nothing is encrypted, whatever was asked for
    now = _recorded(target, "encrypt")
    return now if now != text else None


def _recorded(target: Target, option: str) -> str | None:
    return target.record.options.get(option) if target.record else None


_COMPARES: Final[dict[str, _Compare]] = {
    "size": _size,
    "pool-max": _pool_max,
    "backing": _path("backing"),
    "backing-max": _backing_max,
    "codec": _codec,
    "kernel-tuning": _choice("kernel.tuning"),
    "latency": _choice("latency"),
    "encrypt": _encrypt,
    "log": _path("log"),
    "watchdog": _watchdog,
    "priority": _priority,
}
