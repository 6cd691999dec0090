"""The supervisor: the process that must not die. It holds what a mount consists of, and forks the worker that serves it.

    Holdings    /dev/fuse, regions, tier, status (holdings.py): made here, before the first worker
    Worker      a forked process (worker.py); if it ends otherwise than by an unmount, the next one is forked over the same holdings
    Watchdog    a worker that hangs is killed (watchdog.py)
    Handover    another version takes over, with another supervisor and another worker (handover.py, candidate.py)
    Refusing    workers that die one after the other, and answer nothing, are not followed by another: the mount answers errors

A worker is forked, not executed: everything it needs has been imported, so no file is read for it. It is forked as a spare, while
the one before it serves, so no memory is needed while the machine's swap stands still (forking.py). The supervisor itself starts no
thread, writes no file and does not log while the mount is in use: its log may lie in the very swap that is not served. What it has
to say is in the status region, and the next worker logs it.

Signals: SIGTERM, SIGINT, SIGQUIT and SIGHUP are the worker's to obey, and are passed on to it once it serves. All others are
ignored. SIGKILL ends the supervisor, and with it the worker (memory.end_with_parent) and all that is swapped out.

Invariants:
1. The regions stay mapped and locked here, so no page of the pool leaves RAM while no worker lives.
2. At most one worker lives at any time.
3. What was changed of the machine's settings is restored when the supervisor ends, whatever ended it.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from functools import partial
from typing import Final, NoReturn

from tmemfs import __version__
from tmemfs.backing import import_cipher, open_tier
from tmemfs.deaths import MOST_DEATHS_IN_A_ROW, Deaths, why
from tmemfs.errors import Refused, TmemfsError
from tmemfs.forking import LEFT, READY, UNMOUNTED, WorkerProcess, fork_spare, fork_worker
from tmemfs.fuse.kept_requests import KeptRequests
from tmemfs.fuse.mount import Device, mount_fuse
from tmemfs.fuse.refusing import Refusing
from tmemfs.handover import LEAVE_S, Handover, listen
from tmemfs.holdings import Geometry, Holdings, Regions
from tmemfs.manifest import Manifest
from tmemfs.options import Options, check
from tmemfs.store.region import Region
from tmemfs.system import memory, runtime
from tmemfs.system.background import said_of
from tmemfs.system.kept_settings import KeptSettings
from tmemfs.system.kernel_settings import KernelSettings, held_user
from tmemfs.system.last_words import LastWords
from tmemfs.system.log import follow
from tmemfs.system.memory_safety import MemorySafety
from tmemfs.system.notify import notify
from tmemfs.system.posix_signals import LEAVE, STOP, SignalPipe
from tmemfs.system.rlimits import raise_limits
from tmemfs.system.status_region import HANDLING, HAS_ANSWERED, State, StatusRegion, Word
from tmemfs.system.swapdev import unmount
from tmemfs.tiers.tier import Tier
from tmemfs.trial import Trial
from tmemfs.watchdog import Signs, Watchdog
from tmemfs.worker import Announce, Birth, Left, PrepareWorker, RunWorker, prepare_worker, run_worker

log = logging.getLogger(__name__)

#: After the second of several workers that answered nothing; four times as long after each more.
_FRUITLESS_PAUSE_S: Final = 0.1
_MOST_LOOK_S: Final = 5.0
#: A worker that is sent a signal obeys it within this time, or refuses.
_OBEYED_S: Final = 1.0
_SOON_S: Final = 0.05


def serve(options: Options, ready: Callable[[], None], run: RunWorker = run_worker) -> None:
    """Mount and serve until unmounted; `ready` is called once the mount answers. Raises what `check` raises, and Refused.

    `run` is what a worker does, for those who have it do more.
    """
    check(options)
    raise_limits()
    safety = MemorySafety()
    safety.prepare_process()
    with logged_end(options):
        import_cipher(options)
        safety.lock_current()
        tier, tier_fds = open_tier(options, safety)
        try:
            _serve(options, tier, tier_fds, safety, ready, run)
        finally:
            tier.close()


@contextmanager
def logged_end(options: Options) -> Iterator[None]:
    """Log how the daemon has ended, when the block ends. Raises Refused for what a user can do something about."""
    try:
        yield
    except BaseException as error:
        follow(options.log)
        log.error("the daemon of %s has ended: %s", options.mountpoint, error)
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            raise Refused(said_of(error)) from error
        raise
    follow(options.log)
    log.info("the daemon of %s has ended: it was unmounted", options.mountpoint)


def _serve(
    options: Options, tier: Tier, tier_fds: Mapping[str, int], safety: MemorySafety, ready: Callable[[], None], run: RunWorker
) -> None:
    geometry = Geometry.of(options, tier)
    regions = Regions.create(geometry)
    regions.lock(safety)
    path, upgrade_path = runtime.status_path(options.mountpoint), runtime.upgrade_path(options.mountpoint)
    try:
        with closing(StatusRegion.create(path)) as status:
            listener = listen(upgrade_path)
            safety.note_lock(memory.lock_region(status.map, status.size_bytes))
            device = mount_fuse(options.mountpoint)
            try:
                requests = Region("requests", KeptRequests.region_bytes(keeps=not device.resends))
                safety.note_lock(memory.lock_region(requests.map, requests.size_bytes))
                safety.note_lock(memory.lock_future())
                kept = KeptSettings.create()
                safety.note_lock(memory.lock_region(kept.map, kept.size_bytes))
                holdings = Holdings(device, tier, tier_fds, geometry, regions, requests, status, held_user(), kept)
                Supervisor(options, holdings, safety, listener, ready, run).run()
            finally:
                os.close(device.fd)
    finally:  # also where the status region could not be made whole
        path.unlink(missing_ok=True)
        upgrade_path.unlink(missing_ok=True)


class Supervisor:
    """Keeps a worker of `holdings` alive until the unmount; calls `ready` once the mount answers for the first time.

    At `listener` it is asked to hand over. One that has taken over itself is on `trial` at first, and undoes nothing until it has
    passed.
    """

    def __init__(
        self,
        options: Options,
        holdings: Holdings,
        safety: MemorySafety,
        listener: socket.socket,
        ready: Callable[[], None],
        run: RunWorker = run_worker,
        trial: Trial | None = None,
        prepare: PrepareWorker = prepare_worker,
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
        self._prepare_worker = prepare
        self._spare: WorkerProcess | None = None
        self._pid = os.getpid()
        self._inbox = SignalPipe()
        self._handover = Handover(listener, partial(Manifest.of, options, holdings), trial.news if trial else "")
        self._last_words = LastWords()
        self._unread = select.poll()
        self._unread.register(self._device.fd, select.POLLIN)
        self._deaths = Deaths(holdings.status)
        self._trial = trial
        #: The last signal that a worker was sent, and when.
        self._passed_on = 0, 0.0
        self._is_ready = trial is not None
        self._is_unmounted = False
        self._was_killed_for = ""
        #: When a worker that was asked to leave is killed; 0: it was not.
        self._leave_by = 0.0

    def run(self) -> None:
        """Serve until unmounted. Raises Refused if the first worker cannot."""
        self._inbox.install()
        if self._trial is None:
            self._status.sign(self._pid, __version__)
            self._words[Word.WATCHDOG_MS] = int(self._options.watchdog_s * 1000)
        try:
            while not self._is_unmounted:
                self._is_unmounted = self._serve_once()
                if self._handover.is_ready and not self._is_unmounted:
                    self._hand_over()
                elif self._deaths.are_too_many:
                    self._refuse()
                    self._is_unmounted = True
                else:
                    self._pause()
        finally:
            if self._spare is not None:
                self._spare.end()
            if self._trial is None:
                self._words[Word.STATE] = State.ENDED
                self._handover.close()
                self._unmount_at_last()
                self._restore_settings()

    # ---- one worker ------------------------------------------------------------------------------------------------

    def _serve_once(self) -> bool:
        """Fork a worker, and wait for its end; whether the file system was unmounted. Raises Refused."""
        words = self._words
        words[Word.IS_SERVING] = 0
        # The one before took with it what it handled, and its calls of the tier: the next one would seem to wait for them.
        for at in (Word.TIER_BEGUN, Word.TIER_ENDED, *range(HANDLING, HAS_ANSWERED + 1)):
            words[at] = 0
        words[Word.STARTED_NS] = time.monotonic_ns()
        words[Word.GENERATION] += 1
        birth = Birth(self._pid, words[Word.GENERATION], self._deaths.suspects, self._last_words.take(), self._handover.take_news())
        worker = self._start_worker(birth.encode())
        words[Word.WORKER_PID] = worker.pid
        words[Word.STATE] = State.SERVING if self._is_ready else State.STARTING
        try:
            status, said = self._wait(worker)
        finally:
            worker.close()
        words[Word.WORKER_PID] = 0
        code = os.waitstatus_to_exitcode(status)
        if self._trial is not None:
            self._trial.fail(": ".join(filter(None, (f"its worker {why(status)}", said))))
            self._trial = None
        if code == UNMOUNTED and self._is_disconnected():
            return True
        if not self._is_ready:
            raise Refused(said or f"the worker ended at once ({why(status)}): see the log")
        if code != LEFT and not self._leave_by:
            self._deaths.note(worker.pid, status, self._was_killed_for, said, bool(self._unread.poll(0)))
        self._leave_by, self._was_killed_for = 0.0, ""
        number, at = self._passed_on
        if number and time.monotonic() - at < _OBEYED_S:  # it died rather than obey
            self._inbox.put_back(number)
        self._passed_on = 0, 0.0
        return False

    def _is_disconnected(self) -> bool:
        """Whether the file system is unmounted, whatever a worker says that has ended as if it were."""
        return any(event & select.POLLERR for _, event in self._unread.poll(0))

    def _start_worker(self, told: bytes) -> WorkerProcess:
        """A worker that serves: the spare, if there is one. Raises OSError where the first one cannot be forked."""
        spare, self._spare = self._spare, None
        self._words[Word.SPARE_PID] = 0
        if spare is not None:
            if spare.start(told):
                return spare
            spare.end()
        while True:
            worker = fork_worker(self._prepare_child, self._run_child, is_first=not self._is_ready)
            if worker.start(told) or not self._is_ready:
                return worker
            worker.end()

    def keep_spare(self) -> None:
        """Have a worker ready for the death of the one that serves. Not when that has just died: this takes memory."""
        if self._spare is not None and self._spare.has_ended:
            self._spare.end()
            self._spare = None
        if self._spare is None:
            self._words[Word.SPARE_PID] = 0
            with suppress(OSError), self._safety.ordinary_priority():
                self._spare = fork_spare(self._prepare_child, self._run_child)

    def _prepare_child(self) -> None:
        """In the forked process: get ready to be a worker."""
        signal.set_wakeup_fd(-1)
        try:
            memory.end_with_parent(self._pid)
        except ProcessLookupError as error:  # its end has been reported already
            raise Left from error
        self._inbox.close()
        self._prepare_worker(self._holdings, self._safety)
        if self._trial is None:  # on trial, the status region is still another supervisor's
            self._words[Word.SPARE_PID] = os.getpid()

    def _run_child(self, told: bytes, announce: Announce) -> None:
        """In the forked process: be a worker."""
        self._safety.restore_priority()
        self._last_words.listen()
        self._run_worker(self._options, self._holdings, self._safety, Birth.decode(told), announce)

    def _wait(self, worker: WorkerProcess) -> tuple[int, str]:
        """Wait for the end of the worker; its status, and what it said before its mount answered."""
        said, watchdog = b"", Watchdog(time.monotonic())
        poll = select.poll()
        for fd in (worker.ended, worker.reader, self._inbox.fd, *((self._handover.fd,) if self._is_ready else ())):
            poll.register(fd, select.POLLIN)
        while True:
            events = {fd for fd, _ in poll.poll(self._look_s() * 1000)}
            if worker.reader in events:
                poll.unregister(worker.reader)
                said = worker.said()
                if said == READY:
                    said = b""
                    self._answers()
                    poll.register(self._handover.fd, select.POLLIN)
            if worker.ended in events:
                return os.waitpid(worker.pid, 0)[1], os.fsdecode(said)
            self._inbox.drain()
            self._pass_signals_on(worker.pid)
            self._watch(watchdog, worker.pid)
            self._step_handover(worker.pid)
            self._step_trial(watchdog)
            if self._words[Word.IS_SERVING]:
                self.keep_spare()

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
            self._passed_on = number, time.monotonic()
            with suppress(ProcessLookupError):
                os.kill(worker, number)

    # ---- another version -------------------------------------------------------------------------------------------

    def _step_handover(self, worker: int) -> None:
        """Do what there is to do for a handover: with a candidate that is ready, have the worker leave."""
        if not self._is_ready or self._trial is not None:
            return
        self._handover.step()
        self._words[Word.STATE] = State.UPGRADING if self._handover.is_under_way else State.SERVING
        now = time.monotonic()
        with suppress(ProcessLookupError):
            if self._leave_by and now > self._leave_by:
                os.kill(worker, signal.SIGKILL)
            elif self._handover.is_ready and not self._leave_by:
                self._leave_by = now + LEAVE_S
                os.kill(worker, LEAVE)

    def _hand_over(self) -> None:
        """Let the candidate go on, without a worker of our own; returns if that failed."""
        if candidate := self._handover.complete():
            self._pass_signals_on(candidate)
            os._exit(0)  # all that an end undoes is the candidate's now

    def _step_trial(self, watchdog: Watchdog) -> None:
        now = time.monotonic()
        if self._trial is not None and self._trial.passes(bool(self._words[Word.IS_SERVING]), watchdog.silent_s(now), now):
            self._trial = None

    # ---- a worker that hangs ---------------------------------------------------------------------------------------

    def _look_s(self) -> float:
        """How often to look at the worker."""
        if self._leave_by or self._trial is not None:
            return _SOON_S
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
            self._last_words.ask(worker)
            with suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)

    def _pause(self) -> None:
        """The longer the more workers died in vain: what they lack, threads for example, may be there in a moment."""
        if self._deaths.in_a_row > 1:
            time.sleep(_FRUITLESS_PAUSE_S * 4 ** (self._deaths.in_a_row - 2))

    # ---- the end ---------------------------------------------------------------------------------------------------

    def _refuse(self) -> None:
        """Workers cannot serve this mount: answer errors, so that nobody hangs, until it is unmounted."""
        self._words[Word.STATE] = State.GAVE_UP
        # In a process of its own: it reads and writes files, which may lie in the swap that only the next lines answer for.
        child = os.fork()
        if not child:
            self._give_up()
        while not Refusing(self._device, self._holdings.requests).run((self._inbox.fd, self._handover.fd), self._woken):
            self._hand_over()
            self._words[Word.STATE] = State.GAVE_UP
        with suppress(ChildProcessError):
            os.waitpid(child, os.WNOHANG)

    def _give_up(self) -> NoReturn:
        """In a forked process: restore the machine's settings, and log that no worker follows."""
        try:
            self._restore_settings()
            log.critical(
                "%d workers died within a minute and answered nothing: the mount answers errors from now on (%s)",
                MOST_DEATHS_IN_A_ROW,
                "; ".join(death.said for death in self._status.deaths()[-MOST_DEATHS_IN_A_ROW:]),
            )
        finally:
            os._exit(0)

    def _woken(self) -> bool:
        """A signal, or a request to hand over, while the mount answers errors; whether to stop that for a candidate."""
        self._handover.step()
        self._inbox.drain()
        while number := self._inbox.take():
            if number in STOP:
                with suppress(OSError):
                    unmount(self._options.mountpoint)
        return self._handover.is_ready

    def _unmount_at_last(self) -> None:
        """After a failure the mount must not be left behind, dead; where it was unmounted, what is there by now is not ours."""
        if not self._is_unmounted:
            with suppress(OSError):
                unmount(self._options.mountpoint, lazy=True)

    def _restore_settings(self) -> None:
        """Restore what a worker that was killed has left changed. What fails, `tmemfs down` tries again."""
        with suppress(TmemfsError, OSError), closing(KernelSettings(held=self._holdings.settings_user)) as settings:
            settings.resume()
            settings.release()
            settings.restore_leftovers()
            settings.drop_held()
