"""What the daemon does to its own memory: lock it, keep it, fault it in, release it.

Each protection is tried once, and its outcome is kept for control/stat: without the right for one, everything else works. ctypes
releases the interpreter lock during each call. Sources: mlockall(2), prctl(2) PR_SET_IO_FLUSHER, fallocate(2), madvise(2).
"""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import signal
import struct
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tmemfs.system import proctext

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.getrandom.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint)
_libc.getrandom.restype = ctypes.c_ssize_t
_libc.statx.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_void_p)
_libc.mlock2.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.munlock.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.pthread_self.restype = ctypes.c_ulong
_libc.pthread_getattr_np.argtypes = (ctypes.c_ulong, ctypes.c_void_p)
_libc.pthread_attr_getstack.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
_libc.pthread_attr_destroy.argtypes = (ctypes.c_void_p,)
_libc.prctl.argtypes = (ctypes.c_int,) + (ctypes.c_ulong,) * 4

_PUNCH_HOLE_KEEP_SIZE: Final = 3
_MADV_POPULATE_WRITE: Final = 23
_MCL_CURRENT, _MCL_FUTURE, _MCL_ONFAULT = 1, 2, 4
_MLOCK_ONFAULT: Final = 1
_PR_SET_PDEATHSIG: Final = 1
_PR_SET_DUMPABLE: Final = 4
_PR_SET_CHILD_SUBREAPER: Final = 36
_PR_SET_IO_FLUSHER: Final = 57
OOM_SCORE_ADJ_MIN: Final = -1000
_OOM_SCORE_ADJ_MAX: Final = 1000
#: Thousandths of the machine's memory: what the two processes differ by later on, when both hold the same pool.
_OOM_LEAD: Final = 10
_AT_EMPTY_PATH: Final = 0x1000
_STATX_DIOALIGN: Final = 0x2000
#: struct statx (include/uapi/linux/stat.h).
_STATX_BYTES: Final = 256
_DIO_OFFSET_ALIGN_AT: Final = 0x9C
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
#: glibc's pthread_attr_t has 56 bytes.
_PTHREAD_ATTR_BYTES: Final = 64
#: Locked part of each thread's stack, of 512 KiB (docs/decisions/0001-locked-on-fault.md).
STACK_DEPTH_BYTES: Final = 64 << 10
#: Calls deep enough to use the first 16 KiB that the interpreter allocates per thread for frames.
_FRAMES: Final = 120
#: malloc keeps free heap up to this size. No request of the page path is larger.
_HEAP_BYTES: Final = 64 << 20

#: What a worker takes at its start: 4 MB in large blocks, 2 MB in small objects.
_BLOCK_BYTES: Final = 64 << 10
_BLOCKS: Final = 64
_SMALL_OBJECTS: Final = 25_000
_KEPT_ONE_IN: Final = 100
_KEPT_OBJECTS: Final[list[tuple[int]]] = []

Buffer = mmap.mmap | memoryview


@dataclass(frozen=True, slots=True)
class Outcome:
    """Whether one protection could be enabled; `detail` says why not."""

    name: str
    ok: bool
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Resident:
    """Resident memory in bytes, by what is behind it."""

    anon: int
    file: int
    shmem: int


def lock_current() -> Outcome:
    """Lock what is mapped now. To be called before the arena is mapped, which it would fault in as a whole."""
    return _outcome("memory_locked", _libc.mlockall(_MCL_CURRENT))


def lock_future() -> Outcome:
    """Lock what is mapped now and later, each page when it is first touched."""
    # ONFAULT: most of each thread's stack is never touched (docs/decisions/0001)
    return _outcome("memory_locked", _libc.mlockall(_MCL_CURRENT | _MCL_FUTURE | _MCL_ONFAULT))


