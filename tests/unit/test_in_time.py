"""An answer that comes in time, an error that comes in time, and one that never comes."""

from __future__ import annotations

import os
import signal
from typing import NoReturn

import pytest

from tests.waiting import readable
from tmemfs.errors import BadValue, NoAnswer
from tmemfs.system.in_time import in_time


def test_an_answer_is_returned() -> None:
    assert in_time(lambda: {"pid": os.getppid()}, 60) == {"pid": os.getpid()}
    assert in_time(lambda: "x" * (1 << 20), 60) == "x" * (1 << 20)
    assert in_time(lambda: None, 60) is None


def test_an_error_is_raised() -> None:
    def fail() -> NoReturn:
        raise BadValue("no: say yes")

    with pytest.raises(BadValue, match=r"^no: say yes$"):
        in_time(fail, 60)
    with pytest.raises(FileNotFoundError):
        in_time(lambda: os.stat("/no/such/file"), 60)


def test_no_answer_in_time_is_an_error_and_leaves_no_descriptor_held() -> None:
    reader, writer = os.pipe()
    with pytest.raises(NoAnswer):
        in_time(signal.pause, 0.05)
    os.close(writer)
    assert readable(reader) and not os.read(reader, 1)  # nobody else has the other end
    os.close(reader)
