"""What users have set, as the next worker finds it, also one whose predecessor was killed while it wrote that down."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from functools import partial

import pytest
import trio

from tests.parts import FaultyTier, Regions, new_limits, new_pressure
from tmemfs.control import ControlDirectory
from tmemfs.control_files import FILES
from tmemfs.engine import Engine
from tmemfs.errors import BadValue
from tmemfs.jobs.supervision import Jobs
from tmemfs.services import Services
from tmemfs.store.codec import parse_codec
from tmemfs.system.kept_settings import KeptSettings
from tmemfs.units import MIB


@pytest.fixture
def kept() -> Iterator[KeptSettings]:
    found = KeptSettings.create()
    yield found
    found.close()


def again(kept: KeptSettings) -> KeptSettings:
    """As another process maps it."""
    return KeptSettings(os.dup(kept.fd))


def test_nothing_is_kept_at_first(kept: KeptSettings) -> None:
    assert kept.all() == {}


def test_the_last_text_of_each_name_is_kept_in_the_order_of_acceptance(kept: KeptSettings) -> None:
    for name, text in (("a", "1"), ("b", "2"), ("a", "3 \u00fc"), ("c", "4")):
        assert kept.keep(name, text)
    other = again(kept)
    assert list(other.all().items()) == [("b", "2"), ("a", "3 \u00fc"), ("c", "4")]
    other.close()


def test_a_write_that_is_cut_short_leaves_what_was_kept(kept: KeptSettings) -> None:
    kept.keep("codec", "zstd:3")
    kept.keep("watchdog", "off")
    before, words = bytes(kept.map), kept.all()
    kept.keep("codec", "lz4" * 100)
    after = bytes(kept.map)
    changed = [at for at in range(len(before)) if before[at] != after[at]]
    assert changed[0] < 8  # the number of writes, which is written last
    for end in range(8, len(before), 61):
        kept.map[:] = before[:8] + after[8:end] + before[end:]
        assert kept.all() == words
    kept.map[:] = after
    assert kept.all() == {"watchdog": "off", "codec": "lz4" * 100}


def test_what_does_not_fit_leaves_what_was_kept(kept: KeptSettings) -> None:
    kept.keep("a", "1")
    assert not kept.keep("b", "x" * 5000)
    assert kept.all() == {"a": "1"}


@pytest.fixture
def services() -> Iterator[Services]:
    regions = Regions.new(slots=1024, frames=32, extents=16)
    engine = Engine.over(partial(regions.start, limit=12, slots=1024), FaultyTier(), parse_codec("lz4"))
    yield Services(engine, new_limits(engine, 64 * MIB, 16 * MIB), new_pressure(engine), Jobs())
    regions.close()


def test_accepted_settings_are_kept_and_no_others(services: Services, kept: KeptSettings) -> None:
    files = {attribute.name: attribute for attribute in ControlDirectory(services, kept).attributes}

    async def write() -> None:
        for name, text in (("codec", " zstd:3\n"), ("pool.low", "9M"), ("pool.high", "12M")):
            found = files[name].write
            assert found is not None
            await found(text)
        found = files["codec"].write
        assert found is not None
        with pytest.raises(BadValue):
            await found("lzma")

    trio.run(write)
    assert kept.all() == {"codec": "zstd:3", "pool.low": "9M", "pool.high": "12M"}


def test_every_setting_is_one_and_no_request_is() -> None:
    assert {file.name for file in FILES if file.is_writable and not file.is_setting} == {"shrink", "compact", "damage"}


def test_a_limit_that_another_one_must_make_possible_is_set_nevertheless(services: Services, kept: KeptSettings) -> None:
    kept.keep("pool.high", "15M")
    kept.keep("pool.max", "20M")
    trio.run(services.limits.set_pool_max, "14M")
    trio.run(ControlDirectory(services, kept).set_again)
    assert (services.limits.pool.max, services.limits.pool.high) == (20 * MIB, 15 * MIB)
    assert list(kept.all()) == ["pool.high", "pool.max"]


def test_what_cannot_be_set_again_is_logged_and_hinders_nothing(
    services: Services, kept: KeptSettings, caplog: pytest.LogCaptureFixture
) -> None:
    for name, text in (("codec", "zip"), ("no.such.file", "1"), ("pressure.mode", "manual")):
        kept.keep(name, text)
    with caplog.at_level(logging.ERROR):
        trio.run(ControlDirectory(services, kept).set_again)
    assert services.pressure.mode == "manual"
    assert [record.message.split(" was ")[0] for record in caplog.records] == ["codec", "no.such.file"]
