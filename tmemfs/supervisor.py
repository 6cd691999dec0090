"""The supervisor: the process that must not die. It holds what a mount consists of, and forks the worker that serves it.

    Holdings    /dev/fuse, regions, tier, status (holdings.py): made here, before the first worker
    Worker      a forked process (worker.py); if it ends otherwise than by an unmount, the next one is forked over the same holdings
    Watchdog    a worker that hangs is killed (watchdog.py)
    Refusing    workers that die one after the other, and answer nothing, are not followed by another: the mount answers errors

A worker is forked, not executed: everything it needs has been imported, so no file is read for it and little memory is needed while
the machine's swap stands still. The supervisor itself starts no thread, writes no file and does not log while the mount is in use:
its log may lie in the very swap that is not served. What it has to say is in the status region, and the next worker logs it.

Signals: SIGTERM, SIGINT, SIGQUIT and SIGHUP are the worker's to obey, and are passed on to it once it serves. All others are
ignored. SIGKILL ends the supervisor, and with it the worker (memory.end_with_parent) and all that is swapped out.

Invariants:
1. The regions stay mapped and locked here, so no page of the pool leaves RAM while no worker lives.
2. At most one worker lives at any time.
3. What was changed of the machine's settings is restored when the supervisor ends, whatever ended it.
"""

from __future__ import annotations

import errno
import faulthandler
import logging
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import closing, suppress
from importlib import import_module
from types import FrameType
from typing import Final, NoReturn

from tmemfs import __version__
from tmemfs.errors import Refused, TmemfsError
from tmemfs.fuse.handling import IDLE
from tmemfs.fuse.kept_requests import KeptRequests
from tmemfs.fuse.mount import Device, mount_fuse
from tmemfs.fuse.refusing import Refusing
from tmemfs.fuse.wire import RESENT
from tmemfs.holdings import Geometry, Holdings, Regions
from tmemfs.options import Options, check
from tmemfs.store.region import Region
from tmemfs.system import memory, runtime
from tmemfs.system.background import said_of
from tmemfs.system.kept_settings import KeptSettings
from tmemfs.system.kernel_settings import KernelSettings, held_user
from tmemfs.system.key import Key
from tmemfs.system.log import follow
from tmemfs.system.memory_safety import MemorySafety
from tmemfs.system.notify import notify
from tmemfs.system.posix_signals import REOPEN_LOG, STOP, ignore_others
from tmemfs.system.rlimits import raise_limits
from tmemfs.system.status_region import HANDLING, MOST_HANDLING, Cause, Death, State, StatusRegion, Word
from tmemfs.system.swapdev import unmount
from tmemfs.tiers.file import FileTier
from tmemfs.tiers.in_memory import MemoryTier
from tmemfs.tiers.tier import Tier
from tmemfs.watchdog import Signs, Watchdog
from tmemfs.worker import Birth, RunWorker, run_worker

log = logging.getLogger(__name__)

#: So many workers that answered nothing, within the time, and no other is forked.
_MOST_DEATHS: Final = 5
_DEATHS_WITHIN_S: Final = 60.0
#: The worker's status after an unmount, and after an error before its mount answered.
_UNMOUNTED: Final = 0
_FAILED: Final = 1
_READY: Final = b"\0ready"
_LONGEST_MESSAGE: Final = 4096
_LONGEST_DUMP: Final = 32 << 10
#: A worker that is told to dump its stacks has this long to do it. One that could not be reached by a signal does not.
_DUMP_S: Final = 0.5
_DUMP: Final = signal.SIGRTMAX
#: Between two attempts to fork, and after the second of several workers that answered nothing: four times as long after each more.
_FORK_PAUSE_S: Final = 0.1
_FRUITLESS_PAUSE_S: Final = 0.1
_MOST_LOOK_S: Final = 5.0


