"""The daemon: the composition root. Checks the options, builds the parts from the bottom up, serves until it is unmounted.

Order of construction, which is what makes memory safety hold: heap settings and stack size, tier, what is mapped so far locked,
then the regions (slots, segments and requests locked whole, the arena as it is touched), then everything to come.

SIGTERM, SIGINT and SIGQUIT unmount, unless the image is in use as swap or by a loop device: then the daemon says so and stays,
since its end would lose the pages in it. Other signals do not end it (system/posix_signals.py), nor does the failure of a job
(jobs/supervision.py).
"""

from __future__ import annotations

import errno
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, Literal

import trio

from tmemfs.control import ControlDirectory
from tmemfs.engine import Engine, MakePager
from tmemfs.errors import NO_THREADS, BadValue, Busy, Refused, TmemfsError
from tmemfs.fuse.interrupts import Interrupts
from tmemfs.fuse.library import pyfuse3
from tmemfs.fuse.mount import FUSE_DEVICE, mount_fuse
from tmemfs.fuse.namespace import SWAP, Namespace
from tmemfs.fuse.relay import Relay
from tmemfs.fuse.wire import REQUEST_PAGES, REQUESTS_UNDER_WAY
from tmemfs.jobs.kernel_tuning import Tuning, parse_tuning
from tmemfs.jobs.pressure import Pressure
from tmemfs.jobs.supervision import Job, Jobs, first_error
from tmemfs.pages.pager import Pager
from tmemfs.services import Limits, Services, parse_pool_max
from tmemfs.store.codec import parse_codec
from tmemfs.store.frames import KEPT_FRAMES, SPARE_FRAMES, Arena
from tmemfs.store.segments import CLEANING_RESERVE_BYTES, RECORD_BYTES, Extents, SegmentTable
from tmemfs.store.slots import SLOT_BYTES, SlotTable
from tmemfs.store.tmem import Tmem
from tmemfs.system import memory
from tmemfs.system.capabilities import require_root
from tmemfs.system.kernel_settings import KernelSettings
from tmemfs.system.limits import raise_limits
from tmemfs.system.log import Log, log_in_background
from tmemfs.system.notify import notify
from tmemfs.system.own_mount import loops_of_own, unmount_own
from tmemfs.system.posix_signals import REOPEN_LOG, SignalInbox
from tmemfs.system.swap_watch import SwapWatch
from tmemfs.system.swapdev import is_mounted, unmount
from tmemfs.tiers.file import FileTier, check_backing
from tmemfs.tiers.in_memory import MemoryTier
from tmemfs.tiers.tier import Tier
from tmemfs.units import MIB, PAGE_BYTES, SEGMENT_BYTES, format_size, parse_size

log = logging.getLogger(__name__)

#: FreeFrames for lz4's tables of 256 KiB, which it keeps on the stack, and for a few frames of C and Python.
_STACK_BYTES: Final = 512 << 10
#: How long a thread keeps the interpreter while another waits: a request should not wait for a report.
_SWITCH_S: Final = 0.0005
#: What imports of imports map, 6 MB of it: locking that would keep what nobody calls. LC_CTYPE is the locale's table of letters.
_NEVER_CALLED: Final = (
    "LC_CTYPE",
    "libcrypto.", "libssl.", "_ssl.", "_hashlib.", "liblzma.", "_lzma.", "libbz2.", "_bz2.", "libz.", "libexpat.",
)  # fmt: skip
#: Between two runs of an event loop that fails.
_EVENT_LOOP_PAUSE_S: Final = 1.0
#: pyfuse3 and the relay learn of the unmount within milliseconds of each other.
_UNMOUNT_SEEN_S: Final = 5.0
#: Slots are numbered by 32 bits (store/record.py).
_MOST_SWAP_BYTES: Final = PAGE_BYTES << 32


