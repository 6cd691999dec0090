"""The programs that use memory in the guest. Run as a file, with the standard library alone: the guest is small, and emulated.

    hogs.py idle SEED MIB        fill MIB of memory, have it swapped out, say 'filled'; verify every byte for each line of input
    hogs.py mlock BYTES HOLD_S   lock BYTES of memory page by page, as fast as possible; hold it for HOLD_S or until a line; verify
    hogs.py pin FLOOR_KB         lock memory to keep MemFree at the minimum watermark, leaving FLOOR_KB that can be reclaimed
    hogs.py churn MIB            write MIB again and again in random order, and verify each page before it is written again
    hogs.py cycle MIB            write MIB, have it swapped out, verify it, and again

Each prints 'key value' lines, and exits with 1 if a byte was wrong. `pin`, `churn` and `cycle` end at the end of their
input. A page has its number in a header, and a part of a random block from an offset that depends on the number. So it can be
generated again for the comparison, and compresses to about half.
"""

import ctypes
import mmap
import select
import sys
import time
from _random import Random
from collections.abc import Callable

PAGE = 4096
#: Bytes of a page that do not compress: about half, so that zswap's allocator can pair pages.
RANDOM_BYTES = 1800
BLOCK = 1 << 16
CHUNK_PAGES = 2048
CYCLE_PAGES = 512
MADV_PAGEOUT = 21
MARGIN_PAGES = 32
#: Released at once.
LEAST_PAGES = 256
MOST_PINNED_PAGES = 1 << 17
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mlock.argtypes = _libc.munlock.argtypes = (ctypes.c_void_p, ctypes.c_size_t)


class Pages:
    """The contents of numbered pages, generated from a seed."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._block = Random(seed).getrandbits(8 * (BLOCK + RANDOM_BYTES)).to_bytes(BLOCK + RANDOM_BYTES, "little")
        self._tail = bytes(PAGE - 16 - RANDOM_BYTES)

    def page(self, number: int, version: int = 0) -> bytes:
        """The page's bytes."""
        at = (number * 2654435761 + version * 40503) % BLOCK
        head = (number << 64 | version << 32 | self._seed).to_bytes(16, "little")
        return head + self._block[at : at + RANDOM_BYTES] + self._tail