def private_areas() -> list[proctext.Area]:
    """The mappings that this process may write and shares with nobody, except for what a fork left in common."""
    areas = proctext.parse_areas(Path("/proc/self/maps").read_bytes())
    return [area for area in areas if area.permissions[1::2] == "wp"]


def lock_private(areas: list[proctext.Area]) -> Outcome:
    """Fault in and lock `areas`, private ones: this process has its own copy of each page then.

    A forked process shares such pages with its parent until it writes to one. Then it waits for memory, perhaps when there is none.
    """
    return _outcome("memory_locked", any([_libc.mlock2(area.start, area.end - area.start, 0) for area in areas]))


def drop_code(libraries: tuple[str, ...]) -> None:
    """Unlock and release the unmodified read-only pages of `libraries` (prefixes of file names), which are hardly called.

    Where one is called after all, the kernel reads those pages from the file again.
    """
    for start, length in _unmodified_areas(Path("/proc/self/smaps").read_bytes(), libraries):
        # the kernel releases no locked page
        if not _libc.munlock(start, length):
            _libc.madvise(start, length, mmap.MADV_DONTNEED)


def lock_region(buffer: Buffer, length: int) -> Outcome:
    """Fault in and lock `length` bytes of `buffer`."""
    return _outcome("memory_locked", _libc.mlock2(_address(buffer), length, 0))


def lock_on_fault(buffer: Buffer, length: int) -> Outcome:
    """Lock each page of `buffer` when it is first touched."""
    return _outcome("memory_locked", _libc.mlock2(_address(buffer), length, _MLOCK_ONFAULT))


def lock_stack(depth_bytes: int = STACK_DEPTH_BYTES) -> Outcome:
    """Fault in and lock the upper `depth_bytes` of the calling thread's stack, more than our threads were seen to use."""
    attributes = ctypes.create_string_buffer(_PTHREAD_ATTR_BYTES)
    start, size = ctypes.c_void_p(), ctypes.c_size_t()
    failed = _libc.pthread_getattr_np(_libc.pthread_self(), attributes)
    failed = failed or _libc.pthread_attr_getstack(attributes, ctypes.byref(start), ctypes.byref(size))
    if failed or start.value is None:
        return Outcome("memory_locked", False, os.strerror(failed))
    _libc.pthread_attr_destroy(attributes)
    depth_bytes = min(depth_bytes, size.value)
    # the stack grows downwards, so the end that is in use is the upper one
    return _outcome("memory_locked", _libc.mlock2(start.value + size.value - depth_bytes, depth_bytes, 0))


def prepare_thread(depth_bytes: int = STACK_DEPTH_BYTES) -> Outcome:
    """Have the calling thread touch what it needs when memory may be short: its stack and the interpreter's frames."""
    # before the stack is locked: the calls touch the part of it that the interpreter uses
    _descend(_FRAMES)
    return lock_stack(depth_bytes)


def _descend(left: int) -> int:
    """Call deeper than any other code of ours does."""
    return _descend(left - 1) if left else 0