@dataclass(frozen=True, slots=True)
class Options:
    """What to mount, and how. `backing` None: pages stay in RAM. Sizes as text are resolved here.

    `log` is the file behind standard output, which SIGHUP opens again; None: it is no file of ours.
    """

    mountpoint: Path
    swap_bytes: int
    pool_max: str = "25%"
    backing: Path | None = None
    backing_max: str = "max"
    codec: str = "lz4"
    datapath: Literal["relay", "pyfuse3"] = "relay"
    log: Path | None = None
    kernel_tuning: str = "auto"


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
    raise_limits()
    outcomes = _prepare_process()
    try:
        tier = FileTier(options.backing) if options.backing else MemoryTier(0)
        try:
            services = _build(options, tier, outcomes, make_pager)
            _Server(options, services, ready).run()
        finally:
            tier.close()
    except BaseException as error:
        log.error("the daemon of %s has ended: %s", options.mountpoint, error)
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            raise Refused(f"not enough files can be opened ({error.strerror}): raise RLIMIT_NOFILE (ulimit -n 64)") from error
        raise
    log.info("the daemon of %s has ended: it was unmounted", options.mountpoint)


def _check_values(options: Options) -> None:
    size = options.swap_bytes
    if size <= 0 or size % PAGE_BYTES:
        raise BadValue(f"a swap of {size} bytes is not a positive multiple of the page ({PAGE_BYTES}): give for example 8G")
    if size > _MOST_SWAP_BYTES:
        raise BadValue(f"a swap of {size} bytes has more than 2^32 pages: give at most {_MOST_SWAP_BYTES}")
    _check_tables(size, memory.total_ram_bytes())
    parse_codec(options.codec)
    parse_pool_max(options.pool_max, memory.total_ram_bytes())
    parse_size(options.backing_max, 1 << 60)
    parse_tuning(options.kernel_tuning)


