"""Kernel tuning: the machine's settings are changed while our image is an active swap, and only then.

`run` follows the kernel's table of swaps. When a swap over our image is turned on, the daemon registers as a user of
system/kernel_settings.py. When it is turned off, or `mode` is off, or the daemon ends, everything is restored. At its start, `run`
also restores what a daemon that was killed has left. While nothing is engaged, calls that would change a setting do nothing.

Registering and restoring wait for other processes, so they are done in an executor. The rest is called in trio's thread.

Invariant: 1. While the executor uses the settings, `is_engaged` is false, so trio's thread does not use them.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Final

import trio

from tmemfs.errors import BadValue, Busy, Refused
from tmemfs.jobs.executor import Executor
from tmemfs.system.kernel_settings import BOOST, Change, KernelSettings
from tmemfs.system.swap_watch import ImageSwap, SwapWatch

log = logging.getLogger(__name__)

MODES: Final = ("auto", "off")
#: Registering that failed is tried again this often.
RETRY_S: Final = 30.0


def parse_tuning(text: str) -> str:
    """A mode of control/kernel.tuning. Raises BadValue."""
    if text.strip() not in MODES:
        raise BadValue(f"{text.strip()!r} is no mode of kernel tuning: choose {' or '.join(MODES)}")
    return text.strip()


class KernelTuning:
    """Engages `settings` while `watch` finds a swap over our image. `run` must be running in trio."""

    def __init__(self, settings: KernelSettings, watch: Callable[[], SwapWatch], mode: str = "auto") -> None:
        self.mode = mode
        self._settings = settings
        self._make_watch = watch
        #: For what is asked of the system beside the page path, by others too: it may wait for other processes.
        self.executor = Executor("system")
        self._one_at_a_time = trio.Lock()
        self._watch: SwapWatch | None = None
        self._swap: ImageSwap | None = None
        self._is_engaged = False
        self._failed = ""

    @property
    def is_engaged(self) -> bool:
        """Whether the machine's settings may be changed now."""
        return self._is_engaged

    @property
    def has_requests(self) -> bool:
        """Whether the kernel waits for a request to our swap."""
        return self._swap is not None and self._swap.has_requests()

    @property
    def raised_workers(self) -> int:
        """Workers of the kernel that have our priority."""
        return self._settings.raised_workers if self._is_engaged else 0

    @property
    def is_boost_off(self) -> bool:
        """Whether the kernel does not raise its minimum watermark for fragmented memory."""
        return any(change.name == BOOST and change.now == 0 for change in self.changes())

    def changes(self) -> tuple[Change, ...]:
        """The settings with their values now and the administrator's, while engaged."""
        return self._settings.changes() if self._is_engaged else ()

    def lower_minimum(self, share: float) -> bool:
        """Lower the kernel's minimum watermark to a share of the administrator's value; whether it is that low now."""
        return self._is_engaged and self._settings.lower_minimum(share)

    def restore_minimum(self) -> None:
        """Restore the administrator's value of the kernel's minimum watermark."""
        if self._is_engaged:
            self._settings.restore_minimum()

    def give_priority(self) -> None:
        """Give the kernel's workers our priority."""
        if self._is_engaged:
            self._settings.give_priority()

    def take_priority(self) -> None:
        """Give the kernel's workers their ordinary priority again."""
        if self._is_engaged:
            self._settings.take_priority()

    def start(self) -> None:
        """Start the executor. Raises RuntimeError where the system allows no more threads."""
        self.executor.start()

    def close(self) -> None:
        """Restore what is still changed, and end the executor. Nothing runs any more."""
        self._end()
        self._settings.close()
        self.executor.close()

    async def set_mode(self, mode: str) -> None:
        """Change the mode; done when the settings are changed, or restored. Raises Refused, Busy."""
        self.mode = mode
        await self._follow()

    async def run(self) -> None:
        """Follow the table of swaps until cancelled."""
        try:
            self._watch = self._make_watch()
            # Before it registers: values that a killed daemon has left are not the administrator's.
            await self._try(self._restore_leftovers)
            while True:
                is_followed = await self._try(self._follow)
                with trio.move_on_after(math.inf if is_followed else RETRY_S):
                    await trio.lowlevel.wait_readable(self._watch.fileno())
                self._watch.clear()  # before the table is read again: a change during that is signalled again
        finally:
            with trio.CancelScope(shield=True):
                async with self._one_at_a_time:  # a change of the mode may be under way in the executor
                    self._end()

    async def _try(self, step: Callable[[], object]) -> bool:
        """Whether `step` succeeded; a reason that is new is logged."""
        try:
            await step()  # type: ignore[misc]
        except (Busy, Refused) as error:
            if str(error) != self._failed:  # it is tried every RETRY_S
                log.warning("kernel settings: %s", error)
            self._failed = str(error)
            return False
        self._failed = ""
        return True

    async def _restore_leftovers(self) -> None:
        await self._in_executor(self._settings.resume)
        await self._in_executor(self._settings.restore_leftovers)

    async def _follow(self) -> None:
        """Engage or disengage, by what the table of swaps says. Raises Refused, Busy."""
        async with self._one_at_a_time:
            if (watch := self._watch) is None:  # `run` is not running, and will follow the mode when it is
                return
            found = list[str | None]()
            await self._in_executor(lambda: found.append(watch.look()))
            device = found[0] if self.mode == "auto" else None
            if device is None and not self._is_engaged:
                # An earlier worker may have registered, and the swap was turned off before this one looked.
                await self._in_executor(self._settings.release)
            # The swap is off, or was turned off and is on again by way of another loop device.
            if self._is_engaged and (self._swap is None or device != self._swap.device):
                await self._disengage()
            if device is not None and not self._is_engaged:
                await self._in_executor(self._settings.register)
                # Last, and without an await in between: from here on trio's thread uses the settings (invariant 1).
                self._swap, self._is_engaged = watch.open(device), True
                log.info("kernel settings: in use, %s is an active swap", device)

    async def _disengage(self) -> None:
        self._is_engaged = False  # first: trio's thread must not use the settings while the executor does
        self._close_swap()
        await self._in_executor(self._settings.release)
        log.info("kernel settings: restored")

    async def _in_executor(self, function: Callable[[], object]) -> None:
        """Call it in the executor. Raises Busy, and Refused with what the system says."""
        try:
            await self.executor.run(function)
        except OSError as error:
            raise Refused(f"nothing is changed ({error}): see tmemfs doctor") from error

    def _close_swap(self) -> None:
        if self._swap is not None:
            self._swap.close()
            self._swap = None

    def _end(self) -> None:
        """At the end of the daemon, or before `run` is started again: not in the executor, for nothing more is served by trio."""
        self._is_engaged = False
        self._settings.release()
        self._close_swap()
        if self._watch is not None:
            self._watch.close()
            self._watch = None
