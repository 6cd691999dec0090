"""A daemon on a real mount: its log, its end, and what of it reaches a core file."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mounted import mounted, wait_until

pytestmark = pytest.mark.fuse


def test_sighup_writes_to_a_new_log_once_the_old_one_was_renamed(tmp_path: Path) -> None:
    with mounted(tmp_path) as place:
        old = place.log.rename(tmp_path / "log.1")
        os.kill(place.pid, signal.SIGHUP)
        wait_until(lambda: place.log.exists() and "the log was reopened" in place.log.read_text())
        assert "serving" in old.read_text() and "reopened" not in old.read_text()
        os.kill(place.pid, signal.SIGTERM)
        wait_until(lambda: "has ended: it was unmounted" in place.log.read_text())


def test_a_log_that_cannot_be_reopened_is_written_to_as_before(tmp_path: Path) -> None:
    with mounted(tmp_path) as place:
        old = place.log.rename(tmp_path / "log.1")
        place.log.mkdir()
        os.kill(place.pid, signal.SIGHUP)
        wait_until(lambda: "cannot be reopened" in old.read_text())
        assert place.state == "running"
        place.log.rmdir()


def test_regions_are_left_out_of_a_core_file(tmp_path: Path) -> None:
    with mounted(tmp_path) as place:
        found, name = dict[str, bool](), ""
        for line in Path(f"/proc/{place.pid}/smaps").read_text().splitlines():
            if "memfd:tmemfs-" in line:
                name = line.split("memfd:tmemfs-")[1].split()[0]
            elif line.startswith("VmFlags:") and name:
                found[name], name = "dd" in line.split(), ""
        assert found == dict.fromkeys(("slots", "segments", "arena", "requests", "key", "settings"), True)
        assert place.number("core_dumps_off") == 1


@pytest.mark.parametrize("is_off", [False, True])
def test_a_daemon_that_crashes_writes_no_core_file(tmp_path: Path, is_off: bool) -> None:
    program = "import os, resource\nfrom tmemfs.system.memory import no_core_dump\n"
    program += "resource.setrlimit(resource.RLIMIT_CORE, (resource.RLIM_INFINITY,) * 2)\n"
    program += ("assert no_core_dump().ok\n" if is_off else "") + "os.abort()"
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    process = subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path, env=environment)
    _, status = os.waitpid(process.pid, 0)
    process.returncode = -os.WTERMSIG(status)
    if not is_off and not os.WCOREDUMP(status):
        pytest.skip("this machine writes no core files at all (kernel.core_pattern)")
    assert os.WTERMSIG(status) == signal.SIGABRT and os.WCOREDUMP(status) != is_off
