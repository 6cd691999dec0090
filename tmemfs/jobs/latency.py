"""Latency: idle CPUs are kept awake while requests come in bursts, and only then.

A request passes between CPUs several times before its page is there: to the loop device's worker, to the leader, and back. Where
they are idle, each of them first has to be woken from its halt. The kernel keeps them awake while it is asked to
(system/cpu_latency.py), at the price of CPUs that poll.

    leader    `if is_armed: note()` for each request. With the request that begins a burst it disarms, and wakes `run`
    run       keeps CPUs awake, looks from time to time whether the burst goes on, then lets them halt and arms again

So a request costs a test of a flag in a burst, and one reading of the clock outside of bursts. Nothing wakes up while none come.

Thread-safety: `note` from the leader alone; everything else in trio's thread.

Invariants:
1. `note` does not raise, takes no memory of the kernel's, and wakes `run` once per burst.
2. CPUs are kept awake by what the kernel ends with the process. A worker that is stopped in a burst keeps them awake until it is
   replaced.
"""

from __future__ import annotations

import logging
import os
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

import trio

from tmemfs.errors import BadValue, Refused
from tmemfs.policy.bursts import Bursts
from tmemfs.system.cpu_latency import DEVICE, CpuLatency

log = logging.getLogger(__name__)

MODES: Final = ("auto", "off", "always")


def parse_latency(text: str) -> str:
    """A mode of control/latency. Raises BadValue."""
    if text.strip() not in MODES:
        raise BadValue(f"{text.strip()!r} is no mode of latency: choose {', '.join(MODES[:-1])} or {MODES[-1]}")
    return text.strip()


class Latency:
    """Keeps idle CPUs awake by way of `device`, as `mode` says. `run` must be running in trio."""

    def __init__(self, mode: str = "auto", device: Path = DEVICE, clock: Callable[[], float] = time.monotonic) -> None:
        #: Whether the leader is to call `note` for each request.
        self.is_armed = False
        self.mode = mode
        #: Bursts since the start.
        self.bursts = 0
        self._device = device
        self._clock = clock
        self._bursts = Bursts()
        self._request: CpuLatency | None = None
        self._refused = ""
        self._held_since: float | None = None
        self._held_s = 0.0
        self._burst: trio.CancelScope | None = None
        self._woken = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        weakref.finalize(self, os.close, self._woken).atexit = False

    @property
    def is_held(self) -> bool | None:
        """Whether CPUs are kept awake now; None where the kernel's device cannot be opened."""
        return None if self._refused else self._held_since is not None

    @property
    def held_s(self) -> float:
        """For how long CPUs were kept awake since the start."""
        return self._held_s + (self._clock() - self._held_since if self._held_since is not None else 0.0)

    def note(self, weight: int = 1) -> None:
        """A request has come, which counts `weight` times. Called by the leader while `is_armed`."""
        if self._bursts.begins(self._clock(), weight):
            self.is_armed = False
            # Not through trio: to wake its loop is to send to a socket.
            with suppress(OSError):
                os.eventfd_write(self._woken, 1)

    def set_mode(self, mode: str) -> None:
        """Change the mode at once. Raises Refused, and changes nothing, for `always` where CPUs cannot be kept awake."""
        if mode == "always":
            self._open()
        self.mode = mode
        if self._burst is not None:
            self._burst.cancel()
        self._follow()

    async def run(self, requests: Callable[[], int]) -> None:
        """Follow bursts until cancelled; `requests` counts what the leader was asked, with the same weights."""
        try:
            self._follow()
            while True:
                await trio.lowlevel.wait_readable(self._woken)
                with suppress(BlockingIOError):
                    os.eventfd_read(self._woken)
                if self.mode == "auto" and self._request is not None:
                    await self._follow_burst(self._request, requests)
        finally:
            self._close()

    async def _follow_burst(self, request: CpuLatency, requests: Callable[[], int]) -> None:
        """Keep CPUs awake until the burst is over, or the mode is changed."""
        self.bursts += 1
        self._keep_awake(request)
        self._bursts.begin(requests(), self._clock())
        with trio.CancelScope() as self._burst:
            await trio.sleep(self._bursts.look_s)
            while self._bursts.goes_on(requests(), self._clock()):
                await trio.sleep(self._bursts.look_s)
        is_changed, self._burst = self._burst.cancel_called, None
        if not is_changed:
            self._let_halt(request)
            self.is_armed = True

    def _follow(self) -> None:
        """Do what the mode says. Where it cannot be done, say so once."""
        self.is_armed = False
        if self.mode == "off":
            self._refused = ""
            self._close()
            return
        try:
            request = self._open()
        except Refused as error:
            if str(error) != self._refused:
                log.warning("latency: %s", error)
            self._refused = str(error)
            return
        if self.mode == "always":
            self._keep_awake(request)
        else:
            self._let_halt(request)
            self.is_armed = True

    def _open(self) -> CpuLatency:
        """The request at the device. Raises Refused."""
        if self._request is None:
            self._request = CpuLatency(self._device)
        self._refused = ""
        return self._request

    def _keep_awake(self, request: CpuLatency) -> None:
        if self._held_since is None:
            request.keep_awake()
            self._held_since = self._clock()

    def _let_halt(self, request: CpuLatency) -> None:
        if self._held_since is not None:
            self._held_s, self._held_since = self.held_s, None
            request.let_halt()

    def _close(self) -> None:
        """End the request."""
        self.is_armed = False
        if self._request is not None:
            request, self._request = self._request, None
            self._held_s, self._held_since = self.held_s, None
            request.close()