def _check_tables(swap_bytes: int, ram: int) -> None:
    """Raise BadValue where the tables, which are locked whole, would take more than an eighth of RAM."""
    frames, extents = _frames_and_extents(swap_bytes, ram)
    tables = swap_bytes // PAGE_BYTES * SLOT_BYTES + (frames + extents) * RECORD_BYTES
    if tables > ram // 8:
        most = swap_bytes * (ram // 8) // tables * 99 // 100  # part of the segment table does not grow with the size
        raise BadValue(
            f"a swap of {format_size(swap_bytes)} needs tables of {format_size(tables)}, more than an eighth of RAM "
            f"({format_size(ram)}): give a --size of at most {most // MIB}M"
        )


def _frames_and_extents(swap_bytes: int, ram: int) -> tuple[int, int]:
    """How many the segment table has to have records for."""
    return min(ram, swap_bytes + swap_bytes // 8) // SEGMENT_BYTES + 64, swap_bytes * 2 // SEGMENT_BYTES + 64


def _check_mountpoint(mountpoint: Path) -> None:
    if is_mounted(mountpoint):
        raise Busy(f"{mountpoint} is taken by a mount: run 'tmemfs down {mountpoint}' first, or give another mountpoint")
    try:
        if not mountpoint.is_dir():
            raise Refused(f"{mountpoint} is not a directory: create it (mkdir -p {mountpoint})")
        if any(mountpoint.iterdir()):
            raise Refused(f"{mountpoint} is not empty: give an empty directory")
    except OSError as error:
        raise Refused(f"cannot use {mountpoint} ({error.strerror}): give another mountpoint") from error


def _prepare_process() -> dict[str, int]:
    """Memory settings of the whole process; which of them were had."""
    threading.stack_size(_STACK_BYTES)
    sys.setswitchinterval(_SWITCH_S)
    tried = [
        memory.no_core_dump(),
        memory.heap_settings(),
        memory.io_flusher(),
        memory.oom_score_adjust(),
        memory.realtime(),
        memory.freeze_garbage(),
    ]
    return _noted(tried)


def _noted(tried: list[memory.Outcome]) -> dict[str, int]:
    for outcome in tried:
        if not outcome.ok:
            log.info("%s could not be enabled (%s): see tmemfs doctor", outcome.name, outcome.detail)
    return {outcome.name: int(outcome.ok) for outcome in tried}


def _build(options: Options, tier: Tier, outcomes: dict[str, int], make_pager: MakePager) -> Services:
    """The parts, from the bottom up, their regions locked."""
    ram = memory.total_ram_bytes()
    pool_bytes = parse_pool_max(options.pool_max, ram)
    backing_bytes = parse_size(options.backing_max, tier.capacity_bytes)
    frames, extents = _frames_and_extents(options.swap_bytes, ram)
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
    mountpoint = Path(os.path.realpath(options.mountpoint))  # before it is mounted: then asking would be asking ourselves
    tuning = Tuning(KernelSettings(), lambda: SwapWatch(mountpoint), options.kernel_tuning)
    pressure = Pressure(tmem, engine.shrinker, engine.reader, engine.pool_size, tuning)
    return Services(engine, Limits(engine, ram, backing_bytes), pressure, Jobs(), options.datapath, outcomes)


class _Server:
    """One mount, from mount(2) to its end.

    Once the mount answers, nothing but the unmount ends it: jobs are supervised, and an event loop that fails is started again,
    for the pages are served by the relay's threads meanwhile. No thread is created from then on.
    """

    def __init__(self, options: Options, services: Services, ready: Callable[[], None]) -> None:
        self._options = options
        self._mountpoint = options.mountpoint
        self._services = services
        self._ready = ready
        self._interrupts = Interrupts()
        self._namespace = Namespace(services.engine.pager, ControlDirectory(services).attributes, self._space, self._interrupts)
        self._signals = SignalInbox()
        self._executor = services.pressure.tuning.executor
        self._relay: Relay | None = None
        self._is_ready = False
        self._unmounted = trio.Event()

    def run(self) -> None:
        """Serve until unmounted."""
        self._signals.install()
        if self._options.datapath == "relay":
            self._run_relay()
        else:
            options = _fuse_options("fsname=tmemfs", "subtype=tmemfs", "allow_other")
            pyfuse3.init(self._namespace, os.fspath(self._mountpoint), options)
            self._serve()

    def _run_relay(self) -> None:
        device = mount_fuse(self._mountpoint)
        try:
            relay = self._relay = Relay(device, self._services.engine.pager, SWAP, self._interrupts)
            try:
                self._note_lock(memory.lock_region(relay.pages.buffers.map, relay.pages.buffers.size_bytes))
                self._services.request_counts = relay.statistics
                pyfuse3.init(self._namespace, f"/dev/fd/{relay.namespace_fd}", _fuse_options())
                self._serve()
            finally:
                self._unmount_at_last()
                self._services.engine.free_frames.set_stuck("the file system was unmounted")  # nobody makes room any more
                relay.join()
                relay.close()
        finally:
            self._unmount_at_last()  # where not even the relay could be made
            os.close(device)

    def _note_lock(self, outcome: memory.Outcome) -> None:
        """Memory is locked only if all of it is."""
        self._services.outcomes["memory_locked"] &= int(outcome.ok)

    def _serve(self) -> None:
        """Serve until pyfuse3 or the relay is told of the unmount."""
        try:
            self._note_lock(memory.lock_future())  # before the first thread starts
            self._services.engine.pager.warm(REQUESTS_UNDER_WAY, REQUEST_PAGES)
            with log_in_background(self._options.log) as written:
                self._start_threads()
                self._run_event_loop(written)
        finally:
            self._services.engine.close()
            self._services.pressure.tuning.close()
            pyfuse3.close(unmount=self._relay is None)

    def _start_threads(self) -> None:
        try:
            self._executor.start()
            self._services.engine.start()
            self._services.pressure.tuning.start()
            if self._relay is not None:
                self._relay.start()
            else:
                self._namespace.start()
        except RuntimeError as error:
            raise Refused(NO_THREADS.format(error)) from error

    def _run_event_loop(self, written: Log) -> None:
        """Run trio until the file system is unmounted."""
        while not self._is_unmounted:
            try:
                trio.run(self._main, written)
            except BaseException as error:
                if not self._is_ready:
                    raise first_error(error) from None
                log.critical("bug in tmemfs, please report it: the event loop failed and is started again", exc_info=error)
                time.sleep(_EVENT_LOOP_PAUSE_S)

    @property
    def _is_unmounted(self) -> bool:
        return self._unmounted.is_set() or (self._relay is not None and self._relay.is_over)

    async def _main(self, written: Log) -> None:
        self._namespace.obey_interrupts()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._services.jobs.run, self._jobs(written))
            if not self._is_ready:
                nursery.start_soon(self._announce)
            await (self._unmounted.wait() if self._relay is None else self._relay.wait_ended())
            nursery.cancel_scope.cancel()

    def _jobs(self, written: Log) -> tuple[Job, ...]:
        return (
            *self._services.engine.jobs,
            Job("pressure", self._services.pressure.run),
            Job("kernel settings", self._services.pressure.tuning.run),
            Job("signals", partial(self._obey_signals, written)),
            Job("namespace", self._serve_namespace, self._fail_namespace),
        )

    async def _serve_namespace(self) -> None:
        """Serve the control files, and on the plain data path the image."""
        await pyfuse3.main()
        if self._relay is None:
            self._unmounted.set()
            return
        await trio.sleep(_UNMOUNT_SEEN_S)  # both are told of the unmount, pyfuse3 perhaps first; the relay's word counts
        raise RuntimeError("pyfuse3 has ended though the file system is mounted")

    def _fail_namespace(self, why: str) -> None:
        if self._relay is not None:
            self._relay.fail_forwarded()

    async def _announce(self) -> None:
        """Say that the mount is there, once it answers."""
        try:
            await self._executor.run(partial(os.stat, self._mountpoint / "control"))
        except OSError as error:
            raise Refused(f"{self._mountpoint} does not answer ({error.strerror}): was it unmounted meanwhile?") from error
        self._is_ready = True  # from here on somebody may use the image, whether or not the caller learns of it
        log.info("serving %s", self._mountpoint)
        notify("READY=1")
        try:
            self._ready()
        except OSError as error:
            log.warning("nobody waits for the mount any more (%s): 'tmemfs umount %s' ends it", error.strerror, self._mountpoint)

    async def _obey_signals(self, written: Log) -> None:
        while True:
            number = await self._signals.receive()
            if number == REOPEN_LOG:
                written.reopen()
            else:
                await self._stop(number.name)

    async def _stop(self, name: str) -> None:
        """Unmount, if nobody uses the image; say why not otherwise."""
        try:
            await self._executor.run(partial(self._unmount_if_unused, name))
        except TmemfsError as error:
            self._services.is_draining = False
            log.error("%s: not stopping, %s", name, error)

    def _unmount_if_unused(self, name: str) -> None:
        """In a thread: what it reads of the machine may ask the daemon itself. Raises Busy."""
        devices = loops_of_own(self._mountpoint)
        if devices:
            raise Busy(f"{' '.join(devices)} uses the image: run 'tmemfs down {self._mountpoint}'")
        self._services.is_draining = True
        notify("STOPPING=1")
        try:
            unmount_own(self._mountpoint)
        except OSError as error:
            raise Busy(f"{self._mountpoint} ({error.strerror}): close what has files open there") from error
        log.info("%s: stopping", name)

    def _unmount_at_last(self) -> None:
        """After a failure the mount must not be left behind, dead.

        Where it was unmounted already, what is mounted there by now is not ours.
        """
        if not self._is_unmounted:
            with suppress(OSError):
                unmount(self._mountpoint, lazy=True)

    def _space(self) -> tuple[int, int]:
        size = self._services.engine.pager.swap_bytes
        return size, size - self._services.engine.tmem.pages_stored * PAGE_BYTES


def _fuse_options(*more: str) -> set[str]:
    """pyfuse3's defaults, without the checks that the kernel does for us."""
    return (set(pyfuse3.default_options) | set(more)) - {"fsname=pyfuse3"}
