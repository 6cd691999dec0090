"""Settings of the machine: recorded once, never lowered below half, restored by the daemon that is left, whatever was killed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from tempfile import mkdtemp

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tests.examples import FACTOR
from tests.settings_place import ORDINARY, PRIORITY, Killed, Machine
from tmemfs.errors import Busy
from tmemfs.system import kernel_settings
from tmemfs.system.kernel_settings import BOOST, MINIMUM, KernelSettings, SettingsRecord, held_user, lowered

#: No one of them is a lowered value of another, so what is found says who wrote it.
MINIMA = (67584, 40961, 8191, 99991)
FACTORS = (15000, 300, 7)
WORKERS = {40: "kworker/u8:0-flush", 41: "kworker/u8:1+loop0", 42: "kworker/0:1", 43: "kworker/u9:0", 44: "kworker/u8:2"}
#: Had this priority, or another that an administrator gave it, before us.
BEFORE = {43: PRIORITY, 44: (os.SCHED_FIFO, 50)}


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    machine = Machine(tmp_path)
    machine.scheduling |= BEFORE
    machine.threads(WORKERS)
    with machine.running():
        yield machine


def is_as_before(machine: Machine) -> bool:
    """Whether every setting is the first administrator's, and no record is left."""
    workers = {pid: BEFORE.get(pid, ORDINARY) for pid in WORKERS}
    values = (machine.now(MINIMUM), machine.now(BOOST))
    return values == (67584, 15000) and machine.scheduling == workers and not (machine.directory / "kernel-settings").exists()


def change_everything(user: KernelSettings) -> None:
    user.register()
    assert user.lower_minimum(1 / 2)
    user.give_priority()


def test_what_was_changed_is_restored_by_the_one_that_changed_it(machine: Machine) -> None:
    user = machine.user()
    change_everything(user)
    assert (machine.now(MINIMUM), machine.now(BOOST)) == (33792, 0) and user.raised_workers == 2
    assert {pid for pid, found in machine.scheduling.items() if found == PRIORITY} == {40, 41, 43}
    assert {change.name: change.administrators for change in user.changes()} == {MINIMUM: 67584, BOOST: 15000}
    user.release()
    assert is_as_before(machine) and not user.changes() and not user.raised_workers


def test_without_registration_nothing_is_changed(machine: Machine) -> None:
    user = machine.user()
    assert not user.lower_minimum(1 / 2)
    user.give_priority()
    user.restore_minimum()
    user.take_priority()
    user.restore_leftovers()
    user.release()
    assert is_as_before(machine) and not machine.directory.exists()


def test_a_lowered_value_of_another_is_never_taken_for_the_administrators(machine: Machine) -> None:
    """It went from 67584 to 0 in steps, with six daemons."""
    users = [machine.user() for _ in range(6)]
    for user in users:
        change_everything(user)
        assert machine.now(MINIMUM) == 33792
    for user in users[:-1]:
        user.release()
        assert machine.now(BOOST) == 0
    users[-1].release()
    assert is_as_before(machine)


def test_what_a_killed_one_left_is_restored_by_the_next_and_recorded_again(machine: Machine) -> None:
    killed = machine.user()
    change_everything(killed)
    machine.kill(killed)
    following = machine.user()
    following.register()
    assert machine.now(MINIMUM) == 67584 and machine.scheduling[40] == ORDINARY
    assert [change.administrators for change in following.changes()] == [67584, 15000]
    following.release()
    assert is_as_before(machine)


@pytest.mark.parametrize("is_other_alive", [False, True])
def test_down_restores_what_a_killed_one_left(machine: Machine, is_other_alive: bool) -> None:
    killed, other = machine.user(), machine.user()
    if is_other_alive:
        other.register()
    change_everything(killed)
    machine.kill(killed)
    machine.user().restore_leftovers()
    assert machine.now(MINIMUM) == 67584 and machine.scheduling[40] == ORDINARY
    assert machine.now(BOOST) == (0 if is_other_alive else 15000)  # the other one still needs that
    other.release()
    assert is_as_before(machine)


def test_one_that_another_undid_makes_it_again(machine: Machine) -> None:
    one, other = machine.user(), machine.user()
    change_everything(one)
    change_everything(other)
    one.release()
    assert machine.now(MINIMUM) == 67584 and machine.scheduling[41] == ORDINARY
    other.give_priority()
    assert other.lower_minimum(1 / 2)
    assert machine.now(MINIMUM) == 33792 and machine.scheduling[41] == PRIORITY
    other.release()
    assert is_as_before(machine)


def test_one_that_needs_less_does_not_raise_what_another_lowered_further(machine: Machine) -> None:
    one, other = machine.user(), machine.user()
    change_everything(one)
    other.register()
    assert other.lower_minimum(3 / 4) and machine.now(MINIMUM) == 33792
    one.release()
    other.release()
    assert is_as_before(machine)


