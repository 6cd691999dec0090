"""The worker: the composition root of the process that serves a mount. Builds the parts over what the supervisor holds, and serves.

    Holdings                                 regions, device and tier, of the supervisor (holdings.py)
    SlotTable, SegmentTable, Arena, Extents  over the regions
    Engine                                   the store, recovered from them, the page path's pager, the jobs (engine.py)
    KernelTuning, Pressure, Limits, Latency  what steers them
    Relay                                    the page path, on /dev/fuse
    Services, Control, Namespace             control files, by pyfuse3
    Shutdown                                 signals of the process

It may be killed at any instruction: the supervisor forks another one over the same regions. What it took with it is built again
from them, or was no more than figures.

The order of construction is what makes memory safety hold. `prepare_worker` comes first, while there is memory: everything to come
is locked, what is shared with the supervisor is copied, the regions are locked, stacks and heap are faulted in. What follows may be
done when no memory is free and nobody serves the swap.

Nothing but the unmount ends a worker that has answered once: not a failed job (jobs/supervision.py), and not a signal while the
image is in use (shutdown.py).
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

import trio

from tmemfs.control import ControlDirectory
from tmemfs.engine import Engine, MakePager
from tmemfs.errors import NO_THREADS, Refused
from tmemfs.fuse.handling import Handling
from tmemfs.fuse.interrupts import Interrupts
from tmemfs.fuse.kept_requests import KeptRequests
from tmemfs.fuse.library import pyfuse3
from tmemfs.fuse.namespace import SWAP, Namespace
from tmemfs.fuse.page_path import Inheritance
from tmemfs.fuse.relay import Relay
from tmemfs.fuse.wire import REQUEST_PAGES, REQUESTS_UNDER_WAY
from tmemfs.holdings import Geometry, Holdings, Regions
from tmemfs.jobs.kernel_tuning import KernelTuning
from tmemfs.jobs.latency import Latency
from tmemfs.jobs.limits import Limits
from tmemfs.jobs.pressure import Pressure
from tmemfs.jobs.pulse import Pulse
from tmemfs.jobs.single_pages import SinglePages
from tmemfs.jobs.supervision import Job, Jobs, first_error
from tmemfs.options import Options
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
from tmemfs.system.own_mount import loops_of_own
from tmemfs.system.posix_signals import SignalInbox
from tmemfs.system.status_region import HANDLING, HAS_ANSWERED, Word
from tmemfs.system.swap_watch import SwapWatch
from tmemfs.tiers.tier import Tier
from tmemfs.tiers.watched import WatchedTier
from tmemfs.units import PAGE_BYTES, SEGMENT_BYTES

log = logging.getLogger(__name__)

#: At least as many as a worker has.
_THREADS: Final = 24
#: Between two runs of an event loop that fails.
_EVENT_LOOP_PAUSE_S: Final = 1.0
#: pyfuse3 and the relay learn of the unmount within milliseconds of each other.
_UNMOUNT_SEEN_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class Parts:
    """What is built over regions and tier, and serves a mount."""

    engine: Engine
    tuning: KernelTuning
    pressure: Pressure
    limits: Limits
    safety: MemorySafety


@dataclass(frozen=True, slots=True)
class Birth:
    """What the supervisor tells a worker: who it is, how many workers there were, and how many of them died of which request.

    `last_words` are the stacks of the one before, if it left them. `news`: what came of an upgrade, if that is why it was started.
    """

    supervisor: int
    generation: int
    suspects: Mapping[int, int] = field(default_factory=dict)
    last_words: str = ""
    news: str = ""

    def encode(self) -> bytes:
        """As JSON."""
        return json.dumps({**asdict(self), "suspects": list(self.suspects.items())}).encode()

    @classmethod
    def decode(cls, text: bytes) -> Birth:
        """What `encode` has made `text` of."""
        fields = json.loads(text)
        return cls(**{**fields, "suspects": dict(fields["suspects"])})


class Left(Exception):
    """The worker has ended because it was asked to; the file system is mounted, and what waits there is the next worker's."""


def build(
    options: Options,
    tier: Tier,
    geometry: Geometry,
    regions: Regions,
    safety: MemorySafety,
    make_pager: MakePager,
    settings_user: int | None = None,
) -> Parts:
    """Build what is not of the mount. The store is recovered from `regions`; new ones are empty.

    `settings_user` is what earlier processes have changed settings of the machine with, if there were any.
    """
    slots = SlotTable(geometry.slots, regions.slots)
    segments = SegmentTable(geometry.frames + geometry.extents, regions.segments)
    limit = geometry.pool_bytes // SEGMENT_BYTES
    arena = Arena(geometry.frames, limit, regions.arena, spare=SPARE_FRAMES, kept=KEPT_FRAMES)
    extents = Extents(geometry.extents, geometry.backing_bytes, CLEANING_RESERVE_BYTES)
    make_tmem = partial(Tmem, slots, segments, arena, extents)
    engine = Engine.over(make_tmem, tier, parse_codec(options.codec), make_pager, regions.kept.keep)
    mountpoint = Path(os.path.realpath(options.mountpoint.parent)) / options.mountpoint.name  # the mount is ours: it is not asked
    tuning = KernelTuning(KernelSettings(held=settings_user), lambda: SwapWatch(mountpoint), options.kernel_tuning)
    pressure = Pressure(engine.tmem, engine.pool_size, engine.shrinker.counts, engine.notices.pressure, tuning)
    limits = Limits(engine.tmem, tier, engine.pool_size, engine.shrinker, geometry.ram_bytes, geometry.backing_bytes)
    return Parts(engine, tuning, pressure, limits, safety)


