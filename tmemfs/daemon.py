"""The daemon: the composition root. Builds the parts from the bottom up, mounts, and serves until it is unmounted.

    options                                  what to serve, and whether it can (options.py)
    MemorySafety                             the process (system/memory_safety.py)
    Tier                                     RAM alone, or a file or device
    SlotTable, SegmentTable, Arena, Extents  the regions, locked
    Engine                                   the store over them, the page path's pager, the jobs (engine.py)
    KernelTuning, Pressure, Limits           what steers them
    Relay                                    the page path, on /dev/fuse
    Services, Control, Namespace             control files, by pyfuse3
    Shutdown                                 signals of the process

The order of construction is what makes memory safety hold: heap settings and stack size, the tier, what is mapped so far is locked,
then the regions (slots, segments and requests are locked whole, the arena as it is touched), then everything to come.

Nothing but the unmount ends a daemon that has answered once: not a failed job (jobs/supervision.py), and not a signal while the
image is in use (shutdown.py).
"""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import trio

from tmemfs.control import ControlDirectory
from tmemfs.engine import Engine, MakePager
from tmemfs.errors import NO_THREADS, Refused
from tmemfs.fuse.interrupts import Interrupts
from tmemfs.fuse.library import pyfuse3
from tmemfs.fuse.mount import mount_fuse
from tmemfs.fuse.namespace import SWAP, Namespace
from tmemfs.fuse.relay import Relay
from tmemfs.fuse.wire import REQUEST_PAGES, REQUESTS_UNDER_WAY
from tmemfs.jobs.kernel_tuning import KernelTuning
from tmemfs.jobs.limits import Limits, parse_pool_max
from tmemfs.jobs.pressure import Pressure
from tmemfs.jobs.supervision import Job, Jobs, first_error
from tmemfs.options import Options, check, frames_and_extents
from tmemfs.pages.pager import Pager
from tmemfs.services import Services
from tmemfs.shutdown import Shutdown
from tmemfs.store.codec import parse_codec
from tmemfs.store.extents import CLEANING_RESERVE_BYTES, Extents
from tmemfs.store.frames import KEPT_FRAMES, SPARE_FRAMES, Arena
from tmemfs.store.segments import SegmentTable
from tmemfs.store.slots import SlotTable
from tmemfs.store.tmem import Tmem
from tmemfs.system import memory
from tmemfs.system.kernel_settings import KernelSettings
from tmemfs.system.log import Log, log_in_background
from tmemfs.system.memory_safety import MemorySafety
from tmemfs.system.notify import notify
from tmemfs.system.posix_signals import SignalInbox
from tmemfs.system.rlimits import raise_limits
from tmemfs.system.swap_watch import SwapWatch
from tmemfs.system.swapdev import unmount
from tmemfs.tiers.file import FileTier
from tmemfs.tiers.in_memory import MemoryTier
from tmemfs.tiers.tier import Tier
from tmemfs.units import PAGE_BYTES, SEGMENT_BYTES, parse_size

log = logging.getLogger(__name__)

#: Between two runs of an event loop that fails.
_EVENT_LOOP_PAUSE_S: Final = 1.0
#: pyfuse3 and the relay learn of the unmount within milliseconds of each other.
_UNMOUNT_SEEN_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class Parts:
    """What is built before the mount."""

    engine: Engine
    tuning: KernelTuning
    pressure: Pressure
    limits: Limits
    safety: MemorySafety


#: Mounts and serves parts until the unmount; calls its last argument once the mount answers.
ServeParts = Callable[[Options, Parts, Callable[[], None]], None]


def serve_by_relay(options: Options, parts: Parts, ready: Callable[[], None]) -> None:
    """Serve as a daemon does."""
    _Server(options, parts, ready).run()


def serve(
    options: Options, ready: Callable[[], None], make_pager: MakePager = Pager, serve_parts: ServeParts = serve_by_relay
) -> None:
    """Mount and serve until unmounted; `ready` is called once the mount answers. Raises what `check` raises.

    `make_pager` is for those who record what a pager is asked, `serve_parts` for those who compare the relay with something else.
    """
    check(options)
    raise_limits()
    safety = MemorySafety()
    safety.prepare_process()
    try:
        tier = FileTier(options.backing) if options.backing else MemoryTier(0)
        try:
            serve_parts(options, _build(options, tier, safety, make_pager), ready)
        finally:
            tier.close()
    except BaseException as error:
        log.error("the daemon of %s has ended: %s", options.mountpoint, error)
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            raise Refused(f"not enough files can be opened ({error.strerror}): raise RLIMIT_NOFILE (ulimit -n 64)") from error
        raise
    log.info("the daemon of %s has ended: it was unmounted", options.mountpoint)


