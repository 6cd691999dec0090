"""Has the kernel ask for single pages while damage is not acknowledged, so that a damaged page costs no other one.

The kernel merges the pages that it reads ahead, or that several processes want, into one request to the loop device. An answer can
give the pages in front of a damaged one. The pages behind it fail with it: the loop driver has one error for the rest of a request.
Damage seldom comes alone, so from the first one on requests are not merged, until the damage is acknowledged. Swapping is slower
meanwhile (docs/operations.md).

Knows nothing of the page path. The loop devices are those that exist when damage is found: one that is attached later merges.

Invariant: 1. A device is given back what it had. A process that is killed leaves it with single pages, which is slow and safe,
until it is detached (swapdev.detach).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Final

import trio

from tmemfs.jobs.executor import Executor
from tmemfs.jobs.notices import Wakeup
from tmemfs.store.damage import Damage
from tmemfs.system import swapdev

log = logging.getLogger(__name__)

#: What the kernel calls it: no merges at all.
_NEVER: Final = "2"

#: Names the loop devices over the image.
Devices = Callable[[], list[str]]
#: Writes the queue's `nomerges` of a device and returns what it was. Raises OSError.
SetMerging = Callable[[str, str], str]


class SinglePages:
    """Follows `damage`. All that may block is called in `executor`: some kernels have a write to `nomerges` wait for requests."""

    def __init__(
        self, damage: Damage, executor: Executor, devices: Devices, set_no_merges: SetMerging = swapdev.set_no_merges
    ) -> None:
        self._damage = damage
        self._executor = executor
        self._devices = devices
        self._set_no_merges = set_no_merges
        self._wakeup = Wakeup()
        #: What each device had before.
        self._before: dict[str, str] = {}

    async def run(self) -> None:
        """Follow `damage` until cancelled."""
        with self._damage.told_to(partial(_set_soon, trio.lowlevel.current_trio_token(), self._wakeup)):
            while True:
                self._wakeup.clear()
                await self._executor.run(self._follow)
                await self._wakeup.wait()

    def _follow(self) -> None:
        """Have requests merged, or not."""
        if self._damage.since_acknowledged:
            for device in set(self._devices()) - self._before.keys():
                self._before[device] = self._set_no_merges(device, _NEVER)
                log.warning("loads found damage: %s is asked for single pages until it is acknowledged", device)
        while self._before and not self._damage.since_acknowledged:
            device, before = self._before.popitem()
            with suppress(OSError):  # detached, and perhaps removed
                self._set_no_merges(device, before)


def _set_soon(token: trio.lowlevel.TrioToken, wakeup: Wakeup) -> None:
    with suppress(trio.RunFinishedError):  # a load must not fail because the event loop has ended meanwhile
        token.run_sync_soon(wakeup.set)
