"""The namespace: the directory tree, served by pyfuse3 under trio.

    1 /            2 swap            3 control/            4... control/<attribute>, in the table's order

It never sees a page: the relay answers the reads and writes of the image itself. What pyfuse3 is asked about the image is its
attributes, and to open and close it.

Reads of an attribute are answered from `texts`. A write is one whole value. If it is refused, the next reads of the same handle
give the reason, one line, until a value is accepted.

A handle's number encodes all that is known when a file is opened, so an open file takes no memory here:

    generation of the worker, 14 bits | serial number, 30 bits | appends, 1 bit | opened by root, 1 bit | 0, 2 bits | inode, 16 bits

The tree is fixed: to create, remove, rename or link something is refused with EPERM. Changing the image other than by writing
is refused too, and so is changing its attributes. What handlers raise becomes an errno in one place (contain.py).
"""

from __future__ import annotations

import errno
import logging
import os
import stat
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import Any, Final

import trio

from tmemfs.control import Attribute
from tmemfs.errors import BadValue, FellShort, TmemfsError
from tmemfs.fuse.contain import contain
from tmemfs.fuse.interrupts import Interrupts
from tmemfs.fuse.library import pyfuse3
from tmemfs.fuse.texts import Texts
from tmemfs.units import PAGE_BYTES

log = logging.getLogger(__name__)

ROOT: Final = 1
SWAP: Final = 2
CONTROL: Final = 3
FIRST_ATTRIBUTE: Final = 4
LONGEST_VALUE_BYTES: Final = 4096
#: Open files of all users but root. One number is kept for each that was read, and the kernel tells of each close in the queue of
#: its requests for pages: closing 20,000 at once delayed loads by 44 ms.
MOST_OPEN_BY_OTHERS: Final = 32768
_LONGEST_REASON: Final = 1000
_DIRECTORIES: Final = (ROOT, CONTROL)
_TTL_S: Final = 3600
_INODE_MASK: Final = 0xFFFF
_BY_ROOT: Final = 1 << 18
_APPENDS: Final = 1 << 19
_SERIAL_SHIFT: Final = 20
_GENERATION_SHIFT: Final = 30
_GENERATION_MASK: Final = (1 << 14) - 1

Space = Callable[[], tuple[int, int]]


