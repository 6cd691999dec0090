"""Texts of control files: shared among the others, new for root, consistent for one handle, bounded in memory."""

from __future__ import annotations

from itertools import count

import pytest

from tmemfs.fuse.texts import OTHERS_BYTES, ROOT_BYTES, SHARED_S, Texts

ATTRIBUTE = 7


class Rendered:
    """Texts whose first line is how many there were, on a clock that stands until it is set."""

    def __init__(self, size: int = 100) -> None:
        self.now = 0.0
        self.texts = Texts(lambda: self.now)
        self.size = size
        self.count = 0

    def render(self) -> bytes:
        self.count += 1
        return (b"%d\n" % self.count).ljust(self.size, b".")

    def read(self, handle: int, offset: int = 0, size: int = 1 << 16, is_root: bool = False, attribute: int = ATTRIBUTE) -> bytes:
        return self.texts.read(handle, attribute, is_root, self.render, offset, size)

    def version(self, handle: int, is_root: bool = False) -> int:
        return int(self.read(handle, is_root=is_root).split()[0])


@pytest.fixture
def rendered() -> Rendered:
    return Rendered()


def test_many_readers_share_one_rendering(rendered: Rendered) -> None:
    assert {rendered.version(handle) for handle in range(1000)} == {1}
    rendered.now += SHARED_S
    assert {rendered.version(handle) for handle in range(1000)} == {2}


def test_each_attribute_has_its_own_text(rendered: Rendered) -> None:
    assert rendered.read(1, attribute=4) != rendered.read(1, attribute=5)


def test_root_always_gets_a_new_text(rendered: Rendered) -> None:
    assert [rendered.version(handle, is_root=True) for handle in (1, 2, 1)] == [1, 2, 3]


def test_a_write_ends_the_sharing(rendered: Rendered) -> None:
    assert rendered.version(1) == 1
    rendered.texts.forget_shared()
    assert rendered.version(2) == 2


@pytest.mark.parametrize("is_root", [True, False])
def test_what_one_handle_reads_fits_together(rendered: Rendered, is_root: bool) -> None:
    first = rendered.read(1, 0, 3, is_root)
    for other in range(2, 20):
        rendered.now += SHARED_S
        rendered.read(other, is_root=is_root)
    assert first + rendered.read(1, 3, 500, is_root) == b"1\n".ljust(100, b".")
    assert rendered.read(1, 100, 500, is_root) == b""
    assert rendered.read(1, 1, 2, is_root) == b"\n."


@pytest.mark.parametrize(("is_root", "limit"), [(True, ROOT_BYTES), (False, OTHERS_BYTES)])
def test_the_texts_that_are_kept_are_bounded(is_root: bool, limit: int) -> None:
    rendered = Rendered(size=limit // 20)
    for handle in range(1000):
        rendered.now += SHARED_S
        rendered.read(handle, 0, 10, is_root)
    kept = rendered.texts._roots if is_root else rendered.texts._others
    assert sum(map(len, kept._texts.values())) == kept._bytes <= limit


def test_a_text_that_is_larger_than_the_limit_is_read_whole() -> None:
    rendered = Rendered(size=3 * ROOT_BYTES)
    pieces = [rendered.read(1, at, 1 << 17, is_root=True) for at in range(0, 3 * ROOT_BYTES, 1 << 17)]
    assert b"".join(pieces) == b"1\n".ljust(3 * ROOT_BYTES, b".")
    assert rendered.count == 1


def test_the_end_is_found_although_the_text_fell_out_and_grew() -> None:
    rendered = Rendered()
    assert len(rendered.read(0)) == 100
    rendered.size = OTHERS_BYTES // 2
    for handle in range(1, 5):
        rendered.now += SHARED_S
        rendered.read(handle)
    assert 0 not in rendered.texts._others._texts
    assert rendered.read(0, 100) == b""


def test_the_others_do_not_push_out_what_root_reads() -> None:
    rendered = Rendered(size=OTHERS_BYTES // 2)
    begun = rendered.read(1, 0, 10, is_root=True)
    for handle in range(2, 50):
        rendered.now += SHARED_S
        rendered.read(handle)
    assert begun + rendered.read(1, 10, OTHERS_BYTES, is_root=True) == b"1\n".ljust(OTHERS_BYTES // 2, b".")


def test_nothing_is_kept_of_handles_that_were_released(rendered: Rendered) -> None:
    for handle in range(100):
        rendered.read(handle, is_root=handle % 2 == 0)
    for handle in range(100):
        rendered.texts.release(handle)
    texts = rendered.texts
    assert not (texts._ends or texts._shared or texts._roots._texts or texts._others._texts)
    assert texts._roots._bytes == texts._others._bytes == 0


def test_a_handle_that_was_never_read_may_be_released(rendered: Rendered) -> None:
    rendered.texts.release(5)


def test_reading_in_the_middle_first_gives_the_middle(rendered: Rendered) -> None:
    assert rendered.read(1, 1, 1) == b"\n"


def test_a_rendering_that_fails_leaves_the_next_one_be() -> None:
    numbers = count(1)

    def render() -> bytes:
        if next(numbers) == 1:
            raise RuntimeError("injected")
        return b"text\n"

    texts = Texts(lambda: 0.0)
    with pytest.raises(RuntimeError):
        texts.read(1, ATTRIBUTE, False, render, 0, 10)
    assert texts.read(1, ATTRIBUTE, False, render, 0, 10) == b"text\n"
