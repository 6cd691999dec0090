"""The ledger: what it counts is what a scan of the same handles finds, whatever is stored, dropped, moved or changes its place."""

from __future__ import annotations

import ast
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tmemfs
from tmemfs.store.codec import LZ4, RAW, ZERO, ZSTD_DICT
from tmemfs.store.ledger import (
    EMPTIED,
    NOTHING,
    ONLY_POOL,
    RAW_STORES,
    SPARSE,
    STORED_BYTES,
    STORES,
    Ledger,
    PoolId,
    Totals,
)
from tmemfs.store.occupancy import TIER
from tmemfs.store.record import TAGS, ZERO_HANDLE, SegmentId, handle_accounts, handle_of, record_bytes
from tmemfs.store.segments import LANE_COLD, LANE_PACKED, LANE_RAW, ON_TIER, SEALED, WRITING, SegmentTable
from tmemfs.units import SEGMENT_BYTES

OTHER_POOL: Final = PoolId(1)
PACKED, RAW_SEGMENT, TIER_SEGMENT, COLD_SEGMENT = map(SegmentId, range(4))


def table() -> SegmentTable:
    """A segment of each kind, full: two open in RAM, one written back, one cleaned."""
    segments = SegmentTable(8)
    for lane, frame in ((LANE_PACKED, 0), (LANE_RAW, 1), (LANE_PACKED, 2)):
        segments.open(segments.take(), lane, frame)
    for state in (SEALED, WRITING, ON_TIER):
        segments.move(TIER_SEGMENT, state, 0)
    segments.begin(segments.take())
    segments.move(COLD_SEGMENT, ON_TIER, 1, LANE_COLD)
    for segment in (PACKED, RAW_SEGMENT, TIER_SEGMENT, COLD_SEGMENT):
        segments.set_fill(segment, SEGMENT_BYTES)
    return segments


@dataclass(slots=True)
class Scan:
    """Handles by pool, and what they amount to."""

    pools: tuple[Counter[int], ...] = field(default_factory=lambda: (Counter(), Counter()))

    def totals(self, pool: PoolId) -> Totals:
        by_tag, sums = [0] * TAGS, [0] * 6
        for handle in self.pools[pool].elements():
            segment, tag, length, size = handle_accounts(handle)
            by_tag[tag] += 1
            if tag != ZERO:
                on_tier, is_cold = segment in (TIER_SEGMENT, COLD_SEGMENT), segment == COLD_SEGMENT
                more = (length, size, on_tier, on_tier * size, is_cold, is_cold and tag == RAW)
                sums = [a + b for a, b in zip(sums, more, strict=True)]
        return Totals(tuple(by_tag), *sums)

    def live(self, segment: SegmentId) -> tuple[int, int]:
        """Bytes and pages."""
        handles = [handle for pool in self.pools for handle in pool.elements()]
        found = [accounts for accounts in map(handle_accounts, handles) if accounts[0] == segment and accounts[1] != ZERO]
        return sum(size for _, _, _, size in found), len(found)


HANDLES = st.one_of(
    st.just(ZERO_HANDLE),
    st.builds(
        handle_of,
        st.sampled_from((RAW, LZ4, ZSTD_DICT)),
        st.integers(1, 4096),
        st.integers(0, 1000).map(lambda grains: grains * 4),
        st.sampled_from((PACKED, RAW_SEGMENT, TIER_SEGMENT, COLD_SEGMENT)),
    ),
)
STEPS = st.lists(st.tuples(st.sampled_from(("store", "drop", "move")), HANDLES, st.sampled_from((ONLY_POOL, OTHER_POOL))))


@given(STEPS)
def test_totals_and_segments_are_those_of_a_scan(steps: list[tuple[str, int, PoolId]]) -> None:
    ledger, scan = Ledger(table(), pools=2), Scan()
    for step, handle, pool in steps:
        stored = scan.pools[pool]
        oldest = next(iter(stored), None)
        if step == "store" or oldest is None:
            ledger.store(handle, pool)
            stored[handle] += 1
        elif step == "move" and handle != ZERO_HANDLE != oldest:
            ledger.move(oldest, handle, pool)
            stored[handle] += 1
            stored[oldest] -= 1
        else:
            ledger.drop(oldest, pool)
            stored[oldest] -= 1
        scan.pools[pool].__iadd__(Counter())  # forgets what is not there any more
    for pool in (ONLY_POOL, OTHER_POOL):
        assert ledger.totals(pool) == scan.totals(pool)
    for segment in (PACKED, RAW_SEGMENT, TIER_SEGMENT, COLD_SEGMENT):
        assert (ledger.live[segment], ledger.pages[segment]) == scan.live(segment)


def test_pools_are_counted_apart_and_summed_up() -> None:
    ledger, handle = Ledger(table(), pools=2), handle_of(LZ4, 100, 0, PACKED)
    ledger.store(handle, ONLY_POOL)
    ledger.store(handle, OTHER_POOL)
    ledger.store(handle, OTHER_POOL)
    assert [ledger.totals(pool).pages_by_tag[LZ4] for pool in (ONLY_POOL, OTHER_POOL)] == [1, 2]
    assert ledger.sum_of(LZ4) == 3 and ledger.live[PACKED] == 3 * record_bytes(100)


