"""Contenders of the side-by-side benchmark: whichever step of one fails, its swap, device, mount and settings are gone again."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tmemfs.system import swapdev
from tmemfs.units import MIB
from tools.bench import contenders
from tools.bench.contenders import Contender, Floor, Limits, Plain, Tmemfs, Zram, Zswap, turned_on

pytestmark = pytest.mark.system

ZSWAP = Path("/sys/module/zswap/parameters")
LIMITS = Limits(64 * MIB)


class Injected(Exception):
    """What the step fails with."""


def available() -> list[Contender]:
    """One of each kind that this kernel has."""
    zram, zswap = contenders.zram_compressors(), contenders.zswap_compressors()
    return [Tmemfs(), Plain(), Floor(), *(Zram(name) for name in zram[:1]), *(Zswap(name) for name in zswap[:1])]


def state(directory: Path) -> dict[str, object]:
    """All of the machine that a contender changes."""
    attached = {file: file.read_bytes() for file in swapdev.SYS_BLOCK.glob("loop*/loop/backing_file")}
    return {
        "swaps": [entry.path for entry in swapdev.swap_entries()],
        "loop devices": [file for file, name in attached.items() if os.fsencode(directory) in name],
        "zram": sorted(path.name for path in swapdev.SYS_BLOCK.glob("zram*")),
        "zswap": {path.name: path.read_text() for path in ZSWAP.glob("[cme][onm]*")} if ZSWAP.exists() else {},
        "mounts": os.fsencode(directory) in Path("/proc/self/mounts").read_bytes(),
        "files": list(directory.iterdir()),
    }


def failing(program: str) -> Callable[..., str]:
    """What runs programs, but for `program`."""
    run = contenders._run

    def fails(*command: str) -> str:
        if command[0] == program:
            raise Injected
        return str(run(*command))

    return fails


@pytest.mark.parametrize("step", ["mkswap", "swapon", "the measurement"])
@pytest.mark.parametrize("contender", available(), ids=lambda one: one.name)
def test_a_contender_whose_step_fails_is_turned_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, contender: Contender, step: str
) -> None:
    before = state(tmp_path)
    monkeypatch.setattr(contenders, "_run", failing(step))
    with pytest.raises(Injected), turned_on(contender, tmp_path, LIMITS, wait_s=60):
        assert step == "the measurement" and swapdev.swap_entries()
        raise Injected
    assert state(tmp_path) == before


@pytest.mark.parametrize("step", ["mkswap", "the measurement"])
def test_a_swap_file_on_a_limited_disk_is_behind_a_loop_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    """The limits do not hold for what the kernel itself swaps to a file."""
    before = state(tmp_path)
    monkeypatch.setattr(contenders, "_run", failing(step))
    limits = replace(LIMITS, is_disk_limited=True)
    with pytest.raises(Injected), turned_on(Plain(), tmp_path, limits, wait_s=60) as swap:
        assert [entry.path for entry in swapdev.swap_entries()] == [swap.device]
        assert swapdev.loop_devices_of(tmp_path / "plain" / "swapfile") == [swap.device]
        raise Injected
    assert state(tmp_path) == before


@pytest.mark.parametrize("contender", [Tmemfs(), Floor()], ids=lambda one: one.name)
def test_a_contender_whose_image_cannot_be_attached_is_turned_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, contender: Contender
) -> None:
    before = state(tmp_path)

    def refuses(image: Path) -> str:
        raise Injected

    monkeypatch.setattr(swapdev, "attach", refuses)
    with pytest.raises(Injected), turned_on(contender, tmp_path, LIMITS, wait_s=60):
        pass
    assert state(tmp_path) == before