def serve(options: Options, ready: Callable[[], None], run: RunWorker = run_worker) -> None:
    """Mount and serve until unmounted; `ready` is called once the mount answers. Raises what `check` raises, and Refused.

    `run` is what a worker does, for those who have it do more.
    """
    check(options)
    raise_limits()
    safety = MemorySafety()
    safety.prepare_process()
    try:
        if options.encrypt and options.backing:
            # Before `lock_current`, which releases its library: what is used of that is touched, and stays, once the tier is made.
            import_module("tmemfs.tiers.encrypted")
        safety.lock_current()
        tier = _open_tier(options, safety)
        try:
            _serve(options, tier, safety, ready, run)
        finally:
            tier.close()
    except BaseException as error:
        follow(options.log)
        log.error("the daemon of %s has ended: %s", options.mountpoint, error)
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            raise Refused(said_of(error)) from error
        raise
    follow(options.log)
    log.info("the daemon of %s has ended: it was unmounted", options.mountpoint)


def _open_tier(options: Options, safety: MemorySafety) -> Tier:
    """Where segments go. Raises Refused, Busy."""
    if options.backing is None:
        return MemoryTier(0)
    tier = FileTier(options.backing)
    if not options.encrypt:
        return tier
    # Imported here: it costs 2 MB, which those who do not encrypt need not pay.
    from tmemfs.tiers.encrypted import EncryptedTier

    key = Key.create()
    safety.note_lock(key.lock)
    return EncryptedTier(tier, key)


def _serve(options: Options, tier: Tier, safety: MemorySafety, ready: Callable[[], None], run: RunWorker) -> None:
    geometry = Geometry.of(options, tier)
    regions = Regions.create(geometry)
    regions.lock(safety)
    path = runtime.status_path(options.mountpoint)
    with closing(StatusRegion.create(path)) as status:
        try:
            safety.note_lock(memory.lock_region(status.map, status.size_bytes))
            device = mount_fuse(options.mountpoint)
            try:
                requests = Region("requests", KeptRequests.region_bytes(keeps=not device.resends))
                safety.note_lock(memory.lock_region(requests.map, requests.size_bytes))
                safety.note_lock(memory.lock_future())
                kept = KeptSettings.create()
                safety.note_lock(memory.lock_region(kept.map, kept.size_bytes))
                holdings = Holdings(device, tier, geometry, regions, requests, status, held_user(), kept)
                Supervisor(options, holdings, safety, ready, run).run()
            finally:
                os.close(device.fd)
        finally:
            path.unlink(missing_ok=True)