def test_a_batch_is_what_each_of_its_pages_is_and_counts_as_stored() -> None:
    ledger, one_by_one = Ledger(table()), Ledger(table())
    handles = [
        ZERO_HANDLE,
        handle_of(LZ4, 1000, 0, PACKED),
        handle_of(LZ4, 999, 2048, PACKED),
        handle_of(RAW, 4096, 0, RAW_SEGMENT),
    ]
    pages = [0] * TAGS
    for handle in handles:
        one_by_one.store(handle)
        pages[handle_accounts(handle)[1]] += 1
    ledger.add(pages, 6095, PACKED, record_bytes(1000) + record_bytes(999), RAW_SEGMENT, record_bytes(4096))
    assert ledger.totals() == one_by_one.totals()
    assert (ledger.live, ledger.pages) == (one_by_one.live, one_by_one.pages)
    assert [ledger.sum_of(counter) for counter in (STORES, RAW_STORES, STORED_BYTES)] == [4, 1, 6095]
    assert [one_by_one.sum_of(counter) for counter in (STORES, RAW_STORES, STORED_BYTES)] == [0, 0, 0]
    assert pages == [0] * TAGS


def test_what_is_dropped_says_that_its_segment_is_sparse_and_then_that_it_is_empty() -> None:
    ledger = Ledger(table())
    handles = [handle_of(RAW, 4096, at * 4108, RAW_SEGMENT) for at in range(255)]
    for handle in handles:
        ledger.store(handle)
    ledger.file(RAW_SEGMENT)
    said = [ledger.drop(handle) for handle in handles]
    assert Counter(said) == {NOTHING: 253, SPARSE: 1, EMPTIED: 1}
    assert 120 < said.index(SPARSE) < 135 and said[-1] == EMPTIED


def test_a_segment_that_is_written_back_is_counted_on_the_tier_and_a_candidate_there() -> None:
    segments = table()
    ledger = Ledger(segments)
    for at in range(3):
        ledger.store(handle_of(LZ4, 2000, at * 2012, PACKED))
    segments.move(PACKED, SEALED, 0)
    ledger.file(PACKED)
    ledger.withdraw(PACKED)
    assert not list(ledger.occupancy.candidates(LANE_PACKED))
    for state in (WRITING, ON_TIER):
        segments.move(PACKED, state, 5)
    ledger.written_back(PACKED)
    totals = ledger.totals()
    assert (totals.tier_pages, totals.tier_live_bytes, totals.cold_pages) == (3, 3 * record_bytes(2000), 0)
    assert list(ledger.occupancy.candidates(TIER)) == [PACKED]


@pytest.mark.parametrize("segment", [PACKED, TIER_SEGMENT], ids=["in RAM", "on the tier"])
def test_a_segment_that_was_set_aside_is_no_candidate_before_a_record_of_it_is_dropped(segment: SegmentId) -> None:
    ledger, group = Ledger(table()), LANE_PACKED if segment == PACKED else TIER
    handles = [handle_of(LZ4, 2000, at * 2012, segment) for at in range(3)]
    for handle in handles:
        ledger.store(handle)
    ledger.file(segment, aside=True)
    assert not list(ledger.occupancy.candidates(group))
    ledger.drop(handles[0])
    assert list(ledger.occupancy.candidates(group)) == [segment]


def test_an_open_segment_may_count_less_than_nothing_while_a_batch_is_appended() -> None:
    ledger, handle = Ledger(table()), handle_of(LZ4, 100, 0, PACKED)
    pages = [0] * TAGS
    pages[LZ4] = 3
    said = [ledger.drop(handle) for _ in range(2)]  # stored twice over, and the ledger has not been told of any yet
    assert said == [NOTHING, NOTHING] and ledger.live[PACKED] < 0
    ledger.add(pages, 300, PACKED, 3 * record_bytes(100), RAW_SEGMENT, 0)
    assert ledger.totals().pages_by_tag[LZ4] == 1 and ledger.live[PACKED] == record_bytes(100)


def _writes(tree: ast.Module) -> set[str]:
    """Arrays of a ledger that a module writes, also by a local name, and methods that change its index that it calls."""
    arrays = {"live", "pages", "counters", "floor"}
    names = {
        target.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Attribute) and node.value.attr in arrays
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    found = set()
    for node in ast.walk(tree):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AugAssign) else []
        for target in targets:
            if isinstance(target, ast.Subscript):
                of = target.value
                if isinstance(of, ast.Attribute) and of.attr in arrays and ast.unparse(of.value) != "found":
                    found.add(of.attr)
                elif isinstance(of, ast.Name) and of.id in names:
                    found.add(of.id)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and "occupancy" in ast.unparse(node.func.value):
            found |= {node.func.attr} & {"add", "set_aside", "remove", "refile"}
    return found


def test_only_the_ledger_writes_what_it_counts() -> None:
    store = Path(tmemfs.__file__).parent / "store"
    writers = {file.name: _writes(ast.parse(file.read_text())) for file in store.glob("*.py")}
    assert {name: written for name, written in writers.items() if written}.keys() == {"ledger.py", "occupancy.py"}