def memory_of(pages: int) -> mmap.mmap:
    """Anonymous memory of small pages, untouched."""
    memory = mmap.mmap(-1, pages * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    return memory


def address_of(memory: mmap.mmap) -> int:
    """The address of `memory`."""
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def say(key: str, value: object) -> None:
    """Print one line for the reader of our output."""
    print(key, value, flush=True)


def wrong_pages(memory: mmap.mmap, count: int, supply: Pages) -> int:
    """How many of the first `count` pages are not as they were written."""
    return sum(memory[at * PAGE : (at + 1) * PAGE] != supply.page(at) for at in range(count))


def idle(seed: int, mib: int) -> int:
    """Fill memory, swap it out, wait; verify on request."""
    count = (mib << 20) // PAGE
    memory, supply = memory_of(count), Pages(seed)
    for start in range(0, count, CHUNK_PAGES):
        end = min(start + CHUNK_PAGES, count)
        for number in range(start, end):
            memory[number * PAGE : (number + 1) * PAGE] = supply.page(number)
        # as it goes: the guest has not enough RAM for all of them at once
        memory.madvise(MADV_PAGEOUT, start * PAGE, (end - start) * PAGE)
    say("filled", count)
    wrong = 0
    for _ in sys.stdin:
        found = wrong_pages(memory, count, supply)
        wrong += found
        say("wrong", found)
    return 1 if wrong else 0


def mlock(size: int, hold_s: float) -> int:
    """Lock page after page, hold them, verify them."""
    count = size // PAGE
    memory, supply = memory_of(count), Pages(7)
    base = address_of(memory)
    say("size", count * PAGE)
    began = time.monotonic()
    for number in range(count):
        # page by page, so that the kernel asks for memory at every single one
        if _libc.mlock(base + number * PAGE, PAGE):
            say("refused", number)
            return 3
        memory[number * PAGE : (number + 1) * PAGE] = supply.page(number)
        if number % CHUNK_PAGES == 0:
            say("locked", number * PAGE)
    seconds = time.monotonic() - began
    say("seconds", seconds)
    is_input_at_end(hold_s)
    wrong = wrong_pages(memory, count, supply)
    say("wrong", wrong)
    return 1 if wrong else 0


def pin(floor_kb: int) -> int:
    """Lock what is free above the minimum watermark, and release what is needed to leave FLOOR_KB free or reclaimable."""
    memory = memory_of(MOST_PINNED_PAGES)
    base, low = address_of(memory), minimum_pages() + MARGIN_PAGES
    locked, wait_s = 0, 0.0
    say("pinning", low * PAGE)
    while not is_input_at_end(wait_s):
        wait_s = 0.02
        meminfo = read_meminfo()
        spare = meminfo["MemFree"] // 4 - low
        budget = spare + (meminfo["Active(anon)"] + meminfo["Inactive(anon)"] - floor_kb) // 4
        if spare > 0 and (more := min(spare, budget, CHUNK_PAGES, MOST_PINNED_PAGES - locked)) > 0:
            if not _libc.mlock(base + locked * PAGE, more * PAGE):
                locked, wait_s = locked + more, 0.0
        elif spare <= 0 and (less := min(-budget, LEAST_PAGES, locked)) > 0:
            # from the end, so that what is locked stays one range
            locked -= less
            _libc.munlock(base + locked * PAGE, less * PAGE)
            memory.madvise(mmap.MADV_DONTNEED, locked * PAGE, less * PAGE)
    say("pinned", locked * PAGE)
    return 0


def churn(mib: int) -> int:
    """Write pages in random order until told to end, and verify each before it is written again."""
    count, random, supply = (mib << 20) // PAGE, Random(11), Pages(11)
    memory, versions, wrong, written = memory_of(count), bytearray(count), 0, 0
    say("churning", count)
    while not is_input_at_end(0):
        # the input is checked once per 64 pages: a select(2) per page would take longer than the page
        for _ in range(64):
            number = int(random.random() * count)
            place = slice(number * PAGE, (number + 1) * PAGE)
            if versions[number]:
                wrong += memory[place] != supply.page(number, versions[number])
            # 0 means never written
            versions[number] = versions[number] % 255 + 1
            memory[place] = supply.page(number, versions[number])
            written += 1
    say("written", written)
    say("wrong", wrong)
    return 1 if wrong else 0


def cycle(mib: int) -> int:
    """Write memory, have it swapped out and verify it, in chunks, until told to end: swap traffic without a lack of memory."""
    count, supply = (mib << 20) // PAGE, Pages(13)
    memory, version, wrong, written = memory_of(count), 0, 0, 0
    say("cycling", count)
    while not is_input_at_end(0):
        version = version % 255 + 1
        for start in range(0, count, CYCLE_PAGES):
            end = min(start + CYCLE_PAGES, count)
            for number in range(start, end):
                memory[number * PAGE : (number + 1) * PAGE] = supply.page(number, version)
            memory.madvise(MADV_PAGEOUT, start * PAGE, (end - start) * PAGE)
            written += end - start
        for number in range(count):
            wrong += memory[number * PAGE : (number + 1) * PAGE] != supply.page(number, version)
        say("verified", written)
    say("wrong", wrong)
    return 1 if wrong else 0


def read_meminfo() -> dict[str, int]:
    """/proc/meminfo in KiB."""
    with open("/proc/meminfo") as file:
        return {line.split(":")[0]: int(line.split()[1]) for line in file}


def minimum_pages() -> int:
    """The minimum watermarks of all zones."""
    with open("/proc/zoneinfo") as file:
        return sum(int(line.split()[1]) for line in file if line.split()[:1] == ["min"])


def is_input_at_end(wait_s: float) -> bool:
    """Whether the input has a line, or has ended."""
    return bool(select.select([sys.stdin], [], [], wait_s)[0])


def main(arguments: list[str]) -> int:
    """Run the named program."""
    programs: dict[str, Callable[[], int]] = {
        "idle": lambda: idle(int(arguments[1]), int(arguments[2])),
        "mlock": lambda: mlock(int(arguments[1]), float(arguments[2])),
        "pin": lambda: pin(int(arguments[1])),
        "churn": lambda: churn(int(arguments[1])),
        "cycle": lambda: cycle(int(arguments[1])),
    }
    return programs[arguments[0]]()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