class Supervisor:
    """Keeps a worker of `holdings` alive until the unmount; calls `ready` once the mount answers for the first time."""

    def __init__(
        self, options: Options, holdings: Holdings, safety: MemorySafety, ready: Callable[[], None], run: RunWorker
    ) -> None:
        # constant after construction
        self._options = options
        self._holdings = holdings
        self._device: Device = holdings.device
        self._status = holdings.status
        self._words = holdings.status.words
        self._safety = safety
        self._ready = ready
        self._run_worker = run
        self._pid = os.getpid()
        self._inbox = _Inbox()
        self._dump = os.memfd_create("tmemfs-stacks", os.MFD_CLOEXEC)
        self._unread = select.poll()
        self._unread.register(self._device.fd, select.POLLIN)
        # how many workers died of which request, and when those died that answered nothing
        self._suspects: dict[int, int] = {}
        self._fruitless: list[float] = []
        self._is_ready = False
        self._is_unmounted = False
        self._was_killed_for = ""

    def run(self) -> None:
        """Serve until unmounted. Raises Refused if the first worker cannot."""
        self._inbox.install()
        words = self._words
        words[Word.SUPERVISOR_PID] = self._pid
        self._status.set_version(__version__)
        words[Word.WATCHDOG_MS] = int(self._options.watchdog_s * 1000)
        try:
            while not self._is_unmounted:
                self._is_unmounted = self._serve_once()
                self._pause()
                if len(self._fruitless) >= _MOST_DEATHS:
                    self._refuse()
                    self._is_unmounted = True
        finally:
            words[Word.STATE] = State.ENDED
            self._unmount_at_last()
            self._restore_settings()

    # ---- one worker ------------------------------------------------------------------------------------------------

    def _serve_once(self) -> bool:
        """Fork a worker, and wait for its end; whether the file system was unmounted. Raises Refused."""
        words = self._words
        words[Word.IS_SERVING] = 0
        words[Word.STARTED_NS] = time.monotonic_ns()
        words[Word.GENERATION] += 1
        worker, ended, reader = self._fork(Birth(self._pid, words[Word.GENERATION], self._suspects, self._last_words()))
        words[Word.WORKER_PID] = worker
        words[Word.STATE] = State.SERVING if self._is_ready else State.STARTING
        try:
            status, said = self._wait(worker, ended, reader)
        finally:
            os.close(ended)
            os.close(reader)
        words[Word.WORKER_PID] = 0
        if os.WIFEXITED(status) and os.WEXITSTATUS(status) == _UNMOUNTED and self._is_disconnected():
            return True
        if not self._is_ready:
            raise Refused(said or f"the worker ended at once ({_why(status)}): see the log")
        self._note_death(worker, status)
        return False

    def _is_disconnected(self) -> bool:
        """Whether the file system is unmounted, whatever a worker says that has ended as if it were."""
        return any(event & select.POLLERR for _, event in self._unread.poll(0))

    def _fork(self, birth: Birth) -> tuple[int, int, int]:
        """Fork a worker; gives its process, a descriptor of that, and where it says that its mount answers.

        Raises OSError at the start.
        """
        while True:
            try:
                return self._try_fork(birth)
            except OSError:  # no memory, or no process is allowed: for the moment
                if not self._is_ready:
                    raise
            time.sleep(_FORK_PAUSE_S)

    def _try_fork(self, birth: Birth) -> tuple[int, int, int]:
        """As `_fork`. Raises OSError."""
        with suppress(OSError):
            sys.stdout.flush()  # what is in the buffer would be written by both
        reader, writer = os.pipe()
        try:
            worker = os.fork()
            if not worker:
                os.close(reader)
                self._become_worker(birth, writer)
            return worker, _watched(worker), reader
        except BaseException:
            os.close(reader)
            raise
        finally:
            os.close(writer)

    def _become_worker(self, birth: Birth, writer: int) -> NoReturn:
        """In the forked process: serve, say how that went, and end."""
        status = _FAILED
        try:
            signal.set_wakeup_fd(-1)
            memory.end_with_parent(self._pid)
            faulthandler.register(_DUMP, file=self._dump, all_threads=True)
            faulthandler.disable()  # where it was enabled before, its handlers have been replaced since
            faulthandler.enable(file=self._dump, all_threads=True)

            self._inbox.close()

            def announce() -> None:
                os.write(writer, _READY)
                os.close(writer)

            self._run_worker(self._options, self._holdings, self._safety, birth, announce)
            status = _UNMOUNTED
        except BaseException as error:
            if not isinstance(error, TmemfsError):
                traceback.print_exc()
            with suppress(OSError):
                os.write(writer, os.fsencode(said_of(error)))
        finally:
            with suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(status)

    def _wait(self, worker: int, ended: int, reader: int) -> tuple[int, str]:
        """Wait for the end of the worker; its status, and what it said before its mount answered."""
        said, watchdog = b"", Watchdog(time.monotonic())
        poll = select.poll()
        for fd in (ended, reader, self._inbox.fd):
            poll.register(fd, select.POLLIN)
        while True:
            events = {fd for fd, _ in poll.poll(self._look_s() * 1000)}
            if reader in events:
                poll.unregister(reader)  # it says one thing
                said = os.read(reader, _LONGEST_MESSAGE)
                if said == _READY:
                    self._answers()
            if ended in events:
                return os.waitpid(worker, 0)[1], os.fsdecode(said)
            self._inbox.drain()
            self._pass_signals_on(worker)
            self._watch(watchdog, worker)

    def _answers(self) -> None:
        """The mount answers. Tell the caller, the first time."""
        self._words[Word.STATE] = State.SERVING
        if self._is_ready:
            return
        self._is_ready = True
        notify("READY=1")
        try:
            self._ready()
        except OSError as error:
            mountpoint = self._options.mountpoint
            log.warning("nobody waits for the mount any more (%s): 'tmemfs umount %s' ends it", error.strerror, mountpoint)

    def _pass_signals_on(self, worker: int) -> None:
        """Before it serves it would not obey them: they stay in the inbox, and what it says once it serves wakes this process."""
        while self._words[Word.IS_SERVING] and (number := self._inbox.take()):
            with suppress(ProcessLookupError):
                os.kill(worker, number)

    # ---- a worker that hangs ---------------------------------------------------------------------------------------

    def _look_s(self) -> float:
        """How often to look at the worker."""
        limit_s = self._words[Word.WATCHDOG_MS] / 1000
        return min(limit_s / 8, _MOST_LOOK_S) if limit_s else _MOST_LOOK_S

    def _watch(self, watchdog: Watchdog, worker: int) -> None:
        """Kill the worker if it hangs."""
        words, now = self._words, time.monotonic()
        has_unread = bool(self._unread.poll(0))
        begun, ended = words[Word.TIER_BEGUN], words[Word.TIER_ENDED]
        watchdog.look(Signs(has_unread, self._status.handling(), words[Word.PULSE], begun, ended), now)
        words[Word.ANSWERED_NS] = int((now - watchdog.silent_s(now)) * 1e9)
        limit_s = words[Word.WATCHDOG_MS] / 1000
        if limit_s and watchdog.hangs(limit_s, now):
            self._was_killed_for = f"no request was answered for {watchdog.silent_s(now):.1f} s"
            self._dump_stacks(worker)
            with suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)

    def _dump_stacks(self, worker: int) -> None:
        """Have the worker write where its threads are, which the next one logs."""
        with suppress(ProcessLookupError):
            os.kill(worker, _DUMP)
            os.kill(worker, signal.SIGCONT)  # a stopped process takes no signal
        size, deadline = -1, time.monotonic() + _DUMP_S
        # Until it has begun, and does not grow any more.
        while time.monotonic() < deadline and (size <= 0 or size != os.fstat(self._dump).st_size):
            size = os.fstat(self._dump).st_size
            time.sleep(_DUMP_S / 10)

    def _last_words(self) -> str:
        """What the last worker dumped."""
        found = os.pread(self._dump, _LONGEST_DUMP, 0)
        os.ftruncate(self._dump, 0)
        os.lseek(self._dump, 0, os.SEEK_SET)
        return found.decode(errors="replace")

    # ---- a worker that died ----------------------------------------------------------------------------------------

    def _note_death(self, worker: int, status: int) -> None:
        """Count why it died, and what it died of."""
        words, hung = self._words, self._was_killed_for
        self._was_killed_for = ""
        is_killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL and not hung
        how = f"was killed, as {hung}" if hung else _why(status)
        said = f"worker {words[Word.GENERATION]} (process {worker}) {how}"
        cause = Cause.HUNG if hung else Cause.KILLED if is_killed else Cause.CRASHED
        self._status.add_death(Death(time.monotonic_ns(), cause, said))
        handled = self._status.handling()
        if not is_killed:  # whoever kills a worker from outside says nothing of its request
            for unique in {word & ~RESENT for word in handled if word and not word & IDLE}:
                self._suspects[unique] = self._suspects.get(unique, 0) + 1
        self._note_fruitless(handled, is_killed)
        # It took the calls of the tier with it that were under way: the next one would seem to wait for them.
        for at in (Word.TIER_BEGUN, Word.TIER_ENDED, *range(HANDLING, HANDLING + MOST_HANDLING)):
            words[at] = 0

    def _note_fruitless(self, handled: tuple[int, ...], is_killed: bool) -> None:
        """Remember the death of a worker that answered nothing, unless it was killed with nothing to answer.

        One that answered makes up for all.
        """
        now = time.monotonic()
        if any(word & IDLE and word != IDLE for word in handled):
            self._fruitless.clear()
            return
        had_requests = self._unread.poll(0) or any(word and not word & IDLE for word in handled)
        if not is_killed or not self._words[Word.IS_SERVING] or had_requests:
            self._fruitless = [at for at in self._fruitless if now - at < _DEATHS_WITHIN_S] + [now]

    def _pause(self) -> None:
        """The longer the more workers died in vain: what they lack, threads for example, may be there in a moment."""
        if 1 < len(self._fruitless) < _MOST_DEATHS:
            time.sleep(_FRUITLESS_PAUSE_S * 4 ** (len(self._fruitless) - 2))

    # ---- the end ---------------------------------------------------------------------------------------------------

    def _refuse(self) -> None:
        """Workers cannot serve this mount: answer errors, so that nobody hangs, until it is unmounted."""
        self._words[Word.STATE] = State.GAVE_UP
        self._restore_settings()
        log.critical("%d workers died within a minute and answered nothing: the mount answers errors from now on", _MOST_DEATHS)
        Refusing(self._device, self._holdings.requests).run(self._inbox.fd, self._stop)

    def _stop(self) -> None:
        """A signal while the mount answers errors."""
        self._inbox.drain()
        while number := self._inbox.take():
            if number in STOP:
                with suppress(OSError):
                    unmount(self._options.mountpoint)

    def _unmount_at_last(self) -> None:
        """After a failure the mount must not be left behind, dead; where it was unmounted, what is there by now is not ours."""
        if not self._is_unmounted:
            with suppress(OSError):
                unmount(self._options.mountpoint, lazy=True)

    def _restore_settings(self) -> None:
        """Restore what a worker that was killed has left changed. What fails, `tmemfs down` tries again."""
        with suppress(TmemfsError, OSError), closing(KernelSettings(held=self._holdings.settings_user)) as settings:
            settings.release()
            settings.restore_leftovers()
            settings.drop_held()