def _build(options: Options, tier: Tier, safety: MemorySafety, make_pager: MakePager) -> Parts:
    """Build what is not of the mount."""
    ram = memory.total_ram_bytes()
    backing_bytes = parse_size(options.backing_max, tier.capacity_bytes)
    engine = _build_engine(options, tier, ram, backing_bytes, safety, make_pager)
    mountpoint = Path(os.path.realpath(options.mountpoint))  # before it is mounted: then asking would be asking ourselves
    tuning = KernelTuning(KernelSettings(), lambda: SwapWatch(mountpoint), options.kernel_tuning)
    pressure = Pressure(engine.tmem, engine.pool_size, engine.shrinker.counts, engine.notices.pressure, tuning)
    limits = Limits(engine.tmem, tier, engine.pool_size, engine.shrinker, ram, backing_bytes)
    return Parts(engine, tuning, pressure, limits, safety)


def _build_engine(
    options: Options, tier: Tier, ram: int, backing_bytes: int, safety: MemorySafety, make_pager: MakePager
) -> Engine:
    """The regions, locked, and the engine over them."""
    pool_bytes = parse_pool_max(options.pool_max, ram)
    frames, extents = frames_and_extents(options.swap_bytes, ram)
    if tier.most_extents is not None:
        extents = min(extents, tier.most_extents)
    safety.lock_current()
    arena = Arena(frames, pool_bytes // SEGMENT_BYTES, spare=SPARE_FRAMES, kept=KEPT_FRAMES)
    slots, segments = SlotTable(options.swap_bytes // PAGE_BYTES), SegmentTable(frames + extents)
    for region in (slots.region, segments.region):
        safety.note_lock(memory.lock_region(region.map, region.size_bytes))
    # The arena is larger than the pool may ever be, so its frames are locked as they are faulted in. The buffers of cleaning are
    # needed just when memory is short, so they are faulted in now.
    safety.note_lock(memory.lock_on_fault(arena.region.map, arena.region.size_bytes))
    memory.populate(arena.region.map, 0, KEPT_FRAMES * SEGMENT_BYTES)
    make_tmem = partial(Tmem, slots, segments, arena, Extents(extents, backing_bytes, CLEANING_RESERVE_BYTES))
    return Engine.over(make_tmem, tier, parse_codec(options.codec), make_pager)


class _Server:
    """One mount, from mount(2) to its end.

    Once the mount answers, nothing but the unmount ends it: jobs are supervised, and an event loop that fails is started again,
    for the pages are served by the relay's threads meanwhile. No thread is created from then on.
    """

    def __init__(self, options: Options, parts: Parts, ready: Callable[[], None]) -> None:
        # constant after construction
        self._options = options
        self._mountpoint = options.mountpoint
        self._engine = parts.engine
        self._tuning = parts.tuning
        self._pressure = parts.pressure
        self._limits = parts.limits
        self._safety = parts.safety
        self._ready = ready
        self._jobs = Jobs()
        self._interrupts = Interrupts()
        self._signals = SignalInbox()
        self._shutdown = Shutdown(self._mountpoint, self._signals, self._tuning.executor)
        # of the main thread
        self._relay: Relay | None = None
        self._is_ready = False

    def run(self) -> None:
        """Serve until unmounted."""
        self._signals.install()
        device = mount_fuse(self._mountpoint)
        try:
            relay = self._relay = Relay(device, self._engine.pager, SWAP, self._interrupts)
            try:
                self._safety.note_lock(memory.lock_region(relay.pages.buffers.map, relay.pages.buffers.size_bytes))
                namespace = self._build_namespace(relay.statistics)
                pyfuse3.init(namespace, f"/dev/fd/{relay.namespace_fd}", set(pyfuse3.default_options) - {"fsname=pyfuse3"})
                self._serve(relay, namespace)
            finally:
                self._unmount_at_last()
                # Nobody frees frames any more, and `join` waits for stores that wait for one.
                self._engine.free_frames.set_stuck("the file system was unmounted")
                relay.join()
                relay.close()
        finally:
            self._unmount_at_last()  # where not even the relay could be made
            os.close(device)

    def _build_namespace(self, request_counts: Callable[[], dict[str, int]]) -> Namespace:
        """The control files."""
        services = Services(
            self._engine,
            self._limits,
            self._pressure,
            self._jobs,
            self._safety.outcomes,
            request_counts,
            self._shutdown.is_draining,
        )
        return Namespace(ControlDirectory(services).attributes, self._space, self._interrupts)

    def _serve(self, relay: Relay, namespace: Namespace) -> None:
        """Serve until pyfuse3 or the relay is told of the unmount."""
        try:
            self._safety.note_lock(memory.lock_future())  # before the first thread starts
            self._engine.pager.warm(REQUESTS_UNDER_WAY, REQUEST_PAGES)
            with log_in_background(self._options.log) as written:
                self._start_threads(relay)
                self._run_event_loop(relay, namespace, written)
        finally:
            self._engine.close()
            self._tuning.close()
            pyfuse3.close(unmount=False)  # the socket that it has for a device is no mount

    def _start_threads(self, relay: Relay) -> None:
        try:
            self._tuning.start()
            self._engine.start()
            relay.start()
        except RuntimeError as error:
            raise Refused(NO_THREADS.format(error)) from error

    def _run_event_loop(self, relay: Relay, namespace: Namespace, written: Log) -> None:
        """Run trio until the file system is unmounted."""
        while not self._is_unmounted:
            try:
                trio.run(self._main, relay, namespace, written)
            except BaseException as error:
                if not self._is_ready:  # nobody uses the image yet, so the caller is told instead
                    raise first_error(error) from None
                log.critical("bug in tmemfs, please report it: the event loop failed and is started again", exc_info=error)
                time.sleep(_EVENT_LOOP_PAUSE_S)

    @property
    def _is_unmounted(self) -> bool:
        return self._relay is not None and self._relay.is_over

    async def _main(self, relay: Relay, namespace: Namespace, written: Log) -> None:
        namespace.obey_interrupts()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._jobs.run, self._jobs_of(relay, written))
            if not self._is_ready:
                nursery.start_soon(self._announce)
            await relay.wait_ended()
            nursery.cancel_scope.cancel()

    def _jobs_of(self, relay: Relay, written: Log) -> tuple[Job, ...]:
        return (
            *self._engine.jobs,
            Job("pressure", self._pressure.run),
            Job("kernel settings", self._tuning.run),
            Job("signals", partial(self._shutdown.obey_signals, written)),
            Job("namespace", self._serve_namespace, lambda why: relay.fail_forwarded()),
        )

    async def _serve_namespace(self) -> None:
        """Serve the control files."""
        await pyfuse3.main()
        await trio.sleep(_UNMOUNT_SEEN_S)  # both are told of the unmount, pyfuse3 perhaps first; the relay's word counts
        raise RuntimeError("pyfuse3 has ended though the file system is mounted")

    async def _announce(self) -> None:
        """Say that the mount is there, once it answers."""
        try:
            await self._tuning.executor.run(partial(os.stat, self._mountpoint / "control"))
        except OSError as error:
            raise Refused(f"{self._mountpoint} does not answer ({error.strerror}): was it unmounted meanwhile?") from error
        self._is_ready = True  # from here on somebody may use the image, whether or not the caller learns of it
        log.info("serving %s", self._mountpoint)
        notify("READY=1")
        try:
            self._ready()
        except OSError as error:
            log.warning("nobody waits for the mount any more (%s): 'tmemfs umount %s' ends it", error.strerror, self._mountpoint)

    def _unmount_at_last(self) -> None:
        """After a failure the mount must not be left behind, dead.

        Where it was unmounted already, what is mounted there by now is not ours.
        """
        if not self._is_unmounted:
            with suppress(OSError):
                unmount(self._mountpoint, lazy=True)

    def _space(self) -> tuple[int, int]:
        size = self._engine.pager.swap_bytes
        return size, size - self._engine.tmem.pages_stored * PAGE_BYTES