def rehearse_threads(count: int) -> None:
    """Have `count` threads at once touch what a thread needs, and end: the C library keeps their stacks for those to come."""
    all_there = threading.Barrier(count)

    def touch() -> None:
        prepare_thread()
        all_there.wait()

    threads = [threading.Thread(target=touch, daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def rehearse_heap() -> None:
    """Touch as much heap as a process takes at its start, and free it: it stays with the process (`heap_settings`)."""
    blocks = [b"\1" * _BLOCK_BYTES for _ in range(_BLOCKS)]
    small = [(number,) for number in range(_SMALL_OBJECTS)]
    # Python gives the memory of small objects back where none is left of them, so some stay.
    _KEPT_OBJECTS.extend(small[::_KEPT_ONE_IN])
    del blocks, small


def io_flusher() -> Outcome:
    """Tell the kernel that its reclaim may depend on this process. Needs CAP_SYS_RESOURCE."""
    # without it an allocation of ours may start reclaim, which writes to our swap and waits for us
    return _outcome("io_flusher", _libc.prctl(_PR_SET_IO_FLUSHER, 1, 0, 0, 0))


def realtime() -> Outcome:
    """Set the lowest real-time priority, which later threads inherit. Needs CAP_SYS_NICE.

    The kernel lets such a task use a part of the memory that it reserves from all others, and wakes it at once.
    """
    try:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    except OSError as error:
        return Outcome("realtime", False, str(error.strerror))
    return Outcome("realtime", True)


def ordinary_thread() -> None:
    """Set ordinary priority for the calling thread, so that background work keeps no core from a thread that waits for a page."""
    # where this is refused the thread keeps its priority, and everything still works
    with suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def oom_score_adjust() -> Outcome:
    """Exempt this process from the OOM killer. Needs CAP_SYS_RESOURCE."""
    # a kill would free little, and lose every page that is swapped out
    try:
        Path("/proc/self/oom_score_adj").write_text(str(OOM_SCORE_ADJ_MIN))
    except OSError as error:
        return Outcome("oom_score_adj_set", False, str(error.strerror))
    return Outcome("oom_score_adj_set", True)


def oom_score_adj(pid: int) -> int:
    """The adjustment of process `pid` in thousandths of the machine's memory; OOM_SCORE_ADJ_MIN: it is exempt. Raises OSError."""
    return int(Path(f"/proc/{pid}/oom_score_adj").read_text())


def be_killed_before(other: int) -> Outcome:
    """Have the OOM killer choose this process rather than process `other`, where neither is exempt. Needs no capability."""
    # The kernel compares resident memory and page tables, and adds the adjustment. A process forked just now has less of both.
    try:
        mine, others = _oom_bytes(os.getpid()), _oom_bytes(other)
        behind = max(others - mine, 0) * 1000 // (_meminfo("MemTotal") + _meminfo("SwapTotal"))
        wanted = min(oom_score_adj(other) + behind + _OOM_LEAD, _OOM_SCORE_ADJ_MAX)
        Path("/proc/self/oom_score_adj").write_text(str(wanted))
    except OSError as error:
        return Outcome("oom_worker_first", False, str(error.strerror))
    return Outcome("oom_worker_first", True)


def _oom_bytes(pid: int) -> int:
    """What the OOM killer counts of a process."""
    tables = proctext.parse_keyed(Path(f"/proc/{pid}/status").read_bytes(), b"VmPTE")["VmPTE"]
    found = resident_bytes(pid)
    return found.anon + found.file + found.shmem + proctext.kilobytes(tables)


def no_core_dump() -> Outcome:
    """Write no core file: it would contain memory of other processes, in a place that is not meant for it."""
    return _outcome("core_dumps_off", _libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0))


def end_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent, process `parent`, ends. Raises ProcessLookupError if it has ended."""
    _check(_libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))
    if os.getppid() != parent:  # it ended before the call
        raise ProcessLookupError(f"the supervisor (process {parent}) has ended")


def outlive_parent() -> None:
    """Undo `end_with_parent`. Raises OSError."""
    _check(_libc.prctl(_PR_SET_PDEATHSIG, 0, 0, 0, 0))


def adopt_orphans() -> None:
    """Become the parent of the children that a child of this process leaves when it ends. Raises OSError."""
    _check(_libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0))


def heap_settings() -> Outcome:
    """Have malloc use one arena and keep its memory."""
    # memory that went back to the kernel would have to be faulted in again, perhaps when there is none
    settings = ((_M_ARENA_MAX, 1), (_M_TRIM_THRESHOLD, _HEAP_BYTES), (_M_MMAP_THRESHOLD, _HEAP_BYTES // 2))
    ok = all([_libc.mallopt(key, value) for key, value in settings])
    return Outcome("heap_kept", ok)


def freeze_garbage() -> Outcome:
    """Exempt what is allocated now from garbage collection: all of it lives as long as the daemon.

    Heap that the imports left free (0.7 MB) is released to the kernel, before the heap is locked.
    """
    # collect first: garbage that is frozen stays for ever
    gc.collect()
    _libc.malloc_trim(0)
    gc.freeze()
    return Outcome("gc_frozen", gc.get_freeze_count() > 0)


def populate(buffer: Buffer, offset: int, length: int) -> None:
    """Fault in `length` bytes at `offset`. Raises OSError if the kernel has no memory for them."""
    _check(_libc.madvise(_address(buffer) + offset, length, _MADV_POPULATE_WRITE))


def fill_random(buffer: memoryview) -> None:
    """Fill `buffer`, of 256 bytes at most, with random bytes that are nowhere else in this process. Raises OSError."""
    # up to that size the kernel gives all or nothing, and no signal interrupts it
    if _libc.getrandom(_address(buffer), len(buffer), 0) != len(buffer):
        _check(-1)


def punch(fd: int, offset: int, length: int) -> None:
    """Punch a hole: release the space of [offset, offset + length), which then reads as zeros. Raises OSError."""
    _check(_libc.fallocate(fd, _PUNCH_HOLE_KEEP_SIZE, offset, length))


def allocate(fd: int, offset: int, length: int) -> None:
    """Allocate the space of [offset, offset + length), which reads as zeros; a shorter file grows to its end. Raises OSError."""
    _check(_libc.fallocate(fd, 0, offset, length))


def direct_alignment(fd: int) -> int | None:
    """The alignment of offsets and lengths for direct I/O, None if the file system does not say (statx(2), Linux 6.1)."""
    found = ctypes.create_string_buffer(_STATX_BYTES)
    if _libc.statx(fd, b"", _AT_EMPTY_PATH, _STATX_DIOALIGN, found):
        return None
    mask, (alignment,) = struct.unpack_from("<I", found)[0], struct.unpack_from("<I", found, _DIO_OFFSET_ALIGN_AT)
    # 0 means no direct I/O on this file; an older kernel leaves the bit of the mask clear
    return alignment or None if mask & _STATX_DIOALIGN else None


def resident_bytes(pid: int) -> Resident:
    """Resident memory of process `pid`. Raises OSError if it has ended."""
    found = proctext.parse_keyed(Path(f"/proc/{pid}/status").read_bytes(), b"Rss")
    if "RssAnon" not in found:  # a zombie
        raise ProcessLookupError(f"process {pid} has ended")
    anon, file, shmem = (proctext.kilobytes(found[key]) for key in ("RssAnon", "RssFile", "RssShmem"))
    return Resident(anon, file, shmem)


def total_ram_bytes() -> int:
    """RAM of the machine."""
    return _meminfo("MemTotal")


def available_ram_bytes() -> int:
    """RAM that programs can get without swapping."""
    return _meminfo("MemAvailable")


def _unmodified_areas(smaps: bytes, libraries: tuple[str, ...]) -> Iterator[tuple[int, int]]:
    """(address, bytes) of read-only mappings of `libraries` without a private copy of a page."""
    for area in proctext.parse_areas(smaps):
        # a modified page (relocations) is nowhere in the file: released, it would be lost
        if area.anonymous_bytes == 0 and "w" not in area.permissions and area.path.rpartition("/")[2].startswith(libraries):
            yield area.start, area.end - area.start


def _meminfo(key: str) -> int:
    found = proctext.parse_keyed(Path("/proc/meminfo").read_bytes(), f"{key}:".encode())
    if key not in found:
        raise OSError(f"/proc/meminfo has no {key}")
    return proctext.kilobytes(found[key])


def _address(buffer: Buffer) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


def _check(result: int) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _outcome(name: str, result: int | bool) -> Outcome:
    return Outcome(name, result == 0, "" if result == 0 else os.strerror(ctypes.get_errno()))