#: To be called once the mount answers.
Announce = Callable[[], None]
#: Prepares a process to be a worker.
PrepareWorker = Callable[[Holdings, MemorySafety], None]
#: Serves the mount of `holdings` in this process, until the unmount.
RunWorker = Callable[[Options, Holdings, MemorySafety, Birth, Announce], None]


def prepare_worker(holdings: Holdings, safety: MemorySafety) -> None:
    """Have in this process, which was forked, the memory that a worker of `holdings` needs, as far as that can be known before.

    To be called while another worker serves, or before the mount is used.
    """
    inherited = memory.private_areas()
    safety.note_lock(memory.lock_future())
    safety.note_lock(memory.lock_private(inherited))
    holdings.regions.lock(safety)
    for region in (holdings.requests, holdings.status, holdings.kept_settings):
        safety.note_lock(memory.lock_region(region.map, region.size_bytes))
    try:
        memory.rehearse_threads(_THREADS)
    except RuntimeError as error:
        raise Refused(NO_THREADS.format(error)) from error
    memory.rehearse_heap()


def run_worker(
    options: Options,
    holdings: Holdings,
    safety: MemorySafety,
    birth: Birth,
    announce: Announce,
    make_pager: MakePager = Pager,
) -> None:
    """A RunWorker, after `prepare_worker`. `make_pager` is for those who record what a pager is asked."""
    signals = SignalInbox()
    signals.install()
    words = holdings.status.words
    tier = WatchedTier(holdings.tier, words, Word.TIER_BEGUN, Word.TIER_ENDED)
    parts = build(options, tier, holdings.geometry, holdings.regions, safety, make_pager, holdings.settings_user)
    safety.prefer_for_oom_killer(birth.supervisor)
    _Server(options, holdings, parts, birth, signals, announce).run()


