from array import array

from tmemfs.store.codec import Packed
from tmemfs.store.slots import SlotTable
from tmemfs.store.transitions import Transitions

def encode_lz4(pages: memoryview) -> list[Packed]: ...
def count_pool(
    handles: memoryview, words: memoryview, segments: int, live: array[int], pages: array[int]
) -> tuple[tuple[int, ...], int, int, int, int, int, int] | None: ...

class Appender:
    def __init__(self, slots: SlotTable, transitions: Transitions) -> None: ...
    def append(self, first: int, packed: list[Packed], start: int = 0) -> int: ...
