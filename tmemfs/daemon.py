"""The daemon: the composition root. Checks the options, builds the parts from the bottom up, serves until it is unmounted.

Order of construction, which is what makes memory safety hold: heap settings and stack size, tier, what is mapped so far locked,
then the regions (slots, segments and requests locked whole, the arena as it is touched), then everything to come.

SIGTERM and SIGINT unmount, unless the image is in use as swap or by a loop device: then the daemon says so and stays, for
whoever stops it would lose the pages in it.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import pyfuse3
import trio

from tmemfs.control import Control
from tmemfs.engine.engine import Engine, MakePager
from tmemfs.engine.pager import Pager
from tmemfs.engine.pressure import Pressure
from tmemfs.engine.services import Limits, Services, parse_pool_max
from tmemfs.errors import BadValue, Busy, Refused
from tmemfs.fuse.mount import FUSE_DEVICE, mount_fuse
from tmemfs.fuse.namespace import SWAP, Namespace
from tmemfs.fuse.relay import Relay
from tmemfs.fuse.wire import REQUEST_PAGES, REQUESTS_UNDER_WAY
from tmemfs.host import memory
from tmemfs.host.doctor import require_root
from tmemfs.host.log import log_in_background
from tmemfs.host.notify import notify
from tmemfs.host.swapdev import is_mounted, loop_devices_of, unmount
from tmemfs.host.watermark import no_boost
from tmemfs.store.arena import KEPT_FRAMES, SPARE_FRAMES, Arena
from tmemfs.store.codec import parse_codec
from tmemfs.store.segments import CLEANING_RESERVE_BYTES, Extents, SegmentTable
from tmemfs.store.slots import SlotTable
from tmemfs.store.tmem import Tmem
from tmemfs.tiers.file import FileTier, check_backing
from tmemfs.tiers.memory import MemoryTier
from tmemfs.tiers.tier import Tier
from tmemfs.units import PAGE_BYTES, SEGMENT_BYTES, parse_size

log = logging.getLogger(__name__)

#: Room for lz4's tables of 256 KiB, which it keeps on the stack, and for a few frames of C and Python.
_STACK_BYTES: Final = 512 << 10
#: How long a thread keeps the interpreter while another waits: a request should not wait for a report.
_SWITCH_S: Final = 0.0005
#: Libraries that imports of imports map, 6 MB of them: locking them would keep what nobody calls.
_NEVER_CALLED: Final = (
    "libcrypto.", "libssl.", "_ssl.", "_hashlib.", "liblzma.", "_lzma.", "libbz2.", "_bz2.", "libz.", "libexpat.",
)  # fmt: skip
#: Slots are numbered by 32 bits (store/record.py).
_MOST_SWAP_BYTES: Final = PAGE_BYTES << 32


@dataclass(frozen=True, slots=True)
class Options:
    """What to mount, and how. `backing` None: pages stay in RAM. Sizes as text are resolved here."""

    mountpoint: Path
    swap_bytes: int
    pool_max: str = "25%"
    backing: Path | None = None
    backing_max: str = "max"
    codec: str = "lz4"
    datapath: Literal["relay", "pyfuse3"] = "relay"


def check(options: Options) -> None:
    """Raise BadValue, OutOfRange, Refused or Busy for what `serve` would stumble over; changes nothing."""
    _check_values(options)
    require_root()
    if not FUSE_DEVICE.exists():
        raise Refused(f"{FUSE_DEVICE} is not there: load the fuse module (modprobe fuse)")
    _check_mountpoint(options.mountpoint)
    if options.backing is not None:
        check_backing(options.backing)


def serve(options: Options, ready: Callable[[], None], make_pager: MakePager = Pager) -> None:
    """Mount and serve until unmounted; `ready` is called once the mount answers. Raises what `check` raises.

    `make_pager` is for those who record what a pager is asked.
    """
    check(options)
    outcomes = _prepare_process()
    tier = FileTier(options.backing) if options.backing else MemoryTier(0)
    try:
        services = _build(options, tier, outcomes, make_pager)
        _Server(options, services, ready).run()
    finally:
        tier.close()


def _check_values(options: Options) -> None:
    size = options.swap_bytes
    if size <= 0 or size % PAGE_BYTES:
        raise BadValue(f"a swap of {size} bytes is not a positive multiple of the page ({PAGE_BYTES}): give for example 8G")
    if size > _MOST_SWAP_BYTES:
        raise BadValue(f"a swap of {size} bytes has more than 2^32 pages: give at most {_MOST_SWAP_BYTES}")
    parse_codec(options.codec)
    parse_pool_max(options.pool_max, memory.total_ram_bytes())
    parse_size(options.backing_max, 1 << 60)


def _check_mountpoint(mountpoint: Path) -> None:
    if is_mounted(mountpoint):
        raise Busy(f"{mountpoint} is taken by a mount: run 'tmemfs down {mountpoint}' first, or give another mountpoint")
    if not mountpoint.is_dir():
        raise Refused(f"{mountpoint} is not a directory: create it (mkdir -p {mountpoint})")
    if any(mountpoint.iterdir()):
        raise Refused(f"{mountpoint} is not empty: give an empty directory")


def _prepare_process() -> dict[str, int]:
    """Memory settings of the whole process; which of them were had."""
    threading.stack_size(_STACK_BYTES)
    sys.setswitchinterval(_SWITCH_S)
    tried = [memory.heap_settings(), memory.io_flusher(), memory.oom_score_adjust(), memory.realtime(), memory.freeze_garbage()]
    return _noted(tried)


def _noted(tried: list[memory.Outcome]) -> dict[str, int]:
    for outcome in tried:
        if not outcome.ok:
            log.info("%s was not had (%s): see tmemfs doctor", outcome.name, outcome.detail)
    return {outcome.name: int(outcome.ok) for outcome in tried}


def _build(options: Options, tier: Tier, outcomes: dict[str, int], make_pager: MakePager) -> Services:
    """The parts, from the bottom up, their regions locked."""
    ram = memory.total_ram_bytes()
    pool_bytes = parse_pool_max(options.pool_max, ram)
    backing_bytes = parse_size(options.backing_max, tier.capacity_bytes)
    frames = min(ram, options.swap_bytes + options.swap_bytes // 8) // SEGMENT_BYTES + 64
    extents = options.swap_bytes * 2 // SEGMENT_BYTES + 64
    if isinstance(tier, FileTier) and tier.is_device:
        extents = min(extents, tier.capacity_bytes // SEGMENT_BYTES)
    locked = [memory.lock_current()]
    memory.drop_code(_NEVER_CALLED)
    arena = Arena(frames, pool_bytes // SEGMENT_BYTES, spare=SPARE_FRAMES, kept=KEPT_FRAMES)
    slots, segments = SlotTable(options.swap_bytes // PAGE_BYTES), SegmentTable(frames + extents)
    locked += [memory.lock_region(region.map, region.size_bytes) for region in (slots.region, segments.region)]
    locked += [memory.lock_on_fault(arena.region.map, arena.region.size_bytes)]
    memory.populate(arena.region.map, 0, KEPT_FRAMES * SEGMENT_BYTES)
    outcomes["memory_locked"] = int(all(outcome.ok for outcome in locked))
    tmem = Tmem(slots, segments, arena, Extents(extents, backing_bytes, CLEANING_RESERVE_BYTES))
    engine = Engine.over(tmem, tier, parse_codec(options.codec), make_pager)
    pressure = Pressure(tmem, engine.shrinker, engine.reader)
    return Services(engine, Limits(engine, ram, backing_bytes), pressure, options.datapath, outcomes)


class _Server:
    """One mount, from mount(2) to its end."""

    def __init__(self, options: Options, services: Services, ready: Callable[[], None]) -> None:
        self._mountpoint = options.mountpoint
        self._datapath = options.datapath
        self._services = services
        self._ready = ready
        self._namespace = Namespace(services.engine.pager, Control(services).attributes, self._space)

    def run(self) -> None:
        """Serve until unmounted."""
        if self._datapath == "relay":
            self._run_relay()
        else:
            options = _fuse_options("fsname=tmemfs", "subtype=tmemfs", "allow_other")
            pyfuse3.init(self._namespace, os.fspath(self._mountpoint), options)
            self._note_lock(memory.lock_future())
            self._run_pyfuse3()

    def _run_relay(self) -> None:
        device = mount_fuse(self._mountpoint)
        try:
            relay = Relay(device, self._services.engine.pager, SWAP)
            self._note_lock(memory.lock_region(relay.buffers.map, relay.buffers.size_bytes))
            self._services.request_counts = relay.statistics
            pyfuse3.init(self._namespace, f"/dev/fd/{relay.namespace_fd}", _fuse_options())
            self._note_lock(memory.lock_future())  # before the first thread starts
            relay.start()
            try:
                self._run_pyfuse3(relay.wait_ended)
            finally:
                self._unmount_at_last()
                self._services.engine.room.set_stuck("the file system was unmounted")  # nobody makes room any more
                relay.join()
                relay.close()
        finally:
            os.close(device)

    def _note_lock(self, outcome: memory.Outcome) -> None:
        """Memory is locked only if all of it is."""
        self._services.outcomes["memory_locked"] &= int(outcome.ok)

    def _run_pyfuse3(self, ended: Callable[[], Awaitable[None]] = trio.sleep_forever) -> None:
        """Serve until pyfuse3 is told of the unmount, or `ended` returns."""
        self._services.engine.pager.warm(REQUESTS_UNDER_WAY, REQUEST_PAGES)
        try:
            with log_in_background(), no_boost() as is_off:
                self._services.outcomes["watermark_boost_off"] = int(is_off)
                trio.run(self._main, ended)
        finally:
            pyfuse3.close(unmount=self._datapath != "relay")

    async def _main(self, ended: Callable[[], Awaitable[None]]) -> None:
        async with trio.open_nursery() as nursery:

            async def until(end: Callable[[], Awaitable[None]]) -> None:
                await end()
                nursery.cancel_scope.cancel()

            nursery.start_soon(self._services.engine.run)
            nursery.start_soon(self._services.pressure.run)
            nursery.start_soon(self._obey_signals)
            nursery.start_soon(self._announce)
            nursery.start_soon(until, ended)
            nursery.start_soon(until, pyfuse3.main)

    async def _announce(self) -> None:
        """Say that the mount is there, once it answers."""
        await trio.to_thread.run_sync(os.stat, self._mountpoint / "control")
        log.info("serving %s", self._mountpoint)
        notify("READY=1")
        self._ready()

    async def _obey_signals(self) -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async for number in signals:
                name = signal.Signals(number).name
                await self._stop(name)

    async def _stop(self, name: str) -> None:
        """Unmount, if nobody uses the image."""
        devices = await trio.to_thread.run_sync(loop_devices_of, self._mountpoint / "swap")
        if devices:
            log.error("%s: not stopping, %s uses the image: run 'tmemfs down %s'", name, " ".join(devices), self._mountpoint)
            return
        self._services.is_draining = True
        notify("STOPPING=1")
        try:
            await trio.to_thread.run_sync(unmount, self._mountpoint)
        except OSError as error:
            self._services.is_draining = False
            log.error("%s: not stopping, %s (%s): close what has files open there", name, self._mountpoint, error.strerror)

    def _unmount_at_last(self) -> None:
        """After a failure the mount must not be left behind, dead."""
        with suppress(OSError):
            unmount(self._mountpoint, lazy=True)

    def _space(self) -> tuple[int, int]:
        size = self._services.engine.pager.swap_bytes
        return size, size - self._services.engine.tmem.pages_stored * PAGE_BYTES


def _fuse_options(*more: str) -> set[str]:
    """pyfuse3's defaults, without the checks that the kernel does for us."""
    return (set(pyfuse3.default_options) | set(more)) - {"fsname=pyfuse3"}
