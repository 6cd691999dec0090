"""Into the background: what the process inherits, and what it says before it serves."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.waiting import HANG_S

#: Runs in the background and writes down which descriptors it has, and to what.
LISTED = """
import os, sys
from pathlib import Path
from tmemfs.system.background import run_in_background
def serve(ready):
    found = {}
    for fd in os.listdir("/proc/self/fd"):
        try:
            found[int(fd)] = os.readlink(f"/proc/self/fd/{fd}")
        except OSError:
            pass
    Path(sys.argv[2]).write_text(repr(found))
    ready()
run_in_background(serve, Path(sys.argv[1]))
"""


def descriptors(tmp_path: Path, shell: str) -> dict[int, str]:
    """What a daemon has open that is started by `shell`, with the command as "$@"."""
    listed = tmp_path / "listed"
    command = [sys.executable, "-c", LISTED, str(tmp_path / "log"), str(listed)]
    subprocess.run(["bash", "-c", shell, "bash", *command], check=True, timeout=HANG_S)
    found: dict[int, str] = eval(listed.read_text())
    return found


@pytest.mark.parametrize(
    "shell",
    [
        '"$@"',
        'exec 5>&1 7</etc/passwd 200</etc/group; "$@"',
        'exec 0<&-; "$@"',
        'exec 0<&- 1>&- 2>&-; "$@"',
        'exec 1>&-; exec 9>$lock; flock 9; "$@"',
    ],
)
def test_a_daemon_has_its_own_descriptors_and_no_others(tmp_path: Path, shell: str) -> None:
    found = descriptors(tmp_path, f"lock={tmp_path}/lock; {shell}")
    log = str(tmp_path / "log")
    assert [found.pop(fd) for fd in (0, 1, 2)] == ["/dev/null", log, log]
    [report] = found.values()  # the pipe to the process in front; that of the listing is closed by now
    assert report.startswith("pipe:")


def test_a_pipe_of_the_caller_ends_when_the_command_does(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    code = LISTED.replace("ready()", "ready(); import time; time.sleep(60)")
    command = [sys.executable, "-c", code, str(tmp_path / "log"), str(tmp_path / "listed")]
    subprocess.run(command, check=True, timeout=HANG_S, pass_fds=[writer])
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        assert pipe.read() == b""  # waits for ever, if the daemon still has the other end


def test_an_error_that_names_a_path_which_is_not_utf8_reaches_the_process_in_front(tmp_path: Path) -> None:
    code = (
        "import os\n"
        "from pathlib import Path\nfrom tmemfs.errors import Refused\n"
        "from tmemfs.system.background import run_in_background\n"
        "def serve(ready): raise Refused(os.fsdecode(b'no \\xff here'))\n"
        f"try: run_in_background(serve, Path({str(tmp_path / 'log')!r}))\n"
        "except Refused as error: assert os.fsencode(str(error)) == b'no \\xff here', error\nelse: raise SystemExit(1)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=HANG_S)
