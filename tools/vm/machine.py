"""A guest made of this machine's files, a disk image and a kernel. It is ended in any case.

The guest's root file system is this machine's, read-only. It runs a copy of tmemfs, so that edits meanwhile do not reach it. It
returns results through a shared directory; its console and the output of its program go to a log. Everything that is started here
is one process group, which is ended by its id after a hard time limit. Source: virtme-ng's vng(1).
"""

from __future__ import annotations

import compileall
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tools.vm.contenders import KEPT_HEAP

MEMORY: Final = "512M"
CPUS: Final = 2
DISK_BYTES: Final = 6 << 30
KERNELS: Final = Path("/boot")
CHECKOUT: Final = Path(__file__).resolve().parents[2]
_PROGRAMS: Final = {
    "vng": "virtme-ng",
    "qemu-system-x86_64": "qemu-system-x86",
    "busybox": "busybox-static",
    "mkfs.ext4": "e2fsprogs",
    "stress-ng": "stress-ng",
    "stressapptest": "stressapptest",
}
_ENDED_S: Final = 10.0
_KEYS_S: Final = 3.0
_QMP_HELLO: Final = b'{"execute": "qmp_capabilities"}\n'
#: A guest that prints nothing for this long is hung: its program prints something every 10 s.
SILENT_S: Final = 90.0
#: Until its program prints something: a busy machine boots it many times slower than an idle one.
SILENT_BOOT_S: Final = 240.0
#: Warnings and worse go to the console; PSI; a kernel log that is large enough for many kills.
_KERNEL_ARGUMENTS: Final = ("loglevel=5", "psi=1", "log_buf_len=1M")


class NotHere(Exception):
    """This machine lacks something; the message says what to install."""


@dataclass(frozen=True, slots=True)
class Boot:
    """One guest: its kernel, its disk, the directory that it shares with this machine, and the program that it runs."""

    kernel: Path
    disk: Path
    results: Path
    program: Path
    memory: str = MEMORY

    @property
    def monitor(self) -> Path:
        """The socket of the emulator's monitor."""
        return Path(f"/tmp/tmemfs-vm-{os.getpid()}.monitor")


def newest_kernel(directory: Path = KERNELS) -> Path:
    """The kernel of the highest version. Raises NotHere."""
    kernels = [kernel for kernel in directory.glob("vmlinuz-*") if kernel.is_file()]
    if not kernels:
        raise NotHere(f"no kernel in {directory}: apt-get install linux-image-amd64, or run 'sudo make test-vm'")
    return max(kernels, key=lambda kernel: [int(number) for number in re.findall(r"\d+", kernel.name)])


def missing_programs(environment: Mapping[str, str]) -> list[str]:
    """The programs that have to be installed before a guest can run."""
    return [package for program, package in _PROGRAMS.items() if shutil.which(program, path=environment["PATH"]) is None]


def environment() -> dict[str, str]:
    """Our environment, with the virtual environment and the administrator's programs on PATH."""
    own = Path(sys.executable).parent
    return {**os.environ, "PATH": os.pathsep.join([str(own), os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])}


def require(environment: Mapping[str, str]) -> None:
    """Raise NotHere if something is missing."""
    if missing := missing_programs(environment):
        raise NotHere(f"not installed: {' '.join(missing)}: run 'sudo make test-vm', which installs them")


def command_line(boot: Boot) -> list[str]:
    """The command that boots a guest by software emulation."""
    size = ["--memory", boot.memory, "--cpus", str(CPUS), "--disk", str(boot.disk), f"--rwdir={boot.results}"]
    append = [word for argument in _KERNEL_ARGUMENTS for word in ("--append", argument)]
    monitor = f"--qemu-opts=-qmp unix:{boot.monitor},server=on,wait=off"
    how = ["--verbose", "--disable-kvm", "--force-9p", monitor]
    return ["vng", "--run", str(boot.kernel), *how, *size, *append, "--exec", str(boot.program)]


def program_text(python: str, tree: Path, contender: str, results: Path, scenarios: tuple[str, ...], full: bool) -> str:
    """The script that a guest runs."""
    words = [python, "-m", "tools.vm.guest", "--contender", contender, "--results", str(results), *(["--full"] if full else [])]
    return (
        "#!/bin/sh\n"
        "export PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 TERM=dumb\n"
        f"export {' '.join(f'{key}={value}' for key, value in KEPT_HEAP.items())}\n"
        f"export PYTHONPATH={shlex.quote(str(tree))}\n"
        f"cd {shlex.quote(str(tree))} && exec {shlex.join([*words, *scenarios])}\n"
    )