@pytest.mark.parametrize("ended_by", ["release", "kill"])
def test_what_the_administrator_sets_meanwhile_stays(machine: Machine, ended_by: str) -> None:
    user = machine.user()
    change_everything(user)
    machine.set(MINIMUM, 40961)
    machine.set(BOOST, 300)
    assert not user.lower_minimum(1 / 2)
    assert {(change.now, change.administrators) for change in user.changes()} == {(40961, 40961), (300, 300)}
    if ended_by == "kill":
        machine.kill(user)
        user = machine.user()
        user.restore_leftovers()
    user.release()
    assert (machine.now(MINIMUM), machine.now(BOOST)) == (40961, 300)
    change_everything(user := machine.user())
    assert machine.now(MINIMUM) == 20481
    user.release()
    assert (machine.now(MINIMUM), machine.now(BOOST)) == (40961, 300)


def test_what_could_not_be_restored_is_not_recorded_as_the_administrators(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = machine.user()
    change_everything(killed)
    machine.kill(killed)
    following = machine.user()
    with monkeypatch.context() as patch:
        patch.setattr("tmemfs.system.sysctl.Sysctl.write", lambda *_: False)
        following.register()
    assert machine.now(MINIMUM) == 33792
    following.lower_minimum(1 / 2)
    assert machine.now(MINIMUM) == 33792
    following.release()
    assert is_as_before(machine)


def test_a_record_of_another_boot_says_nothing(machine: Machine) -> None:
    killed = machine.user()
    change_everything(killed)
    machine.kill(killed)
    machine.boot("second")
    machine.set(MINIMUM, 33792)
    machine.set(BOOST, 15000)
    user = machine.user()
    user.restore_leftovers()
    assert machine.now(MINIMUM) == 33792 and not (machine.directory / "kernel-settings").exists()
    user.register()
    user.lower_minimum(1 / 2)
    assert machine.now(MINIMUM) == 16896
    user.release()
    assert machine.now(MINIMUM) == 33792


@pytest.mark.parametrize(
    "record", [b"", b"{", b"[]", b"null", b'{"boot": "first", "values": {"min_free_kbytes": "x"}, "workers": []}']
)
def test_a_damaged_record_is_none(machine: Machine, record: bytes) -> None:
    machine.directory.mkdir()
    (machine.directory / "kernel-settings").write_bytes(record)
    user = machine.user()
    user.restore_leftovers()
    change_everything(user)
    user.release()
    assert is_as_before(machine)


def test_where_the_record_was_removed_a_second_user_changes_nothing(machine: Machine) -> None:
    one, other = machine.user(), machine.user()
    change_everything(one)
    (machine.directory / "kernel-settings").unlink()
    other.register()
    assert not other.lower_minimum(1 / 2) and not other.changes()
    other.release()
    one.release()
    assert is_as_before(machine)


def test_where_the_directory_was_removed_the_last_one_restores_all_the_same(machine: Machine) -> None:
    user = machine.user()
    change_everything(user)
    shutil.rmtree(machine.directory)
    user.release()
    assert is_as_before(machine)


def test_without_the_right_nothing_is_changed(machine: Machine) -> None:
    shutil.rmtree(machine.root / "proc/sys/vm")
    user = machine.user()
    user.register()
    assert not user.lower_minimum(1 / 2) and not user.changes()
    user.release()


def test_a_lock_that_is_not_released_is_said_and_nothing_is_changed(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_settings, "_LOCK_S", 0.02)
    user, other = machine.user(), machine.user()
    user.register()
    with other._lock():
        with pytest.raises(Busy, match="fuser"):
            machine.user().register()
        user.release()
    assert machine.now(BOOST) == 0
    machine.user().restore_leftovers()
    assert is_as_before(machine)


def test_findings_say_what_is_changed_and_for_whom(machine: Machine) -> None:
    reader, user = machine.user(), machine.user()
    assert reader.findings() == kernel_settings.Findings()
    change_everything(user)
    found = reader.findings()
    assert {(change.name, change.now, change.administrators) for change in found.changed} == {
        (MINIMUM, 33792, 67584),
        (BOOST, 0, 15000),
    }
    assert found.workers == 2 and found.is_in_use
    machine.kill(user)
    assert not reader.findings().is_in_use


def test_a_record_is_what_was_encoded() -> None:
    record = SettingsRecord("b", {MINIMUM: 5, BOOST: 0}, frozenset((3, 9)))
    assert SettingsRecord.decode(record.encode()) == record


@pytest.mark.parametrize(("value", "half"), [(67584, 33792), (9999, 5000), (1, 1), (0, 0)])
def test_half_is_not_passed_by_rounding(value: int, half: int) -> None:
    assert lowered(value, 1 / 2) == half


class Interleavings(RuleBasedStateMachine):
    """Three daemons and a `down`, each killed before any call that changes something, and an administrator."""

    def __init__(self) -> None:
        super().__init__()
        self.machine = Machine(Path(mkdtemp()))
        self.machine.scheduling |= BEFORE
        self.machine.threads(WORKERS)
        self.administrators = {MINIMUM: 67584, BOOST: 15000}
        self.running = self.machine.running()
        self.running.__enter__()
        self.users = [self.machine.user() for _ in range(3)]

    which = st.integers(0, 2)
    dies_after = st.one_of(st.none(), st.integers(0, 14))

    @rule(at=which, dies_after=dies_after)
    def register(self, at: int, dies_after: int | None) -> None:
        self._do(at, "register", (), dies_after)

    @rule(at=which, dies_after=dies_after)
    def release(self, at: int, dies_after: int | None) -> None:
        self._do(at, "release", (), dies_after)

    @rule(at=which, share=st.sampled_from((3 / 4, 1 / 2)), dies_after=dies_after)
    def lower(self, at: int, share: float, dies_after: int | None) -> None:
        self._do(at, "lower_minimum", (share,), dies_after)

    @rule(at=which, what=st.sampled_from(("restore_minimum", "give_priority", "take_priority")), dies_after=dies_after)
    def other(self, at: int, what: str, dies_after: int | None) -> None:
        self._do(at, what, (), dies_after)

    @rule(dies_after=dies_after)
    def down(self, dies_after: int | None) -> None:
        self.users.append(self.machine.user())
        self._do(3, "restore_leftovers", (), dies_after)
        self.users.pop()

    @rule(at=which)
    def kill(self, at: int) -> None:
        self.machine.kill(self.users[at])
        self.users[at] = self.machine.user()

    @rule(value=st.sampled_from(MINIMA))
    def administrator_sets_the_minimum(self, value: int) -> None:
        self.machine.set(MINIMUM, value)
        self.administrators[MINIMUM] = value

    @rule(value=st.sampled_from(FACTORS))
    def administrator_sets_the_factor(self, value: int) -> None:
        self.machine.set(BOOST, value)
        self.administrators[BOOST] = value

    @invariant()
    def nothing_is_below_half_of_the_administrators(self) -> None:
        minimum = self.administrators[MINIMUM]
        assert self.machine.now(MINIMUM) in (minimum, lowered(minimum, 3 / 4), lowered(minimum, 1 / 2))
        assert self.machine.now(BOOST) in (self.administrators[BOOST], 0)
        assert self.machine.scheduling[43] == BEFORE[43] and self.machine.scheduling[44] == BEFORE[44]
        assert self.machine.scheduling[42] == ORDINARY

    def teardown(self) -> None:
        """However they ended, `down` leaves the administrator's values."""
        for at, user in enumerate(self.users):
            user.release() if at else self.machine.kill(user)
        self.machine.user().restore_leftovers()
        self.running.__exit__(None, None, None)
        found = {name: self.machine.now(name) for name in self.administrators}
        names = [file.name for file in self.machine.directory.glob("*")]
        shutil.rmtree(self.machine.root)
        assert found == self.administrators
        assert self.machine.scheduling == {pid: BEFORE.get(pid, ORDINARY) for pid in WORKERS}
        assert names in ([], ["kernel-settings+lock"]), names

    def _do(self, at: int, name: str, arguments: tuple[float, ...], dies_after: int | None) -> None:
        self.machine.calls_left = dies_after
        try:
            getattr(self.users[at], name)(*arguments)
        except Killed:
            self.machine.calls_left = None
            self.kill(at)
        self.machine.calls_left = None


TestInterleavings = Interleavings.TestCase
TestInterleavings.settings = settings(max_examples=150 * FACTOR, stateful_step_count=30, deadline=None)


def test_a_user_that_is_held_outlives_its_process(machine: Machine) -> None:
    machine.directory.mkdir()
    held = held_user(machine.directory)
    assert held is not None
    proc = machine.root / "proc"
    first = KernelSettings(machine.directory, proc, held)
    assert not first.is_registered
    first.register()
    assert first.lower_minimum(1 / 2) and machine.now(BOOST) == 0
    first.close()  # it is killed
    with closing(KernelSettings(machine.directory, proc)) as another:
        another.restore_leftovers()  # as `tmemfs down` of another mount does
        assert another.findings().is_in_use and machine.now(BOOST) == 0
    second = KernelSettings(machine.directory, proc, held)
    second.resume()
    assert second.is_registered and machine.now(MINIMUM) == 67584
    assert second.lower_minimum(3 / 4)
    second.release()
    assert (machine.now(MINIMUM), machine.now(BOOST)) == (67584, 15000)
    assert not second.is_registered and not second.findings().is_in_use
    second.register()  # the swap is turned on again
    assert machine.now(BOOST) == 0
    second.release()
    assert machine.now(BOOST) == 15000
    second.drop_held()
    second.close()
    os.close(held)
    assert not list(machine.directory.glob("*held*"))


def test_what_a_held_user_left_is_restored_once_nobody_has_it(machine: Machine) -> None:
    machine.directory.mkdir()
    held = held_user(machine.directory)
    assert held is not None
    user = KernelSettings(machine.directory, machine.root / "proc", held)
    user.register()
    user.close()
    os.close(held)  # the supervisor is killed
    with closing(KernelSettings(machine.directory, machine.root / "proc")) as other:
        other.restore_leftovers()
    assert machine.now(BOOST) == 15000