class Namespace(pyfuse3.Operations):
    """Operations over `attributes`. `space` gives the size of the image, and how much of it is free, in bytes.

    `generation` is the number of this worker.
    """

    supports_dot_lookup = True
    enable_writeback_cache = False

    def __init__(
        self, attributes: tuple[Attribute, ...], space: Space, interrupts: Interrupts | None = None, generation: int = 1
    ) -> None:
        super().__init__()
        # constant after construction
        self._space = space
        self._attributes = {FIRST_ATTRIBUTE + at: attribute for at, attribute in enumerate(attributes)}
        self._inodes = {attribute.name: inode for inode, attribute in self._attributes.items()}
        self._born_ns = time.time_ns()
        self._entries = {inode: self._fixed_entry(inode) for inode in (*_DIRECTORIES, *self._attributes)}
        self._interrupts = interrupts or Interrupts()
        # of trio's thread
        self._texts = Texts(time.monotonic)
        self._reasons: dict[int, bytes] = {}
        # Handles of earlier workers are still open, and must not be taken for ours.
        self._opened = (generation & _GENERATION_MASK) << _GENERATION_SHIFT
        self._open_by_others = 0
        self._writing: dict[int, set[trio.CancelScope]] = {}
        contain(self)

    async def lookup(self, parent: int, name: bytes, ctx: Any) -> Any:
        """The entry of `name`."""
        if name == b".":
            return self._entry(parent)
        if name == b"..":
            return self._entry(ROOT)
        inode = self._children(parent).get(os.fsdecode(name))
        if inode is None:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return self._entry(inode)

    async def getattr(self, inode: int, ctx: Any) -> Any:
        """Attributes of `inode`."""
        return self._entry(inode)

    async def setattr(self, inode: int, attr: Any, fields: Any, fh: Any, ctx: Any) -> Any:
        """Only the truncation to the size that a file has, which is 0 for a control file."""
        # A shell truncates a control file when it redirects its output there.
        entry = self._entry(inode)
        if fields.update_mode or fields.update_uid or fields.update_gid or not fields.update_size:
            raise pyfuse3.FUSEError(errno.EPERM)
        if inode in self._attributes and self._attributes[inode].write is None:
            raise pyfuse3.FUSEError(errno.EACCES)
        if attr.st_size != (self._space()[0] if inode == SWAP else 0):
            raise pyfuse3.FUSEError(errno.EINVAL)
        return entry

    async def opendir(self, inode: int, ctx: Any) -> int:
        """A directory is its own handle."""
        return inode

    async def readdir(self, fh: int, start_id: int, token: Any) -> None:
        """The entries after `start_id`."""
        for at, (name, inode) in enumerate(self._children(fh).items(), 1):
            if at > start_id and not pyfuse3.readdir_reply(token, os.fsencode(name), self._entry(inode), at):
                return

    async def releasedir(self, fh: int) -> None:
        """Nothing was kept."""

    async def access(self, inode: int, mode: int, ctx: Any) -> bool:
        """The kernel checks permissions itself (default_permissions)."""
        return True

    async def statfs(self, ctx: Any) -> Any:
        """The logical size, and how much of it is free. No inodes: of any number, 'df -i' would show that 100% are used."""
        total, free = self._space()
        answer = pyfuse3.StatvfsData()
        # Without a block size the loop device would turn discard off.
        answer.f_bsize = answer.f_frsize = PAGE_BYTES
        answer.f_blocks = total // PAGE_BYTES
        answer.f_bfree = answer.f_bavail = free // PAGE_BYTES
        answer.f_files = answer.f_ffree = answer.f_favail = 0
        answer.f_namemax = 255
        return answer

    async def open(self, inode: int, flags: int, ctx: Any) -> Any:
        """Open the image or an attribute, in a mode that it has."""
        if inode in _DIRECTORIES:
            raise pyfuse3.FUSEError(errno.EISDIR)
        if inode == SWAP and flags & os.O_TRUNC:
            # The kernel would take the image for empty, and the loop device would read nothing.
            raise pyfuse3.FUSEError(errno.EPERM)
        if inode != SWAP:
            attribute = self._attribute(inode)
            if flags & os.O_ACCMODE != os.O_RDONLY and attribute.write is None:
                raise pyfuse3.FUSEError(errno.EACCES)
        return pyfuse3.FileInfo(fh=self._new_handle(inode, flags, ctx.uid == 0), direct_io=True, keep_cache=False)

    def _new_handle(self, inode: int, flags: int, is_root: bool) -> int:
        if not is_root:
            if self._open_by_others >= MOST_OPEN_BY_OTHERS:
                raise pyfuse3.FUSEError(errno.ENFILE)
            self._open_by_others += 1
        self._opened += 1
        return self._opened << _SERIAL_SHIFT | (flags & os.O_APPEND and _APPENDS) | (is_root and _BY_ROOT) | inode

    async def read(self, fh: int, off: int, size: int) -> bytes:
        """Part of an attribute's text."""
        inode = inode_of(fh)
        if (reason := self._reasons.get(fh)) is not None:
            return reason[off : off + size]
        return self._texts.read(fh, inode, bool(fh & _BY_ROOT), partial(_render, self._attribute(inode)), off, size)

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        """One value of an attribute."""
        attribute = self._attribute(inode_of(fh))
        try:
            assert attribute.write is not None
            # With O_APPEND the kernel writes at the end, which it takes to be where a file without a size was last written.
            value = _value(0 if fh & _APPENDS else off, buf)
            await self._write_unless_interrupted(fh, partial(attribute.write, value))
        except TmemfsError as error:
            log.info("%s: %s", attribute.name, error)
            self._reasons[fh] = _one_line(str(error))
            raise
        except Exception:
            self._reasons[fh] = _one_line("bug in tmemfs: the daemon's log has the details")
            raise
        finally:
            self._texts.forget_shared()  # also after a refusal: a shrink that fell short has freed something
        self._reasons.pop(fh, None)
        return len(buf)

    def obey_interrupts(self) -> None:
        """From now on, end writes that no process waits for any more. In trio's thread."""
        token = trio.lowlevel.current_trio_token()

        def tell(handle: int) -> None:
            # The event loop may have failed; the one that is started then calls this method again.
            with suppress(trio.RunFinishedError):
                token.run_sync_soon(self._interrupt, handle)

        self._interrupts.tell(tell)

    def _interrupt(self, fh: int) -> None:
        for scope in self._writing.get(fh, ()):
            scope.cancel()

    async def _write_unless_interrupted(self, fh: int, write: Callable[[], Awaitable[None]]) -> None:
        """Call `write`; raises FellShort if it was interrupted before its end."""
        with trio.CancelScope() as scope:
            scopes = self._writing.setdefault(fh, set())
            scopes.add(scope)
            if self._interrupts.is_interrupted(fh):  # INTERRUPT may have come before this task could be told
                scope.cancel()
            try:
                await write()
            finally:
                scopes.discard(scope)
                if not scopes:
                    self._writing.pop(fh, None)
        if scope.cancelled_caught:
            raise FellShort("interrupted: what was done so far stays; the file says how far it came")

    async def flush(self, fh: int) -> None:
        """Not offered: no write is buffered. ENOSYS tells the kernel not to ask again."""
        raise pyfuse3.FUSEError(errno.ENOSYS)

    async def fsync(self, fh: int, datasync: bool) -> None:
        """Not offered: swap contents do not outlive the daemon. ENOSYS tells the kernel not to ask again."""
        raise pyfuse3.FUSEError(errno.ENOSYS)

    async def release(self, fh: int) -> None:
        """Forget the handle."""
        self._texts.release(fh)
        self._reasons.pop(fh, None)
        if not fh & _BY_ROOT:
            self._open_by_others = max(self._open_by_others - 1, 0)  # an earlier worker may have counted it

    async def create(self, parent: int, name: bytes, mode: int, flags: int, ctx: Any) -> Any:
        """Not offered."""
        raise pyfuse3.FUSEError(errno.EPERM)

    async def mknod(self, parent: int, name: bytes, mode: int, rdev: int, ctx: Any) -> Any:
        """Not offered."""
        raise pyfuse3.FUSEError(errno.EPERM)

    async def mkdir(self, parent: int, name: bytes, mode: int, ctx: Any) -> Any:
        """Not offered."""
        raise pyfuse3.FUSEError(errno.EPERM)

    async def unlink(self, parent: int, name: bytes, ctx: Any) -> None:
        """Not offered."""
        raise pyfuse3.FUSEError(errno.EPERM)

    async def rmdir(self, parent: int, name: bytes, ctx: Any) -> None:
        """Not offered."""
        raise pyfuse3.FUSEError(errno.EPERM)

    async def symlink(self, parent: int, name: bytes, target: bytes, ctx: Any) -> Any:
        """Not offered."""
        raise pyfuse3.FUSEError(errno.EPERM)

    async def link(self, inode: int, new_parent: int, new_name: bytes, ctx: Any) -> Any:
        """Not offered."""
        raise pyfuse3.FUSEError(errno.EPERM)

    async def rename(self, parent: int, name: bytes, new_parent: int, new_name: bytes, flags: int, ctx: Any) -> None:
        """Not offered."""
        raise pyfuse3.FUSEError(errno.EPERM)

    def _attribute(self, inode: int) -> Attribute:
        attribute = self._attributes.get(inode)
        if attribute is None:
            raise pyfuse3.FUSEError(errno.EBADF)
        return attribute

    def _children(self, inode: int) -> dict[str, int]:
        if inode == ROOT:
            return {"swap": SWAP, "control": CONTROL}
        if inode == CONTROL:
            return self._inodes
        raise pyfuse3.FUSEError(errno.ENOTDIR)

    def _entry(self, inode: int) -> Any:
        if inode == SWAP:
            return self._swap_entry()
        entry = self._entries.get(inode)
        if entry is None:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return entry

    def _fixed_entry(self, inode: int) -> Any:
        """The entry of a file whose attributes never change: the kernel may keep them."""
        entry = self._new_entry(inode)
        entry.attr_timeout = _TTL_S
        if inode in _DIRECTORIES:
            entry.st_mode, entry.st_nlink = stat.S_IFDIR | 0o755, 2
        else:
            entry.st_mode, entry.st_size = stat.S_IFREG | self._attributes[inode].mode, 0
        return entry

    def _swap_entry(self) -> Any:
        total, free = self._space()
        entry = self._new_entry(SWAP)
        entry.attr_timeout = 0  # the number of blocks changes with every store
        entry.st_mode, entry.st_size, entry.st_blocks = stat.S_IFREG | 0o600, total, (total - free) // 512
        return entry

    def _new_entry(self, inode: int) -> Any:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode
        entry.entry_timeout = _TTL_S
        entry.st_nlink = 1
        entry.st_blksize = PAGE_BYTES
        entry.st_atime_ns = entry.st_mtime_ns = entry.st_ctime_ns = self._born_ns
        return entry


def inode_of(handle: int) -> int:
    """The inode that `handle` was opened for."""
    return handle & _INODE_MASK


def _render(attribute: Attribute) -> bytes:
    return attribute.read().encode()


def _value(offset: int, data: bytes) -> str:
    """The value that was written. Raises BadValue."""
    if offset:
        raise BadValue("a value is written as a whole, at offset 0: open the file again for the next one")
    if len(data) > LONGEST_VALUE_BYTES:
        raise BadValue(f"a value has at most {LONGEST_VALUE_BYTES} bytes, not {len(data)}: write less")
    try:
        text = bytes(data).decode()
    except UnicodeDecodeError:
        raise BadValue("a value is text in UTF-8, and this is not: write plain text") from None
    if "\0" in text:
        raise BadValue("a value is text, and a NUL is not: write plain text")
    return text


def _one_line(reason: str) -> bytes:
    """`reason` as a line that a terminal can show, whatever the value was that it quotes."""
    shown = "".join(letter if letter.isprintable() else " " for letter in reason[:_LONGEST_REASON])
    return shown.encode() + b"\n"
