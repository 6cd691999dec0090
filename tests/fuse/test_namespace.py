"""A real mount is asked for everything that it does not offer, by root and by others: nothing of it changes or harms the image."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import stat
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Final

import pytest

from tests.mounted import Place, directory_for_all, mounted, readable, wait_until
from tests.parts import page_of
from tmemfs.control_files import FILES
from tmemfs.units import MIB, PAGE_BYTES

pytestmark = pytest.mark.fuse

SIZE: Final = 256 * MIB
SLOTS: Final = 8
NOBODY: Final = 65534
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_libc.renameat2.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
KEEP_SIZE, PUNCH_HOLE, COLLAPSE, ZERO_RANGE, INSERT, UNSHARE = 0x01, 0x02, 0x08, 0x10, 0x20, 0x40
RENAME_NOREPLACE, RENAME_EXCHANGE = 1, 2
_FS_IOC_SETFLAGS: Final = 0x40086602
_IMMUTABLE: Final = 0x10

CAPABILITIES: Final = (0x0200_0000).to_bytes(4, "little") + bytes(16)

Act = Callable[[Place], object]


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    with directory_for_all() as directory, mounted(directory) as place:
        with opened(place, os.O_WRONLY) as fd:
            os.pwrite(fd, b"".join(page_of("half", slot) for slot in range(SLOTS)), 0)
            os.pwrite(fd, page_of("half", 99), SIZE - PAGE_BYTES)
        yield place


class opened:
    """The image, opened with `flags`."""

    def __init__(self, place: Place, flags: int) -> None:
        self.fd = os.open(place.image, flags)

    def __enter__(self) -> int:
        return self.fd

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)


def errno_of(act: Callable[[], object]) -> int:
    """The errno that `act` fails with."""
    with pytest.raises(OSError) as caught:
        act()
    return caught.value.errno or 0


def assert_unharmed(place: Place) -> None:
    """Size, mode, contents, and the names in both directories are as ever."""
    with opened(place, os.O_RDONLY) as fd:
        for found in (os.fstat(fd), place.image.stat()):
            assert (found.st_size, found.st_uid, found.st_gid, found.st_mode) == (SIZE, 0, 0, stat.S_IFREG | 0o600)
        assert os.pread(fd, SLOTS * PAGE_BYTES, 0) == b"".join(page_of("half", slot) for slot in range(SLOTS))
        assert os.pread(fd, 2 * PAGE_BYTES, SIZE - PAGE_BYTES) == page_of("half", 99)
    assert sorted(os.listdir(place.mountpoint)) == ["control", "swap"]
    assert sorted(os.listdir(place.mountpoint / "control")) == sorted(file.name for file in FILES)
    assert place.state == "running"


def renameat2(old: Path, new: Path, flags: int) -> None:
    if _libc.renameat2(-100, os.fsencode(old), -100, os.fsencode(new), flags):
        raise OSError(ctypes.get_errno(), "renameat2")


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    if _libc.fallocate(fd, mode, offset, length):
        raise OSError(ctypes.get_errno(), "fallocate")


def by_fd(flags: int, act: Callable[[int], object]) -> Act:
    """`act` on the image opened with `flags`."""

    def on(place: Place) -> object:
        with opened(place, flags) as fd:
            return act(fd)

    return on


def create_socket(path: Path) -> None:
    os.mknod(path, stat.S_IFSOCK | 0o600)


HARMS: Final[dict[str, tuple[int, Act]]] = {
    "open with O_TRUNC to write": (errno.EPERM, lambda p: os.open(p.image, os.O_WRONLY | os.O_TRUNC)),
    "open with O_TRUNC to read": (errno.EPERM, lambda p: os.open(p.image, os.O_RDONLY | os.O_TRUNC)),
    "open with O_TRUNC and O_CREAT": (errno.EPERM, lambda p: os.open(p.image, os.O_RDWR | os.O_CREAT | os.O_TRUNC)),
    "open with O_EXCL": (errno.EEXIST, lambda p: os.open(p.image, os.O_RDWR | os.O_CREAT | os.O_EXCL)),
    "open as a directory": (errno.ENOTDIR, lambda p: os.open(p.image, os.O_RDONLY | os.O_DIRECTORY)),
    "truncate to nothing": (errno.EINVAL, lambda p: os.truncate(p.image, 0)),
    "truncate to less": (errno.EINVAL, lambda p: os.truncate(p.image, SIZE - 1)),
    "truncate to more": (errno.EINVAL, lambda p: os.truncate(p.image, SIZE + 1)),
    "ftruncate to nothing": (errno.EINVAL, by_fd(os.O_WRONLY, lambda fd: os.ftruncate(fd, 0))),
    "ftruncate to more": (errno.EINVAL, by_fd(os.O_WRONLY, lambda fd: os.ftruncate(fd, 1 << 40))),
    "chmod": (errno.EPERM, lambda p: os.chmod(p.image, 0o666)),
    "fchmod": (errno.EPERM, by_fd(os.O_RDONLY, lambda fd: os.fchmod(fd, 0o4777))),
    "chown to a user": (errno.EPERM, lambda p: os.chown(p.image, NOBODY, -1)),
    "chown to a group": (errno.EPERM, lambda p: os.chown(p.image, -1, NOBODY)),
    "set times": (errno.EPERM, lambda p: os.utime(p.image, (1, 1))),
    "set times to now": (errno.EPERM, lambda p: os.utime(p.image)),
    "rename within the directory": (errno.EPERM, lambda p: os.rename(p.image, p.mountpoint / "other")),
    "rename into control": (errno.EPERM, lambda p: os.rename(p.image, p.mountpoint / "control" / "swap")),
    "rename a control file over it": (errno.EPERM, lambda p: os.rename(p.mountpoint / "control" / "codec", p.image)),
    "rename control": (errno.EPERM, lambda p: os.rename(p.mountpoint / "control", p.mountpoint / "other")),
    "rename to another file system": (errno.EXDEV, lambda p: os.rename(p.image, p.directory / "other")),
    "rename a foreign file over it": (errno.EXDEV, lambda p: os.rename(p.log, p.image)),
    "rename without replacing": (errno.EPERM, lambda p: renameat2(p.image, p.mountpoint / "other", RENAME_NOREPLACE)),
    "exchange": (errno.EPERM, lambda p: renameat2(p.image, p.mountpoint / "control" / "codec", RENAME_EXCHANGE)),
    "unlink": (errno.EPERM, lambda p: os.unlink(p.image)),
    "unlink a control file": (errno.EPERM, lambda p: os.unlink(p.mountpoint / "control" / "codec")),
    "rmdir": (errno.EPERM, lambda p: os.rmdir(p.mountpoint / "control")),
    "link": (errno.EPERM, lambda p: os.link(p.image, p.mountpoint / "other")),
    "link a control file": (errno.EPERM, lambda p: os.link(p.mountpoint / "control" / "codec", p.mountpoint / "other")),
    "symlink": (errno.EPERM, lambda p: os.symlink("swap", p.mountpoint / "other")),
    "symlink in control": (errno.EPERM, lambda p: os.symlink("../swap", p.mountpoint / "control" / "other")),
    "mknod of a file": (errno.EPERM, lambda p: os.mknod(p.mountpoint / "other")),
    "mknod of a device": (errno.EPERM, lambda p: os.mknod(p.mountpoint / "other", stat.S_IFBLK | 0o600, os.makedev(7, 0))),
    "mknod of a socket": (errno.EPERM, lambda p: create_socket(p.mountpoint / "other")),
    "mkfifo": (errno.EPERM, lambda p: os.mkfifo(p.mountpoint / "other")),
    "mkdir": (errno.EPERM, lambda p: os.mkdir(p.mountpoint / "other")),
    "mkdir in control": (errno.EPERM, lambda p: os.mkdir(p.mountpoint / "control" / "other")),
    "mkdir of what is there": (errno.EEXIST, lambda p: os.mkdir(p.image)),
    "create": (errno.EPERM, lambda p: os.open(p.mountpoint / "other", os.O_RDWR | os.O_CREAT)),
    "create in control": (errno.EPERM, lambda p: os.open(p.mountpoint / "control" / "other", os.O_WRONLY | os.O_CREAT | os.O_EXCL)),
    "create without a name": (errno.EOPNOTSUPP, lambda p: os.open(p.mountpoint, os.O_RDWR | os.O_TMPFILE)),
    "set an extended attribute": (errno.EOPNOTSUPP, lambda p: os.setxattr(p.image, "user.a", b"1")),
    "set a capability": (errno.EOPNOTSUPP, lambda p: os.setxattr(p.image, "security.capability", CAPABILITIES)),
    "set an access list": (errno.EOPNOTSUPP, lambda p: os.setxattr(p.image, "system.posix_acl_access", b"\2\0\0\0")),
    "remove an extended attribute": (errno.EOPNOTSUPP, lambda p: os.removexattr(p.image, "user.a")),
    "get an extended attribute": (errno.EOPNOTSUPP, lambda p: os.getxattr(p.image, "user.a")),
    "make it immutable": (
        errno.ENOTTY,
        by_fd(os.O_RDONLY, lambda fd: fcntl.ioctl(fd, _FS_IOC_SETFLAGS, _IMMUTABLE.to_bytes(8, "little"))),
    ),
    "map shared": (errno.ENODEV, by_fd(os.O_RDWR, lambda fd: mmap.mmap(fd, PAGE_BYTES, mmap.MAP_SHARED))),
    "map shared to read": (errno.ENODEV, by_fd(os.O_RDONLY, lambda fd: mmap.mmap(fd, PAGE_BYTES, prot=mmap.PROT_READ))),
    "append": (errno.ENOSPC, by_fd(os.O_WRONLY | os.O_APPEND, lambda fd: os.write(fd, bytes(PAGE_BYTES)))),
    "write at the end": (errno.ENOSPC, by_fd(os.O_WRONLY, lambda fd: os.pwrite(fd, b"x", SIZE))),
    "write far past the end": (errno.ENOSPC, by_fd(os.O_WRONLY, lambda fd: os.pwrite(fd, b"x", 1 << 50))),
    "write across the end": (errno.ENOSPC, by_fd(os.O_WRONLY, lambda fd: os.pwrite(fd, bytes(PAGE_BYTES), SIZE - 100))),
    "copy past the end": (errno.ENOSPC, by_fd(os.O_RDWR, lambda fd: os.copy_file_range(fd, fd, PAGE_BYTES, 0, SIZE))),
    "allocate": (errno.EOPNOTSUPP, by_fd(os.O_RDWR, lambda fd: fallocate(fd, 0, SIZE, PAGE_BYTES))),
    "allocate and keep the size": (errno.EOPNOTSUPP, by_fd(os.O_RDWR, lambda fd: fallocate(fd, KEEP_SIZE, 0, PAGE_BYTES))),
    "zero and grow": (errno.EOPNOTSUPP, by_fd(os.O_RDWR, lambda fd: fallocate(fd, ZERO_RANGE, SIZE, PAGE_BYTES))),
    "collapse": (errno.EOPNOTSUPP, by_fd(os.O_RDWR, lambda fd: fallocate(fd, COLLAPSE, 0, PAGE_BYTES))),
    "insert": (errno.EOPNOTSUPP, by_fd(os.O_RDWR, lambda fd: fallocate(fd, INSERT, 0, PAGE_BYTES))),
    "unshare": (errno.EOPNOTSUPP, by_fd(os.O_RDWR, lambda fd: fallocate(fd, UNSHARE, 0, PAGE_BYTES))),
    "punch to read": (errno.EBADF, by_fd(os.O_RDONLY, lambda fd: fallocate(fd, PUNCH_HOLE | KEEP_SIZE, 0, PAGE_BYTES))),
}


@pytest.mark.parametrize("harm", HARMS)
def test_harm_to_the_image_is_refused(place: Place, harm: str) -> None:
    number, act = HARMS[harm]
    assert errno.errorcode[errno_of(lambda: act(place))] == errno.errorcode[number]
    assert_unharmed(place)


HARMLESS: Final[dict[str, Act]] = {
    "truncate to the size that it has": lambda p: os.truncate(p.image, SIZE),
    "ftruncate to the size that it has": by_fd(os.O_WRONLY, lambda fd: os.ftruncate(fd, SIZE)),
    "fsync": by_fd(os.O_WRONLY, os.fsync),
    "fdatasync": by_fd(os.O_WRONLY, os.fdatasync),
    "syncfs": by_fd(os.O_WRONLY, lambda fd: _libc.syncfs(fd)),
    "write nothing past the end": by_fd(os.O_WRONLY, lambda fd: os.pwrite(fd, b"", SIZE)),
    "copy a page onto itself by way of a pipe": by_fd(
        os.O_RDWR, lambda fd: os.pwrite(fd, os.pread(fd, PAGE_BYTES, PAGE_BYTES), PAGE_BYTES)
    ),
    "seek to data": by_fd(os.O_RDONLY, lambda fd: os.lseek(fd, 0, os.SEEK_DATA)),
    "poll": by_fd(os.O_RDONLY, readable),
    "lock": by_fd(os.O_RDWR, lambda fd: fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)),
    "map private": by_fd(os.O_RDONLY, lambda fd: mmap.mmap(fd, PAGE_BYTES, mmap.MAP_PRIVATE, mmap.PROT_READ)[:10]),
    "read by a link in /proc": lambda p: by_fd(os.O_RDONLY, lambda fd: Path(f"/proc/self/fd/{fd}").open("rb").close())(p),
}


@pytest.mark.parametrize("act", HARMLESS)
def test_what_does_no_harm_may_be_done(place: Place, act: str) -> None:
    HARMLESS[act](place)
    assert_unharmed(place)


def test_a_copy_within_the_image_is_a_write(place: Place) -> None:
    with opened(place, os.O_RDWR) as fd:
        assert os.copy_file_range(fd, fd, PAGE_BYTES, 0, MIB) == PAGE_BYTES
        assert os.pread(fd, PAGE_BYTES, MIB) == page_of("half", 0)
    assert_unharmed(place)


@pytest.mark.parametrize("name", [file.name for file in FILES if file.is_writable])
def test_control_files_keep_mode_owner_and_size(place: Place, name: str) -> None:
    path = place.mountpoint / "control" / name
    before = path.stat()
    for act in (lambda: path.chmod(0o666), lambda: os.chown(path, NOBODY, -1), lambda: os.utime(path, (1, 1))):
        assert errno_of(act) == errno.EPERM
    assert errno_of(lambda: os.truncate(path, 5)) == errno.EINVAL
    os.truncate(path, 0)
    assert path.stat() == before


def as_nobody(act: Callable[[], object]) -> int:
    """The errno that `act` fails with in a process of nobody, 0 if it does not."""
    pid = os.fork()
    if not pid:
        code = 255
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            act()
            code = 0
        except OSError as error:
            code = error.errno or 254
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_an_ordinary_user_reads_control_files_and_nothing_else(place: Place) -> None:
    control = place.mountpoint / "control"
    assert as_nobody(lambda: os.listdir(control)) == 0
    for flags in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR, os.O_RDONLY | os.O_TRUNC):
        assert as_nobody(lambda flags=flags: os.open(place.image, flags)) == errno.EACCES  # type: ignore[misc]
    for act in (
        lambda: os.truncate(place.image, 0), lambda: os.unlink(place.image), lambda: os.rename(place.image, control / "x"),
        lambda: os.open(control / "codec", os.O_WRONLY), lambda: os.open(control / "codec", os.O_RDONLY | os.O_TRUNC),
        lambda: os.mkdir(control / "x"), lambda: os.open(control / "segments", os.O_RDONLY),
    ):  # fmt: skip
        assert as_nobody(act) == errno.EACCES
    for file in FILES:
        if not file.is_private:
            assert as_nobody((control / file.name).read_text) == 0
    assert_unharmed(place)


def test_only_root_reads_the_segments() -> None:
    assert [file.name for file in FILES if file.is_private] == ["segments"]


SHELLS: Final = (
    "echo zstd > codec",
    "echo zstd >> codec",
    "printf zstd > codec",
    "echo zstd | tee codec",
    "echo zstd | tee -a codec",
    "echo zstd 1<> codec",
    "echo zstd | dd of=codec",
    "cp /dev/stdin codec <<< zstd",
    "(echo lz4; echo zstd) | while read v; do echo $v >> codec; done",
)


@pytest.mark.parametrize("shell", SHELLS)
def test_a_control_file_is_written_in_every_way_of_a_shell(place: Place, shell: str) -> None:
    place.write("codec", "lz4")
    subprocess.run(["bash", "-c", shell], cwd=place.mountpoint / "control", check=True, capture_output=True)
    assert place.read("codec") == "lz4 [zstd:1] none"


def test_one_descriptor_appends_value_after_value(place: Place) -> None:
    fd = os.open(place.mountpoint / "control" / "codec", os.O_WRONLY | os.O_APPEND)
    try:
        for value in (b"none\n", b"zstd\n", b"lz4\n"):
            assert os.write(fd, value) == len(value)
    finally:
        os.close(fd)
    assert place.read("codec") == "[lz4] zstd none"


@pytest.mark.parametrize("value", [b"\xff", b"1\x00", b"\x00", b"1" * 4097, b"1" * 300_000], ids=len)
def test_what_is_no_value_is_einval_and_says_why(place: Place, value: bytes) -> None:
    fd = os.open(place.mountpoint / "control" / "shrink", os.O_RDWR)
    try:
        assert errno_of(lambda: os.write(fd, value)) == errno.EINVAL
        assert os.pread(fd, 4096, 0).startswith(b"a value ")
        assert os.write(fd, b"") == 0
    finally:
        os.close(fd)


def test_a_limit_that_is_too_small_and_a_shrink_that_falls_short_say_why(place: Place) -> None:
    for name, value, number, says in (
        ("pool.max", b"1K", errno.ERANGE, "a pool limit of 1K is too small to swap with: give 10 MiB or more\n"),
        ("shrink", b"60M", errno.EAGAIN, "of 60M: the pool holds no more pages\n"),
        ("compact", b"1.0001", errno.EAGAIN, "nothing more can be gained\n"),
    ):
        fd = os.open(place.mountpoint / "control" / name, os.O_RDWR)
        try:
            assert errno_of(lambda fd=fd, value=value: os.pwrite(fd, value, 0)) == number  # type: ignore[misc]
            assert os.pread(fd, 4096, 0).decode().endswith(says)
        finally:
            os.close(fd)
        assert not place.read(name).endswith(says)


def test_df_shows_no_share_of_inodes(place: Place) -> None:
    found = os.statvfs(place.mountpoint)
    assert (found.f_files, found.f_ffree, found.f_favail) == (0, 0, 0)
    line = subprocess.run(["df", "-i", place.mountpoint], capture_output=True, text=True, check=True).stdout.splitlines()[1]
    assert line.split()[1:5] == ["0", "0", "0", "-"]


def test_names_that_are_not_there_are_not_found(place: Place) -> None:
    for directory in (place.mountpoint, place.mountpoint / "control"):
        for name in (b"x", b"\xff\xfe", b"a" * 255, b"swap\n", b"..."):
            path = os.path.join(os.fsencode(directory), name)
            assert errno_of(partial(os.stat, path)) == errno.ENOENT


@pytest.mark.system
def test_the_loop_device_reads_on_whatever_is_tried(tmp_path: Path) -> None:
    with mounted(tmp_path) as place:
        with opened(place, os.O_WRONLY) as fd:
            os.pwrite(fd, page_of("half", 0), 0)
        made = subprocess.run(
            ["losetup", "--find", "--show", "--direct-io=on", place.image], capture_output=True, text=True, check=True
        )
        device = made.stdout.strip()
        fd = os.open(device, os.O_RDONLY | os.O_DIRECT)
        try:
            subprocess.run(["sh", "-c", f": > {place.image}"], check=False, capture_output=True)
            for _, act in HARMS.values():
                with suppress(OSError):
                    act(place)
                with mmap.mmap(-1, PAGE_BYTES) as page:
                    assert os.preadv(fd, [page], 0) == PAGE_BYTES
                    assert page[:] == page_of("half", 0)
        finally:
            os.close(fd)
            subprocess.run(["losetup", "--detach", device], check=True)
            wait_until(lambda: str(place.image) not in subprocess.run(["losetup", "-a"], capture_output=True, text=True).stdout)
