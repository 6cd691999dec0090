"""What an earlier worker read and did not answer: found by the next one, each once, and done marks that belong to their request."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from struct import Struct

import pytest

from tmemfs.fuse import wire
from tmemfs.fuse.kept_requests import BUFFERS, ENTRIES, ENTRY_BYTES, PAGE_ENTRIES, KeptRequests
from tmemfs.store.region import Region

INODE = 2
_IO = Struct("<IIQQ16xQQI20x")
GETATTR = 3


@pytest.fixture
def region() -> Iterator[Region]:
    made = Region("requests", KeptRequests.region_bytes(keeps=True))
    yield made
    made.close()


def worker(region: Region) -> KeptRequests:
    return KeptRequests(region, True, INODE)


def read(kept: KeptRequests, opcode: int, unique: int, node: int = INODE, data: bytes = b"") -> tuple[memoryview, memoryview, int]:
    """Read a request into the current buffer, as the kernel fills it."""
    head, into = kept.buffer()
    head[:] = _IO.pack(_IO.size + len(data), opcode, unique, node, 0, 0, len(data))
    into[: len(data)] = data
    return head, into, _IO.size + len(data)


def uniques(kept: KeptRequests) -> list[int]:
    return [request.unique for request in kept.left_over()]


def test_what_was_read_last_is_left_over(region: Region) -> None:
    read(worker(region), wire.WRITE, 4, data=b"x" * 4096)
    (request,) = worker(region).left_over()
    assert (request.unique, request.opcode, request.node, request.done) == (4, wire.WRITE, INODE, None)
    assert request.data is not None and bytes(request.data[:4096]) == b"x" * 4096


def test_stores_that_wait_keep_their_data_and_their_order(region: Region) -> None:
    kept = worker(region)
    for unique in (8, 4, 6):
        read(kept, wire.WRITE, unique, data=bytes([unique]) * 4096)
        kept.keep_store(unique)
    kept.answered(4)
    left = worker(region).left_over()
    assert [(request.unique, bytes((request.data or b"")[:1])) for request in left] == [(6, b"\x06"), (8, b"\x08")]


def test_more_stores_than_buffers_are_left_without_their_data(region: Region) -> None:
    kept = worker(region)
    for unique in range(1, BUFFERS + 3):
        read(kept, wire.WRITE, unique, data=b"x" * 4096)
        kept.keep_store(unique)
    left = worker(region).left_over()
    assert [request.unique for request in left] == list(range(1, BUFFERS + 3))
    assert [request.unique for request in left if request.data is None] == [BUFFERS, BUFFERS + 1, BUFFERS + 2]


def test_a_request_that_is_done_is_left_with_its_errno(region: Region) -> None:
    kept = worker(region)
    read(kept, wire.WRITE, 4)
    kept.answering(4, 28)
    assert [(request.unique, request.done) for request in worker(region).left_over()] == [(4, 28)]


def test_a_request_without_a_place_does_not_take_the_mark_of_another(region: Region) -> None:
    kept = worker(region)
    read(kept, wire.WRITE, 4)
    kept.answering(4, 0)
    kept.answering(6, 5)  # by another thread
    assert [(request.unique, request.done) for request in worker(region).left_over()] == [(4, 0)]


def test_a_request_too_large_for_an_entry_leaves_its_head(region: Region) -> None:
    kept = worker(region)
    head, data, count = read(kept, wire.WRITE, 4, node=9, data=b"x" * ENTRY_BYTES)
    kept.keep(4, head, data, count)
    kept.forget_current()
    assert [(request.unique, request.data) for request in worker(region).left_over()] == [(4, None)]


def test_without_a_free_entry_a_request_is_not_kept(region: Region) -> None:
    kept = worker(region)
    for unique in range(1, ENTRIES + 2):
        kept.keep(unique, *read(kept, GETATTR, unique, node=1))
    kept.forget_current()
    assert len(uniques(worker(region))) == ENTRIES


def test_control_files_leave_entries_to_pages(region: Region) -> None:
    kept = worker(region)
    for unique in range(2, 2 * ENTRIES, 2):
        kept.keep(unique, *read(kept, GETATTR, unique, node=1), PAGE_ENTRIES)
    kept.keep(1, *read(kept, wire.READ, 1))
    kept.forget_current()
    left = uniques(worker(region))
    assert len(left) == ENTRIES - PAGE_ENTRIES + 1 and left[0] == 1


def killed_within(step: Callable[[], object], monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Run `step` in a worker that is killed as it calls wire.`name`."""

    class Killed(BaseException):
        pass

    def kill(*arguments: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(wire, name, kill)
        with pytest.raises(Killed):
            step()


def test_a_discard_in_both_places_is_not_done_again_after_its_answer(region: Region, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would forget what was written since."""
    read(worker(region), wire.FALLOCATE, 4)
    killed_within(lambda: worker(region), monkeypatch, "clear_unique")  # it has moved the discard, and left it in the buffer, too
    third = worker(region)
    assert uniques(third) == [4]
    third.answering(4, 0)
    third.answered(4)
    assert uniques(worker(region)) == []


def test_a_discard_that_is_done_is_moved_with_its_mark(region: Region, monkeypatch: pytest.MonkeyPatch) -> None:
    first = worker(region)
    read(first, wire.FALLOCATE, 4)
    first.answering(4, 0)
    copy = wire.copy_request

    def copy_and_die(*arguments: memoryview) -> None:
        copy(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(wire, "copy_request", copy_and_die)
        with pytest.raises(KeyboardInterrupt):
            worker(region)
    assert [(request.unique, request.done) for request in worker(region).left_over()] == [(4, 0)]


def test_where_the_kernel_hands_requests_out_again_nothing_is_kept() -> None:
    region = Region("requests", KeptRequests.region_bytes(keeps=False))
    kept = KeptRequests(region, False, INODE)
    head, data, count = read(kept, wire.WRITE, 4)
    kept.keep_store(4)
    kept.keep(6, head, data, count)
    kept.answering(4, 0)
    assert kept.buffer()[0].obj is head.obj and not KeptRequests(region, False, INODE).left_over()
    region.close()