def stage(tree: Path) -> None:
    """Copy what runs in the guest to `tree`, and compile it."""
    # files of an earlier version would be imported too
    shutil.rmtree(tree, ignore_errors=True)
    for package in ("tmemfs", "tools"):
        shutil.copytree(CHECKOUT / package, tree / package, ignore=shutil.ignore_patterns("__pycache__"))
    compileall.compile_dir(tree, quiet=1)


def make_disk(disk: Path) -> None:
    """A sparse image with ext4 on it."""
    disk.unlink(missing_ok=True)
    with disk.open("wb") as file:
        file.truncate(DISK_BYTES)
    subprocess.run(["mkfs.ext4", "-q", "-F", str(disk)], env=environment(), check=True)


def run(boot: Boot, limit_s: float, log: Path, say: Callable[[str], None]) -> str | None:
    """Boot and wait for the end; `say` gets each line that begins with 'vm:'. Returns why the guest had to be ended, or None.

    A guest whose program prints nothing for SILENT_S is hung: it reports every few seconds that it runs.
    """
    process = subprocess.Popen(command_line(boot), env=environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, start_new_session=True)  # fmt: skip
    console = _Console(process, log, say)
    try:
        found = _wait(process, console, time.monotonic() + limit_s)
        # before the emulator is ended: afterwards nobody can tell where the guest hangs
        if found is not None and process.poll() is None:
            ask_where_it_hangs(boot.monitor)
        return found
    finally:
        _end_group(process)
        console.join()
        boot.monitor.unlink(missing_ok=True)


def _wait(process: subprocess.Popen[bytes], console: _Console, deadline: float) -> str | None:
    while process.poll() is None:
        time.sleep(0.5)
        if time.monotonic() > deadline:
            return "the guest did not end in time"
        silent_s = time.monotonic() - console.heard
        if silent_s > (SILENT_S if console.is_up else SILENT_BOOT_S):
            return f"the guest hung: it said nothing for {silent_s:.0f} s"
    return None if process.returncode == 0 else f"the guest ended with exit code {process.returncode}"


class _Console:
    """A thread that keeps the output of a guest; `heard` is the time of its last output, `is_up` whether its program had any."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path, say: Callable[[str], None]) -> None:
        assert process.stdout is not None
        self.heard = time.monotonic()
        self.is_up = False
        self._pipe, self._log, self._say = process.stdout, log, say
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def join(self) -> None:
        """Wait for the rest of it."""
        self._thread.join(_ENDED_S)

    def _run(self) -> None:
        with self._log.open("wb") as file:
            for line in self._pipe:
                file.write(line)
                file.flush()
                is_told = line.startswith(b"vm:")
                self.is_up |= is_told
                # a kernel that is up may complain of hung tasks for ever, which is no sign of life
                if is_told or not self.is_up:
                    self.heard = time.monotonic()
                if is_told:
                    self._say(line.decode(errors="replace").rstrip())


def ask_where_it_hangs(monitor: Path) -> None:
    """Press the magic SysRq keys of a hung guest, so that its kernel prints memory and tasks to the console."""
    with suppress(OSError), socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(_ENDED_S)
        connection.connect(str(monitor))
        for request in (_QMP_HELLO, *(_keys("alt", "sysrq", letter) for letter in "9mlwt")):
            connection.sendall(request)
            connection.recv(65536)
            # an emulated machine needs seconds to print all its tasks
            time.sleep(_KEYS_S)


def _keys(*names: str) -> bytes:
    keys = [{"type": "qcode", "data": name} for name in names]
    return json.dumps({"execute": "send-key", "arguments": {"keys": keys}}).encode() + b"\n"


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End the process group of `process`."""
    # the whole group: vng starts the emulator as a child
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        deadline = time.monotonic() + _ENDED_S
        while time.monotonic() < deadline:
            process.poll()
            try:
                os.killpg(process.pid, 0)
            except ProcessLookupError:
                return
            time.sleep(0.1)
