"""The swaps that are compared. Each is turned on alone, and removed at the end in any case.

    tmemfs        the command, its relay, its own backing file
    tmemfs-pyfuse3    the same store, its image served by pyfuse3 (plain_fuse.py)
    zram-NAME     a device of its own, for each compressor that the kernel offers
    zswap-NAME    in front of a plain swap file, for each compressor that the kernel offers
    plain         a swap file
    floor         tools/floor: raw pages in memory behind FUSE and the same kind of loop device as tmemfs

`Contender.on` registers the undoing of each step on an ExitStack before it takes the step. The undoing may find nothing to undo. So
an exception, or a signal that tools.interrupts turns into one, leaves nothing behind, between whichever instructions it comes.
`all_contenders` returns what the kernel has, and the reasons for the rest.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from tmemfs.errors import Refused
from tmemfs.system import swapdev
from tmemfs.system.proctext import SwapEntry
from tmemfs.units import PAGE_BYTES
from tools.bench import plain_fuse
from tools.bench.accounts import OWN_WRITTEN, cpu_s, disk_of, parse_flat, parse_mm_stat
from tools.bench.mounts import end_server, processes_with, take_down, unmount, wait_ready
from tools.bench.native import FLOOR, compiled
from tools.interrupts import uninterrupted

_ZRAM_CONTROL: Final = Path("/sys/class/zram-control")
_ZSWAP: Final = Path("/sys/module/zswap/parameters")
_CRYPTO: Final = Path("/proc/crypto")
_ZSWAP_KNOWS: Final = ("lzo", "lzo-rle", "lz4", "lz4hc", "zstd", "deflate", "842")
_COMMAND_S: Final = 120.0
_QUIET_S: Final = 0.1
_QUIET_SHARE: Final = 0.03
_QUIET_LOOKS: Final = 100
#: Below the priority of other swaps: what other programs swap does not come here.
_PRIORITY: Final = 0


class NotAlone(Refused):
    """Another swap is on."""


@dataclass(frozen=True, slots=True)
class Limits:
    """The size of a swap, and how much RAM its pages may take: `pool_percent` of all RAM, or any amount.

    `is_disk_limited` where the rate of the disk is limited (disk.py): swap files are behind a loop device then, since the kernel's
    own swap requests are dispatched whatever the limits, and counted before they are merged.
    """

    swap_bytes: int
    pool_percent: int | None = None
    is_disk_limited: bool = False

    @property
    def pool_max(self) -> str:
        """The limit as tmemfs is told it."""
        # more than any workload stores: without a percentage, pages stay in RAM
        return "8G" if self.pool_percent is None else f"{self.pool_percent}%"


@dataclass(frozen=True, slots=True)
class Swap:
    """An active swap, or a block device that is only attached."""

    device: str
    daemons: tuple[int, ...]
    disk: str
    counters: Callable[[], dict[str, int]]
    #: Writes everything in RAM to disk; None where nothing can do that.
    to_disk: Callable[[], None] | None = None

    def settle(self) -> None:
        """Wait until the daemon is idle, for some seconds at most."""
        # a swap in the kernel has no daemon whose CPU could show that it still works
        for _ in range(_QUIET_LOOKS if self.daemons else 1):
            before = sum(map(cpu_s, self.daemons))
            time.sleep(_QUIET_S)
            if sum(map(cpu_s, self.daemons)) - before < _QUIET_S * _QUIET_SHARE:
                return


class Contender(Protocol):
    """A swap that can be turned on."""

    @property
    def name(self) -> str:
        """As in the results."""

    @property
    def kind(self) -> str:
        """The part of the name before the compressor."""

    @property
    def sources(self) -> tuple[str, ...]:
        """Where all pages can be loaded from: 'ram', 'disk'."""

    def on(self, undo: ExitStack, directory: Path, limits: Limits, swap: bool) -> Swap:
        """Turn it on (without `swap`, attach its block device only); `undo` turns it off. Raises Refused."""


@contextmanager
def turned_on(contender: Contender, directory: Path, limits: Limits, swap: bool = True, wait_s: float = 0) -> Iterator[Swap]:
    """`contender` as the only swap, below `directory`; waits for others to be turned off. Raises Refused."""
    refuse_other_swaps(wait_s=wait_s)
    place = directory / contender.name
    with ExitStack() as undo:
        undo.callback(shutil.rmtree, place, True)
        place.mkdir()
        yield contender.on(undo, place, limits, swap)


@dataclass(frozen=True, slots=True)
class Tmemfs:
    """tmemfs as `tmemfs up` starts it."""

    name: str = "tmemfs"
    kind: str = "tmemfs"
    sources: tuple[str, ...] = ("ram", "disk")

    def on(self, undo: ExitStack, directory: Path, limits: Limits, swap: bool) -> Swap:
        """See Contender."""
        mountpoint = directory / "mnt"
        mountpoint.mkdir()
        options = ["--size", str(limits.swap_bytes), "--pool-max", limits.pool_max,
                   "--backing", str(directory / "backing"), "--log", str(directory / "log")]  # fmt: skip
        # before the mount: an interrupt may come while the daemon starts
        undo.callback(take_down, mountpoint)
        _run(sys.executable, "-m", "tmemfs", "mount", str(mountpoint), *options)
        return _tmemfs_swap(undo, directory, processes_with(os.fspath(mountpoint)), swap, discard=True)


@dataclass(frozen=True, slots=True)
class PlainFuse:
    """tmemfs without its relay. No discards arrive."""

    name: str = "tmemfs-pyfuse3"
    kind: str = "tmemfs"
    sources: tuple[str, ...] = ("ram", "disk")

    def on(self, undo: ExitStack, directory: Path, limits: Limits, swap: bool) -> Swap:
        """See Contender."""
        mountpoint = directory / "mnt"
        mountpoint.mkdir()
        # an interrupt between the two would leave the server
        with uninterrupted():
            server = plain_fuse.start(mountpoint, limits.swap_bytes, limits.pool_max, directory / "backing")
            undo.callback(end_server, server)
        undo.callback(unmount, mountpoint)
        wait_ready(server)
        return _tmemfs_swap(undo, directory, (server.pid,), swap, discard=False)


def _tmemfs_swap(undo: ExitStack, directory: Path, pids: tuple[int, ...], swap: bool, discard: bool) -> Swap:
    control = directory / "mnt" / "control"
    device = _attach(undo, directory / "mnt" / "swap")
    if swap:
        _swap_on(undo, device, discard)
    return Swap(
        device,
        pids,
        disk_of(directory),
        lambda: parse_flat((control / "stat").read_text()),
        lambda: _written(control / "shrink", "all"),
    )


@dataclass(frozen=True, slots=True)
class Zram:
    """A zram device of its own with one compressor. Its RAM has no limit: zram of this kernel cannot write back."""

    compressor: str
    kind: str = "zram"
    sources: tuple[str, ...] = ("ram",)

    @property
    def name(self) -> str:
        """As in the results."""
        return f"zram-{self.compressor}"

    def on(self, undo: ExitStack, directory: Path, limits: Limits, swap: bool) -> Swap:
        """See Contender."""
        # a device whose number was not read could not be removed again
        with uninterrupted():
            number = int((_ZRAM_CONTROL / "hot_add").read_text())
            undo.callback(_remove_zram, number)
        sys_block = swapdev.SYS_BLOCK / f"zram{number}"
        # the kernel takes no other compressor once the device has a size
        (sys_block / "comp_algorithm").write_text(self.compressor)
        (sys_block / "disksize").write_text(str(limits.swap_bytes))
        device = f"/dev/zram{number}"
        if swap:
            # without discard, as its users have it: the kernel tells zram of freed slots by itself
            _swap_on(undo, device, discard=False)
        return Swap(device, (), disk_of(directory), lambda: _zram_counters(sys_block))


@dataclass(frozen=True, slots=True)
class Plain:
    """A swap file."""

    name: str = "plain"
    kind: str = "plain"
    sources: tuple[str, ...] = ("disk",)

    def on(self, undo: ExitStack, directory: Path, limits: Limits, swap: bool) -> Swap:
        """See Contender."""
        file = directory / "swapfile"
        _run("fallocate", "--length", str(limits.swap_bytes), str(file))
        # swapon(8) warns of other rights
        file.chmod(0o600)
        device = _attach(undo, file) if limits.is_disk_limited else str(file)
        if swap:
            _swap_on(undo, device, discard=False)
        return Swap(device, (), disk_of(directory), _kernel_counters)


@dataclass(frozen=True, slots=True)
class Zswap:
    """zswap with one compressor in front of a swap file; its parameters are restored."""

    compressor: str
    kind: str = "zswap"
    sources: tuple[str, ...] = ("ram",)

    @property
    def name(self) -> str:
        """As in the results."""
        return f"zswap-{self.compressor}"

    def on(self, undo: ExitStack, directory: Path, limits: Limits, swap: bool) -> Swap:
        """See Contender."""
        percent = 50 if limits.pool_percent is None else limits.pool_percent
        wanted = {"compressor": self.compressor, "max_pool_percent": str(percent), "enabled": "Y"}
        for name, value in wanted.items():
            undo.callback((_ZSWAP / name).write_text, (_ZSWAP / name).read_text())
            (_ZSWAP / name).write_text(value)
        plain = Plain().on(undo, directory, limits, swap)
        return Swap(plain.device, (), plain.disk, lambda: {**_zswap_bytes(), **_kernel_counters()})


@dataclass(frozen=True, slots=True)
class Floor:
    """The null server: the minimum cost of FUSE under loop. `raw` keeps the pages, `null` drops them."""

    mode: str = "raw"
    name: str = "floor"
    kind: str = "floor"
    sources: tuple[str, ...] = ("ram",)

    def on(self, undo: ExitStack, directory: Path, limits: Limits, swap: bool) -> Swap:
        """See Contender."""
        mountpoint = directory / "mnt"
        mountpoint.mkdir()
        command = [str(compiled(FLOOR)), self.mode, str(mountpoint), str(limits.swap_bytes)]
        with uninterrupted():
            server = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
            undo.callback(end_server, server)
        undo.callback(unmount, mountpoint)
        wait_ready(server)
        device = _attach(undo, mountpoint / "swap")
        if swap:
            _swap_on(undo, device, discard=True)
        return Swap(device, (server.pid,), disk_of(directory), dict)


def all_contenders() -> tuple[list[Contender], dict[str, str]]:
    """What this kernel offers, and the reasons for what is left out."""
    found: list[Contender] = [Tmemfs(), PlainFuse()]
    missing = {}
    zram, zswap = zram_compressors(), zswap_compressors()
    found += [Zram(name) for name in zram]
    found += [Zswap(name) for name in zswap]
    if not zram:
        missing["zram"] = "this kernel has no zram that can be added to (/sys/class/zram-control)"
    if not zswap:
        missing["zswap"] = "this kernel has no zswap, or no compressor for it"
    for kind, have, known in (("zram", zram, ("lz4", "zstd")), ("zswap", zswap, ("lz4", "zstd"))):
        missing |= {f"{kind}-{name}": "this kernel was built without it" for name in known if have and name not in have}
    if zram and not (swapdev.SYS_BLOCK / "zram0" / "backing_dev").exists():
        missing["zram with writeback"] = "this kernel was built without CONFIG_ZRAM_WRITEBACK"
    return [*found, Plain(), Floor()], missing


def zram_compressors() -> list[str]:
    """The compressors in `comp_algorithm` of a device, which is added for this if there is none."""
    if not (_ZRAM_CONTROL / "hot_add").exists():
        return []
    places = sorted(swapdev.SYS_BLOCK.glob("zram*/comp_algorithm"))
    return parse_choices(places[0].read_text()) if places else []


def zswap_compressors() -> list[str]:
    """The compressors that zswap is known to accept and the kernel has."""
    if not _ZSWAP.exists() or not _CRYPTO.exists():
        return []
    have = {line.partition(":")[2].strip() for line in _CRYPTO.read_text().splitlines() if line.startswith("name ")}
    return [name for name in _ZSWAP_KNOWS if name in have]


def parse_choices(text: str) -> list[str]:
    """The words of '[this] that other', the chosen one first."""
    words = text.split()
    return sorted((word.strip("[]") for word in words), key=lambda word: f"[{word}]" not in words)


def refuse_other_swaps(ours: str | None = None, wait_s: float = 0) -> None:
    """Raise NotAlone if another swap than `ours` is on for longer than `wait_s`: pages would be swapped to both."""
    deadline = time.monotonic() + wait_s
    while _other_swaps(ours) and time.monotonic() < deadline:
        time.sleep(1)
    if others := _other_swaps(ours):
        names = " ".join(one.path for one in others)
        raise NotAlone(f"{names} is on as swap: turn it off for the benchmark (swapoff {names}), it would take pages too")


def _other_swaps(ours: str | None) -> list[SwapEntry]:
    return [one for one in swapdev.swap_entries() if one.path != ours]


def _attach(undo: ExitStack, image: Path) -> str:
    # by the path, since the device's name is not known if losetup was interrupted
    def detach() -> None:
        for device in swapdev.loop_devices_of(image):
            with suppress(Refused):
                swapdev.detach(device)

    undo.callback(detach)
    return swapdev.attach(image)


def _swap_on(undo: ExitStack, device: str, discard: bool) -> None:
    # registered before swapon(8), so it may find that the swap never was on
    def swap_off() -> None:
        if swapdev.swap_on_device(device):
            swapdev.swap_off(device)

    undo.callback(swap_off)
    _run("mkswap", device)
    _run("swapon", *(["--discard"] if discard else []), "--priority", str(_PRIORITY), device)


def _written(control: Path, value: str) -> None:
    control.write_text(value)


def _remove_zram(number: int) -> None:
    # hot_remove refuses a device that holds memory
    (swapdev.SYS_BLOCK / f"zram{number}" / "reset").write_text("1")
    (_ZRAM_CONTROL / "hot_remove").write_text(str(number))


def _zram_counters(sys_block: Path) -> dict[str, int]:
    return {**parse_mm_stat((sys_block / "mm_stat").read_text()), OWN_WRITTEN: 0}


def _kernel_counters() -> dict[str, int]:
    """What the kernel swapped to the device, which a swap file is: it has no counters of its own, and is the only swap."""
    found = parse_flat(Path("/proc/vmstat").read_text())
    return {"disk_read_bytes": found["pswpin"] * PAGE_BYTES, OWN_WRITTEN: found["pswpout"] * PAGE_BYTES}


def _zswap_bytes() -> dict[str, int]:
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    kib = {fields[0].rstrip(":"): int(fields[1]) for fields in lines}
    return {"ram_bytes": kib.get("Zswap", 0) << 10, "original_bytes": kib.get("Zswapped", 0) << 10}


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=_COMMAND_S, check=False)
    if done.returncode:
        raise Refused(f"{' '.join(command)} failed: {(done.stderr or done.stdout).strip()}")
    return done.stdout