class _Inbox:
    """Signals that have arrived and were not passed on, each once; `fd` is readable after one has arrived."""

    def __init__(self) -> None:
        self._arrived: list[int] = []
        self.fd, self._wake = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def install(self) -> None:
        """Take over all signals of the process."""
        taken = {*STOP, REOPEN_LOG}
        for number in taken:
            signal.signal(number, self._note)
        ignore_others(taken)
        signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)

    def close(self) -> None:
        """Close its descriptors, in a process that has signals of its own."""
        os.close(self.fd)
        os.close(self._wake)

    def drain(self) -> None:
        """Have `fd` readable again only after the next signal."""
        with suppress(BlockingIOError):
            while os.read(self.fd, 64):
                pass

    def take(self) -> int | None:
        """The first signal that has arrived, None if there is none."""
        return self._arrived.pop(0) if self._arrived else None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number not in self._arrived:
            self._arrived.append(number)


def _watched(worker: int) -> int:
    """A descriptor of the process, which must not live without one. Raises OSError."""
    try:
        return os.pidfd_open(worker)
    except OSError:
        os.kill(worker, signal.SIGKILL)
        os.waitpid(worker, 0)
        raise


def _why(status: int) -> str:
    """How a process with wait status `status` ended."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        # Most real-time signals are no member of signal.Signals.
        return f"was ended by {signal.Signals(number).name if number in set(signal.Signals) else f'signal {number}'}"
    return f"ended with {os.WEXITSTATUS(status)}"
