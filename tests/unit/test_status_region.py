"""The status region: words and texts, as another process finds them."""

from __future__ import annotations

import os
from contextlib import closing
from itertools import pairwise
from pathlib import Path

from tmemfs.fuse.handling import IDLE, LEADER, Handling
from tmemfs.system.status_region import DIED_BY, DIED_NS, HANDLING, HAS_ANSWERED, MOST_HANDLING, Cause, Death, StatusRegion, Word


def test_another_mapping_sees_words_texts_and_what_threads_handle(tmp_path: Path) -> None:
    with closing(StatusRegion.create(tmp_path / "status")) as status:
        status.words[Word.GENERATION] = (1 << 64) - 1
        status.sign(0, "1.2.3")
        handling = Handling(status.words[HANDLING : HAS_ANSWERED + 1])
        handling.join(3)
        handling.begin(8)
        with closing(StatusRegion(os.open(tmp_path / "status", os.O_RDWR))) as other:
            assert (other.words[Word.GENERATION], other.version) == ((1 << 64) - 1, "1.2.3")
            assert other.handling()[LEADER] == 0 and other.handling()[3] == 8
            assert not other.words[HAS_ANSWERED]
            handling.end()
            assert other.handling()[3] == 8 | IDLE and other.words[HAS_ANSWERED]


def test_a_new_region_leaves_the_old_one_to_those_who_read_it(tmp_path: Path) -> None:
    with closing(StatusRegion.create(tmp_path / "status")) as old:
        old.words[Word.GENERATION] = 7
        with closing(StatusRegion.create(tmp_path / "status")) as new:
            assert (old.words[Word.GENERATION], new.words[Word.GENERATION]) == (7, 0)
    assert (tmp_path / "status").stat().st_mode & 0o777 == 0o600


def test_the_last_deaths_are_kept_and_all_are_counted() -> None:
    with closing(StatusRegion.create(None)) as status:
        for number in range(40):
            status.add_death(Death(number, Cause.CRASHED, f"worker {number} " + "é" * 300))
        assert status.words[Word.DEATHS] == 40
        assert [death.said.split()[1] for death in status.deaths()] == [str(number) for number in range(24, 40)]


def test_words_do_not_overlap() -> None:
    firsts = [HANDLING, HAS_ANSWERED, DIED_NS, DIED_BY, 256]
    assert max(Word) < HANDLING and all(after - before >= MOST_HANDLING for before, after in pairwise(firsts))
