"""A contender: tmemfs with its image served by pyfuse3, instead of by the relay.

    python -m tools.bench.plain_fuse MOUNTPOINT SIZE POOL_MAX BACKING

What differs is who answers for a page: trio's main thread reads each request through libfuse, loads from RAM, encodes and stores;
loads from a tier run in four threads, stores that wait for a free frame in one. Store, pager, jobs, control files and memory safety
are those of the daemon, built by it. pyfuse3 has no handler for discards, so none arrive, and signals end no write of a control
file.

Says 'ready' once the mount answers, and serves until it is unmounted.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path

import trio

from tmemfs.control import Attribute, ControlDirectory
from tmemfs.errors import TmemfsError
from tmemfs.fuse.library import pyfuse3
from tmemfs.fuse.namespace import SWAP, Namespace, inode_of
from tmemfs.fuse.wire import REQUEST_PAGES, REQUESTS_UNDER_WAY
from tmemfs.holdings import Geometry, Regions
from tmemfs.jobs.executor import Executor
from tmemfs.jobs.supervision import Job, Jobs
from tmemfs.options import Options, check
from tmemfs.pages.pager import Deferred, Pager
from tmemfs.services import Services
from tmemfs.system import memory, swapdev
from tmemfs.system.memory_safety import MemorySafety
from tmemfs.tiers.file import FileTier
from tmemfs.units import PAGE_BYTES, parse_size
from tmemfs.worker import Parts, build
from tools.bench.mounts import Mount, end_server, unmount, wait_ready


class ImageNamespace(Namespace):
    """The namespace with an image that can be read and written, from `pager`."""

    def __init__(self, pager: Pager, attributes: tuple[Attribute, ...], space: Callable[[], tuple[int, int]]) -> None:
        super().__init__(attributes, space)
        self._pager = pager
        self._loads, self._stores = Executor("loads", threads=4), Executor("stores")

    def start(self) -> None:
        """Start the threads for what may block."""
        self._loads.start()
        self._stores.start()

    async def read(self, fh: int, off: int, size: int) -> bytes:
        """See Namespace."""
        if inode_of(fh) != SWAP:
            return await super().read(fh, off, size)
        return await self._finish(self._pager.read(off, size)) or b""

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        """See Namespace."""
        if inode_of(fh) != SWAP:
            return await super().write(fh, off, buf)
        await self._finish(self._pager.write(off, memoryview(buf)))
        return len(buf)

    async def _finish(self, result: bytes | Deferred | None) -> bytes | None:
        if not isinstance(result, Deferred):
            return result
        executor = self._stores if result.kind == "store" else self._loads
        return await executor.run(result.run)


class PlainServer:
    """Serves `parts` at the mountpoint of `options`, in the calling thread."""

    def __init__(self, options: Options, parts: Parts, ready: Callable[[], None]) -> None:
        self._mountpoint = options.mountpoint
        self._parts = parts
        self._ready = ready
        self._jobs = Jobs()
        services = Services(parts.engine, parts.limits, parts.pressure, self._jobs, parts.safety.outcomes)
        self._namespace = ImageNamespace(parts.engine.pager, ControlDirectory(services).attributes, self._space)

    def run(self) -> None:
        """Serve until unmounted. The steps are those of the daemon, in its order."""
        options = set(pyfuse3.default_options) - {"fsname=pyfuse3"} | {"fsname=tmemfs", "subtype=tmemfs", "allow_other"}
        pyfuse3.init(self._namespace, str(self._mountpoint), options)
        try:
            self._parts.safety.note_lock(memory.lock_future())
            self._parts.engine.pager.warm(REQUESTS_UNDER_WAY, REQUEST_PAGES)
            self._parts.tuning.start()
            self._parts.engine.start()
            self._namespace.start()
            trio.run(self._main)
        finally:
            self._parts.engine.close()
            self._parts.tuning.close()
            pyfuse3.close(unmount=True)

    async def _main(self) -> None:
        jobs = (Job("pressure", self._parts.pressure.run), Job("kernel settings", self._parts.tuning.run))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._jobs.run, (*self._parts.engine.jobs, *jobs))
            nursery.start_soon(self._announce)
            await pyfuse3.main()
            nursery.cancel_scope.cancel()

    async def _announce(self) -> None:
        # in a thread: the answer comes from this one
        await self._parts.tuning.executor.run(partial(os.stat, self._mountpoint / "control"))
        self._ready()

    def _space(self) -> tuple[int, int]:
        size = self._parts.engine.pager.swap_bytes
        return size, size - self._parts.engine.tmem.pages_stored * PAGE_BYTES


def start(mountpoint: Path, size_bytes: int, pool_max: str, backing: Path) -> subprocess.Popen[bytes]:
    """Start this program."""
    arguments = [str(mountpoint.absolute()), str(size_bytes), pool_max, str(backing.absolute())]
    command = [sys.executable, "-m", "tools.bench.plain_fuse", *arguments]
    root = Path(__file__).parents[2]
    return subprocess.Popen(command, cwd=root, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, start_new_session=True)


@contextmanager
def mounted(directory: Path, name: str, size_bytes: int, pool_max: str) -> Iterator[Mount]:
    """A mount with a loop device, below `directory`."""
    mountpoint = directory / name
    mountpoint.mkdir()
    with ExitStack() as undo:
        server = start(mountpoint, size_bytes, pool_max, directory / f"{name}.backing")
        undo.callback(end_server, server)
        undo.callback(unmount, mountpoint)
        wait_ready(server)
        device = swapdev.attach(mountpoint / "swap")
        undo.callback(swapdev.detach, device)
        yield Mount(mountpoint, device)


def _serve(options: Options) -> None:
    """Serve in this process, without a supervisor. Raises what the checks raise."""
    check(options)
    assert options.backing is not None
    safety = MemorySafety()
    safety.prepare_process()
    with closing(FileTier(options.backing)) as tier:
        geometry = Geometry.of(options, tier)
        safety.lock_current()
        regions = Regions.create(geometry)
        regions.lock(safety)
        parts = build(options, tier, geometry, regions, safety, Pager)
        PlainServer(options, parts, lambda: print("ready", flush=True)).run()


def main() -> int:
    """Serve."""
    mountpoint, size, pool_max, backing = sys.argv[1:]
    logging.basicConfig(level=logging.WARNING)
    options = Options(Path(mountpoint), parse_size(size), pool_max, Path(backing))
    try:
        _serve(options)
    except TmemfsError as error:
        print(f"plain_fuse: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
