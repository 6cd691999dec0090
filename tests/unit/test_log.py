"""The log in the background: nobody who logs waits for the file, and nothing that was logged is lost while it can be kept."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator

import pytest

from tests.waiting import HANG_S
from tmemfs.system import log as log_module
from tmemfs.system.log import log_in_background

log = logging.getLogger("tmemfs.tested")


class Slow(logging.Handler):
    """A file that takes nothing until it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.opened = threading.Event()
        self.written: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.opened.wait(HANG_S)
        self.written.append(record.getMessage())


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[Slow]:
    handler = Slow()
    monkeypatch.setattr(logging.getLogger(), "handlers", [handler])
    monkeypatch.setattr(log, "level", logging.INFO)
    yield handler
    handler.opened.set()


def test_nobody_waits_for_a_log_that_takes_nothing(slow: Slow) -> None:
    with log_in_background():
        for number in range(3):
            log.info("message %d", number)
        assert not slow.written  # and the handler still waits
        slow.opened.set()
    assert slow.written == ["message 0", "message 1", "message 2"]


def test_what_is_logged_is_what_it_was_when_it_was_logged(slow: Slow) -> None:
    names = ["before"]
    with log_in_background():
        log.info("%s", names)
        names[0] = "after"
        slow.opened.set()
    assert slow.written == ["['before']"]


def test_more_than_can_be_kept_is_counted(slow: Slow, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_module, "MOST_WAITING", 2)
    with log_in_background():
        for number in range(100):
            log.info("message %d", number)
        slow.opened.set()
        while len(slow.written) < 2:
            time.sleep(0.001)
        log.info("the last one")
    assert len(slow.written) < 6
    assert slow.written[-1].startswith("the last one (and ") and slow.written[-1].endswith(
        "messages before this one were not kept)"
    )


def test_a_log_that_never_takes_anything_does_not_keep_the_daemon(slow: Slow, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_module, "_WRITTEN_S", 0.05)
    with log_in_background():
        log.info("lost")
    assert not slow.written


def test_afterwards_the_log_is_written_directly_again(slow: Slow) -> None:
    slow.opened.set()
    with log_in_background():
        pass
    log.info("directly")
    assert slow.written == ["directly"]
