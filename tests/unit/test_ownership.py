"""What another user may have prepared is refused, as backing and as log, and nothing that may wait is opened."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tmemfs.errors import Refused
from tmemfs.system import ownership
from tmemfs.system.ownership import backing_place, open_log
from tmemfs.tiers.file import MAGIC, FileTier, check_backing
from tmemfs.units import BLOCK_BYTES

NOBODY = 65534
HEADER = MAGIC.ljust(BLOCK_BYTES, b"\0")

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: another user's files are made")
Use = Callable[[Path], object]


@pytest.fixture(autouse=True)
def files_for_root_only() -> Iterator[None]:
    """What a test writes is as private as a backing has to be."""
    before = os.umask(0o077)
    yield
    os.umask(before)


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """A directory like /tmp."""
    place = tmp_path / "shared"
    place.mkdir()
    place.chmod(0o1777)
    return place


@pytest.fixture(params=[FileTier, check_backing])
def use(request: pytest.FixtureRequest) -> Use:
    """What opens a backing, and what only checks it."""
    found: Use = request.param
    return found


def prepared(path: Path, mode: int = 0o600, owner: int = 0) -> Path:
    """A backing that somebody made."""
    path.write_bytes(HEADER)
    path.chmod(mode)
    os.chown(path, owner, owner)
    return path


@needs_root
def test_a_file_that_another_user_prepared_with_our_header_is_refused(shared: Path, use: Use) -> None:
    path = prepared(shared / "backing", owner=NOBODY)
    with pytest.raises(Refused, match=r"belongs to .*, who could read what is swapped out: move it away"):
        use(path)
    assert path.read_bytes() == HEADER and path.stat().st_uid == NOBODY


@pytest.mark.parametrize("mode", [0o640, 0o660, 0o604, 0o602, 0o606, 0o666, 0o610])
def test_a_file_that_others_may_use_is_refused(shared: Path, use: Use, mode: int) -> None:
    path = prepared(shared / "backing", mode)
    with pytest.raises(Refused, match=rf"may be used by others \(mode {mode:04o}\): move it away"):
        use(path)
    assert stat.S_IMODE(path.stat().st_mode) == mode


def test_a_file_with_a_second_name_is_refused(shared: Path, tmp_path: Path, use: Use) -> None:
    os.link(prepared(tmp_path / "victim"), shared / "backing")
    with pytest.raises(Refused, match="has 2 names, one of which may be another user's"):
        use(shared / "backing")


@pytest.mark.parametrize("exists", [True, False])
def test_a_symbolic_link_to_a_file_is_not_followed(shared: Path, tmp_path: Path, use: Use, exists: bool) -> None:
    target = tmp_path / "victim"
    if exists:
        prepared(target)
    (shared / "backing").symlink_to(target)
    with pytest.raises(Refused, match="is a symbolic link, which is not followed"):
        use(shared / "backing")
    assert target.exists() == exists


@needs_root
def test_a_directory_of_another_user_is_refused_at_any_depth(tmp_path: Path, use: Use) -> None:
    place = tmp_path / "theirs" / "ours"
    place.mkdir(parents=True)
    prepared(place / "backing")
    os.chown(tmp_path / "theirs", NOBODY, NOBODY)
    for name in ("backing", "new"):
        with pytest.raises(Refused, match=r"theirs belongs to .*, who could replace the backing: give another --backing"):
            use(place / name)
    assert [path.name for path in place.iterdir()] == ["backing"]


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o757])
def test_a_directory_that_others_may_write_to_is_refused_unless_it_is_sticky(tmp_path: Path, use: Use, mode: int) -> None:
    place = tmp_path / "open"
    place.mkdir()
    prepared(place / "backing")
    place.chmod(mode)
    for name in ("backing", "new"):
        with pytest.raises(Refused, match=r"open may be written to by others, .*: run 'chmod go-w .*open' or give another"):
            use(place / name)
    place.chmod(mode | stat.S_ISVTX)
    check_backing(place / "backing")
    check_backing(place / "new")


@needs_root
def test_a_link_of_another_user_to_a_directory_is_refused(shared: Path, tmp_path: Path, use: Use) -> None:
    (tmp_path / "place").mkdir()
    (shared / "link").symlink_to(tmp_path / "place")
    os.chown(shared / "link", NOBODY, NOBODY, follow_symlinks=False)
    with pytest.raises(Refused, match=r"link belongs to .*, who could replace the backing"):
        use(shared / "link" / "backing")


@needs_root
def test_a_link_that_leads_through_another_users_directory_is_refused(tmp_path: Path, use: Use) -> None:
    (tmp_path / "theirs" / "place").mkdir(parents=True)
    os.chown(tmp_path / "theirs", NOBODY, NOBODY)
    (tmp_path / "link").symlink_to("theirs/place")
    with pytest.raises(Refused, match=r"theirs belongs to .*, who could replace the backing"):
        use(tmp_path / "link" / "backing")


def test_a_link_to_a_directory_that_only_root_may_change_is_followed(tmp_path: Path) -> None:
    (tmp_path / "place" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to("place/../place/./deep")
    assert backing_place(tmp_path / "link" / ".." / "deep" / "backing") == tmp_path / "place" / "deep" / "backing"


def test_links_that_lead_in_a_circle_are_refused(tmp_path: Path, use: Use) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(Refused, match=r"cannot use .* \(Too many levels of symbolic links\): give another --backing"):
        use(tmp_path / "a" / "backing")


def test_a_new_file_is_for_root_only_whatever_the_umask_is(tmp_path: Path) -> None:
    os.umask(0)
    FileTier(tmp_path / "backing").close()
    assert stat.S_IMODE((tmp_path / "backing").stat().st_mode) == 0o600


def test_a_file_that_appears_just_before_ours_is_created_is_not_taken(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared(shared / "backing", 0o666)
    monkeypatch.setattr(os.path, "lexists", lambda path: False)
    with pytest.raises(Refused, match="File exists"):
        FileTier(shared / "backing")
    assert (shared / "backing").read_bytes() == HEADER


def special_files(place: Path) -> list[tuple[Path, str]]:
    """One of each kind that is no file."""
    os.mkfifo(place / "fifo")
    made = [(place / "fifo", "a FIFO"), (Path("/dev/null"), "a character device"), (place / "socket", "a socket")]
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(place / "socket"))
    return made


def test_a_fifo_a_device_or_a_socket_is_no_backing_and_is_not_opened(shared: Path, use: Use) -> None:
    for path, kind in special_files(shared):
        with pytest.raises(Refused, match=f"{path} is {kind}: give a file or a block device as --backing"):
            use(path)


def test_a_fifo_a_device_or_a_socket_is_no_log_and_is_not_opened(shared: Path) -> None:
    for path, kind in [*special_files(shared), (shared, "a directory")]:
        with pytest.raises(Refused, match=f"the log {path} is {kind}: give the path of a file as --log"):
            open_log(path)


@pytest.mark.parametrize("use", [check_backing, open_log])
def test_a_fifo_that_somebody_reads_is_not_opened_either(shared: Path, use: Use) -> None:
    os.mkfifo(shared / "fifo")
    reader = os.open(shared / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    try:
        with pytest.raises(Refused, match="is a FIFO"):
            use(shared / "fifo")
    finally:
        os.close(reader)


@needs_root
def test_a_log_that_another_user_prepared_is_refused(shared: Path) -> None:
    log = prepared(shared / "log", owner=NOBODY)
    with pytest.raises(Refused, match=r"the log .* may be another user's file \(.*\): move it away or give another --log"):
        open_log(log)
    assert log.read_bytes() == HEADER


def test_a_log_with_a_second_name_or_for_others_to_write_is_refused(shared: Path, tmp_path: Path) -> None:
    os.link(prepared(tmp_path / "victim"), shared / "log")
    with pytest.raises(Refused, match="may be another user's file"):
        open_log(shared / "log")
    with pytest.raises(Refused, match=r"may be written to by others: run 'chmod go-w .*' or give another --log"):
        open_log(prepared(shared / "other", 0o622))


@pytest.mark.parametrize("exists", [True, False])
def test_a_log_that_is_a_symbolic_link_is_not_followed(shared: Path, tmp_path: Path, exists: bool) -> None:
    target = tmp_path / "victim"
    if exists:
        prepared(target)
    (shared / "log").symlink_to(target)
    with pytest.raises(Refused, match="is a symbolic link: give the path of a file as --log"):
        open_log(shared / "log")
    assert target.exists() == exists and (not exists or target.read_bytes() == HEADER)


def test_a_log_is_appended_to(tmp_path: Path) -> None:
    for line in (b"one\n", b"two\n"):
        fd = open_log(tmp_path / "log")
        os.write(fd, line)
        os.close(fd)
    assert (tmp_path / "log").read_bytes() == b"one\ntwo\n"


def test_a_log_that_cannot_be_written_is_refused_with_the_reason(tmp_path: Path) -> None:
    for path in (tmp_path / "deeper" / "log", tmp_path / ("n" * 300)):
        with pytest.raises(Refused, match=r"cannot write the log .* \(.*\): give another --log"):
            open_log(path)


@pytest.mark.parametrize("kind", ["tmpfs", "ramfs"])
def test_a_backing_in_ram_is_refused_and_not_left_behind(
    tmp_path: Path, use: Use, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    number = next(number for number, name in ownership._IN_RAM.items() if name == kind)
    prepared(tmp_path / "backing")
    monkeypatch.setattr(ownership, "file_system", lambda fd: number)
    for name in ("backing", "new"):
        with pytest.raises(
            Refused, match=rf"{name} is in RAM \({kind}\), which would free nothing: give another --backing, on a disk"
        ):
            use(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["backing"]


def test_the_file_system_of_shared_memory_is_known() -> None:
    fd = os.open("/dev/shm", os.O_PATH)
    try:
        with pytest.raises(Refused, match=r"is in RAM \(tmpfs\)"):
            ownership.refuse_ram(Path("/dev/shm"), fd, "--backing")
    finally:
        os.close(fd)


def device(mode: int, gid: int, uid: int = 0) -> os.stat_result:
    """What fstat says of a block device with the number 7:0."""
    return os.stat_result((stat.S_IFBLK | mode, 1, 1, 1, uid, gid, 0, 0, 0, 0), {"st_rdev": os.makedev(7, 0)})


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (device(0o600, 0), None),
        (device(0o660, 0), None),
        (device(0o660, 6), None),
        (device(0o660, 100), r"may be used by others \(mode 0660\): run 'chmod 600"),
        (device(0o666, 6), r"may be used by others \(mode 0666\)"),
        (device(0o604, 6), r"may be used by others \(mode 0604\)"),
        (device(0o660, 6, NOBODY), "belongs to .*: run 'chown root"),
    ],
)
def test_a_device_may_be_used_by_root_and_the_group_disk(
    monkeypatch: pytest.MonkeyPatch, found: os.stat_result, says: str | None
) -> None:
    monkeypatch.setattr(ownership, "_disk_groups", lambda: (0, 6))
    if says:
        with pytest.raises(Refused, match=says):
            ownership._refuse_shared_device(Path("/dev/x"), found)
    else:
        ownership._refuse_shared_device(Path("/dev/x"), found)


@pytest.mark.parametrize(("name", "kind"), [("zram0", "zram0"), ("ram1", "ram1"), ("sda", None), ("program0", None)])
def test_a_disk_of_ram_is_known_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, kind: str | None) -> None:
    (tmp_path / "block" / name / "part").mkdir(parents=True)
    (tmp_path / "7:0").symlink_to(f"block/{name}/part")
    monkeypatch.setattr(ownership, "_SYS_DEVICES", tmp_path)
    assert ownership._ram_device(device(0o600, 0)) == kind


def test_a_loop_device_over_a_file_in_ram_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "7:0" / "loop").mkdir(parents=True)
    (tmp_path / "7:0" / "loop" / "backing_file").write_text("/dev/shm\n")
    monkeypatch.setattr(ownership, "_SYS_DEVICES", tmp_path)
    assert ownership._ram_device(device(0o600, 0)) == "a file on tmpfs"
