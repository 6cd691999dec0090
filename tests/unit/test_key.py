"""The key of a mount: random, one for all who have its descriptor, in memory that is locked and in no core file."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.mappings import flags_of
from tmemfs.system.key import KEY_BYTES, Key


@pytest.fixture
def key() -> Iterator[Key]:
    key = Key.create()
    yield key
    key.close()


def test_a_key_is_random_and_of_its_size(key: Key) -> None:
    other = Key.create()
    assert len(key.view) == len(other.view) == KEY_BYTES == 32
    assert bytes(key.view) != bytes(other.view)
    assert len(set(key.view)) > 10
    other.close()


def test_a_descriptor_gives_the_same_key_to_each_that_adopts_it(key: Key) -> None:
    adopted = Key.adopt(os.dup(key.fd))
    assert bytes(adopted.view) == bytes(key.view)
    adopted.close()


def test_a_forked_process_has_the_same_key(key: Key) -> None:
    child = os.fork()
    if not child:
        os._exit(sum(Key.adopt(key.fd).view) % 251)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == sum(key.view) % 251


def test_a_key_is_not_inherited_by_other_programs(key: Key) -> None:
    assert not os.get_inheritable(key.fd)


def test_a_key_is_locked_and_in_no_core_file(key: Key) -> None:
    found = flags_of("/memfd:tmemfs-key")
    assert key.lock.ok and found
    assert all({"lo", "dd"} <= flags for flags in found)


def test_a_key_that_is_forgotten_is_gone_for_all_who_have_it(key: Key) -> None:
    adopted = Key.adopt(os.dup(key.fd))
    adopted.forget()
    assert bytes(key.view) == bytes(KEY_BYTES)


def test_without_memory_for_a_key_nothing_is_left_open(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("injected")

    before = os.listdir("/proc/self/fd")
    monkeypatch.setattr("tmemfs.system.memory.fill_random", fail)
    with pytest.raises(OSError, match="injected"):
        Key.create()
    assert os.listdir("/proc/self/fd") == before