class _Server:
    """One worker's service of the mount.

    Once the mount answers, nothing but the unmount ends it: jobs are supervised, and an event loop that fails is started again,
    for the pages are served by the relay's threads meanwhile. No thread is created from then on.
    """

    def __init__(
        self,
        options: Options,
        holdings: Holdings,
        parts: Parts,
        birth: Birth,
        signals: SignalInbox,
        announce: Announce,
    ) -> None:
        # constant after construction
        self._options = options
        self._mountpoint = options.mountpoint
        self._device = holdings.device
        self._status = holdings.status
        self._engine = parts.engine
        self._tuning = parts.tuning
        self._pressure = parts.pressure
        self._limits = parts.limits
        self._safety = parts.safety
        self._birth = birth
        self._announce_to = announce
        self._jobs = Jobs()
        self._interrupts = Interrupts()
        self._shutdown = Shutdown(self._mountpoint, birth.supervisor, signals, self._tuning.executor)
        self._single_pages = SinglePages(
            parts.engine.tmem.damage,
            self._tuning.executor,
            partial(loops_of_own, Path(self._mountpoint), birth.supervisor),
        )
        kept = KeptRequests(holdings.requests, not holdings.device.resends, SWAP)
        handling = Handling(self._status.words[HANDLING : HAS_ANSWERED + 1])
        inheritance = Inheritance(kept, handling, birth.suspects, birth.generation == 1)
        self._latency = Latency(options.latency)
        self._relay = Relay(self._device, self._engine.pager, SWAP, inheritance, self._interrupts, self._latency)
        self._control = self._build_control(holdings)
        # of the main thread
        self._is_ready = False

    def run(self) -> None:
        """Serve until unmounted. Raises Left if the worker was asked to end before."""
        relay = self._relay
        try:
            namespace = Namespace(self._control.attributes, self._space, self._interrupts, self._birth.generation)
            pyfuse3.init(namespace, f"/dev/fd/{relay.namespace_fd}", set(pyfuse3.default_options) - {"fsname=pyfuse3"})
            self._serve(relay, namespace)
        finally:
            if not self._is_leaving:
                # Nobody frees frames any more, and `join` waits for stores that wait for one.
                self._engine.free_frames.set_stuck("the file system was unmounted")
                if relay.is_over:
                    relay.join()

    @property
    def _is_leaving(self) -> bool:
        """Whether the worker ends with the file system mounted: no request is answered with an error then."""
        return self._shutdown.leaving.is_set()

    def _build_control(self, holdings: Holdings) -> ControlDirectory:
        """The control files."""
        services = Services(
            self._engine,
            self._limits,
            self._pressure,
            self._jobs,
            self._safety.outcomes,
            self._relay.statistics,
            self._shutdown.is_draining,
            self._status,
            self._birth.supervisor,
            self._latency,
        )
        return ControlDirectory(services, holdings.kept_settings)

    def _serve(self, relay: Relay, namespace: Namespace) -> None:
        """Serve until pyfuse3 or the relay is told of the unmount."""
        try:
            self._engine.pager.warm(REQUESTS_UNDER_WAY, REQUEST_PAGES)
            with log_in_background(self._options.log) as written:
                if self._birth.generation > 1:
                    written.follow()
                self._start_threads(relay)
                self._run_event_loop(relay, namespace, written)
        finally:
            self._engine.close()
            self._tuning.close()
            if not self._is_leaving:  # what pyfuse3 has in hand would be answered with an error
                pyfuse3.close(unmount=False)  # the socket that it has for a device is no mount

    def _start_threads(self, relay: Relay) -> None:
        try:
            self._tuning.start()
            self._engine.start()
            relay.start()
        except RuntimeError as error:
            raise Refused(NO_THREADS.format(error)) from error

    def _run_event_loop(self, relay: Relay, namespace: Namespace, written: Log) -> None:
        """Run trio until the file system is unmounted. Raises Left if this worker is asked to end."""
        while not relay.is_over:
            if self._is_leaving:
                log.info("worker %d has left", self._birth.generation)
                raise Left
            try:
                trio.run(self._main, relay, namespace, written)
            except BaseException as error:
                if not self._is_ready and self._birth.generation == 1:  # nobody uses the image yet, so the caller is told instead
                    raise first_error(error) from None
                log.critical("bug in tmemfs, please report it: the event loop failed and is started again", exc_info=error)
                time.sleep(_EVENT_LOOP_PAUSE_S)

    async def _main(self, relay: Relay, namespace: Namespace, written: Log) -> None:
        namespace.obey_interrupts()
        if not self._is_ready:
            await self._control.set_again()  # before the jobs: they would begin to shrink the pool to what the options say
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._jobs.run, self._jobs_of(relay, written))
            if not self._is_ready:
                nursery.start_soon(self._announce, relay)
            nursery.start_soon(self._leave, nursery.cancel_scope)
            await relay.wait_ended()
            nursery.cancel_scope.cancel()

    async def _leave(self, all_tasks: trio.CancelScope) -> None:
        """End the jobs when this worker is asked to leave; what they have in hand they finish (jobs/executor.py)."""
        await self._shutdown.leaving.wait()
        # First: the shrinker has stores refused that wait when it ends.
        self._engine.free_frames.leave_waiting()
        all_tasks.cancel()

    def _jobs_of(self, relay: Relay, written: Log) -> tuple[Job, ...]:
        return (
            *self._engine.jobs,
            Job("pressure", self._pressure.run),
            Job("single pages", self._single_pages.run),
            Job("kernel settings", self._tuning.run),
            Job("latency", partial(self._latency.run, relay.traffic)),
            Job("signals", partial(self._shutdown.obey_signals, written)),
            Job("pulse", Pulse(self._status.words, self._engine.tmem, relay.statistics).run),
            Job("namespace", self._serve_namespace, lambda why: relay.fail_forwarded()),
        )

    async def _serve_namespace(self) -> None:
        """Serve the control files."""
        await pyfuse3.main()
        await trio.sleep(_UNMOUNT_SEEN_S)  # both are told of the unmount, pyfuse3 perhaps first; the relay's word counts
        raise RuntimeError("pyfuse3 has ended though the file system is mounted")

    async def _announce(self, relay: Relay) -> None:
        """Say that the mount is there, once it answers."""
        # The mount itself is not asked. A process that is killed does not end before its request is answered, and who answers would
        # be the next worker, which is forked after this one has ended.
        if not await self._tuning.executor.run(relay.wait_answering) and self._birth.generation == 1:
            raise Refused(f"{self._mountpoint} does not answer: was it unmounted meanwhile?")
        self._is_ready = True  # from here on somebody may use the image, whether or not the caller learns of it
        self._status.words[Word.IS_SERVING] = 1
        self._say_who_died()
        log.info("serving %s", self._mountpoint)
        self._announce_to()

    def _say_who_died(self) -> None:
        """Log how the worker before this one ended: the supervisor writes no files while the mount is in use."""
        if self._birth.news:
            log.warning("worker %d has taken over: %s", self._birth.generation, self._birth.news)
        elif self._birth.generation > 1:
            log.error(
                "worker %d has taken over: %s",
                self._birth.generation,
                "; ".join(death.said for death in self._status.deaths()[-1:]),
            )
            if self._birth.last_words:
                log.error("where the last worker was:\n%s", self._birth.last_words)

    def _space(self) -> tuple[int, int]:
        size = self._engine.pager.swap_bytes
        return size, size - self._engine.tmem.pages_stored * PAGE_BYTES
