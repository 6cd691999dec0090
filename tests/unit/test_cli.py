"""The command: what it takes, and its exit codes where nothing is mounted."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.settings_place import Machine
from tmemfs import __version__, cli, errors, options, supervisor
from tmemfs.cli import defaults, demo, doctor, start, view
from tmemfs.cli.checks import Check
from tmemfs.errors import FellShort, TmemfsError
from tmemfs.options import Options
from tmemfs.system import background, capabilities, memory, runtime
from tmemfs.system.memory_safety import MemorySafety
from tmemfs.units import parse_size

ERRORS = [
    found
    for found in vars(errors).values()
    if isinstance(found, type) and issubclass(found, TmemfsError) and found is not TmemfsError
]


@pytest.fixture(autouse=True)
def no_daemon(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Whatever is not refused, no daemon starts from here; locks and records are the tests' own, and so are its descriptors."""
    monkeypatch.setattr(runtime, "DIRECTORY", tmp_path_factory.mktemp("runtime") / "tmemfs.d")
    monkeypatch.setattr(background, "close_inherited", lambda *_: None)

    def starts(*_: object) -> None:
        raise AssertionError("a daemon was started")

    monkeypatch.setattr(background, "run_in_background", starts)
    monkeypatch.setattr(MemorySafety, "prepare_process", starts)


@pytest.fixture
def mount(tmp_path: Path) -> Path:
    """A directory that looks like a mount."""
    (tmp_path / "control").mkdir()
    (tmp_path / "control" / "pool.max").write_text("67108864\n")
    (tmp_path / "control" / "stat").write_text("codec lz4\npool_max 67108864\n")
    (tmp_path / "control" / "state").write_text("running\n")
    return tmp_path


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the places lie that are assumed when none is given; rights are not asked for."""
    monkeypatch.setattr(defaults, "MOUNTPOINT", tmp_path / "mountpoint")
    monkeypatch.setattr(defaults, "BACKING", tmp_path / "lib" / "backing")
    monkeypatch.setattr(capabilities, "require_root", lambda: None)
    monkeypatch.setattr(logging, "basicConfig", lambda **_: None)
    return tmp_path


Said = Callable[..., tuple[int, str]]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Said:
    """Run a command that prints nothing but an error; gives its exit code and that."""

    def run(*arguments: object) -> tuple[int, str]:
        code = cli.main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        assert said.out == "" and said.err.startswith("tmemfs: ")
        return code, said.err.removeprefix("tmemfs: ").rstrip("\n")

    return run


def exits(*arguments: object) -> int:
    """The code with which the arguments themselves end the command."""
    with pytest.raises(SystemExit) as caught:
        cli.main([str(argument) for argument in arguments])
    assert isinstance(caught.value.code, int)
    return caught.value.code


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert exits("--version") == 0
    assert capsys.readouterr().out == f"tmemfs {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "the following arguments are required: COMMAND: see 'tmemfs --help'"),
        (["unheard"], "no command 'unheard': see 'tmemfs --help'"),
        (["strink", "1M"], "no command 'strink', did you mean shrink?: see 'tmemfs --help'"),
        (["shrink"], "the following arguments are required: SIZE: see 'tmemfs shrink --help'"),
        (["set"], "the following arguments are required: KEY: see 'tmemfs set --help'"),
        (["stat", "a", "b"], "no use for 'b': see 'tmemfs stat --help'"),
        (["stat", "--json", "--raw"], "argument --raw: not allowed with argument --json: see 'tmemfs stat --help'"),
        (["stat", "--noheadings=1"], "argument --noheadings: ignored explicit argument '1'"),
        (["up", "--codek", "lz4"], "no option '--codek', did you mean --codec?: see 'tmemfs up --help'"),
        (["up", "--priority", "high"], "argument --priority: 'high' is not a swap priority (-1 to 32767): see 'tmemfs up --help'"),
        (["up", "--priority", "32768"], "argument --priority: '32768' is not a swap priority (-1 to 32767)"),
        (["up", "--priority", "-2"], "argument --priority: '-2' is not a swap priority (-1 to 32767)"),
        (["mount", "--kernel-tuning", "fast"], "argument --kernel-tuning: invalid choice: 'fast'"),
        (["mount", "--latency", "on"], "argument --latency: invalid choice: 'on'"),
        (["mount", "--encrypt", "yes"], "argument --encrypt: invalid choice: 'yes'"),
        (["mount", "--size", "-5M"], "argument --size: expected one argument: see 'tmemfs mount --help'"),
        (["mount", ""], "argument MOUNTPOINT: '' is not a path: see 'tmemfs mount --help'"),
        (["mount", "--backing", ""], "argument --backing: '' is not a path"),
        (["mount", "--log", ""], "argument --log: '' is not a path"),
        (["stat", "/a", "--mountpoint", "/b"], "two mountpoints are given: give one, as an argument or as --mountpoint"),
    ],
)
def test_arguments_that_are_not_understood_are_refused_in_a_line(refused: Said, arguments: list[str], says: str) -> None:
    code, said = refused(*arguments)
    assert code == 2 and said.startswith(says) and "\n" not in said


@pytest.mark.parametrize("word", ["line\nbreak", "bell\a", "\udcff", "\u2028", "\x1b[2J"])
def test_what_a_terminal_cannot_show_is_escaped(refused: Said, word: str) -> None:
    code, said = refused("stat", f"/nowhere/{word}")
    assert code == 2 and said.isprintable()


def test_a_message_that_is_very_long_keeps_its_beginning_and_its_end(refused: Said) -> None:
    code, said = refused("stat", "/nowhere/" + "x/" * 5000)
    assert code == 2 and len(said) < 700
    assert said.startswith("cannot use the mountpoint /nowhere/x/")
    assert said.endswith("(File name too long): run 'tmemfs up' or give another one")


@pytest.mark.parametrize("command", [["stat", "--raw"], ["get", "codec"], ["get"]])
def test_a_mountpoint_is_an_option_of_every_command(mount: Path, capsys: pytest.CaptureFixture[str], command: list[str]) -> None:
    (mount / "control" / "codec").write_text("lz4\n")
    assert cli.main([*command, "--mountpoint", str(mount)]) == 0
    assert "lz4" in capsys.readouterr().out


def test_a_mountpoint_is_an_argument_where_there_is_no_other(mount: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([str(mount)], ["--mountpoint", str(mount)], [str(mount), "--mountpoint", str(mount)]):
        assert cli.main(["stat", "--raw", *words]) == 0
        assert capsys.readouterr().out == "codec lz4\npool_max 67108864\n"


@pytest.mark.parametrize("command", ["up", "down", "mount", "umount", "stat", "shrink", "get", "set", "demo", "doctor"])
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exits(command, "--help") == 0
    assert capsys.readouterr().out.startswith(f"usage: tmemfs {command}")


@pytest.mark.parametrize(
    "arguments",
    [
        ["stat", "HERE"],
        ["stat", "HERE", "--json"],
        ["stat", "HERE", "--raw"],
        ["stat", "HERE", "--output", "pool_max"],
        ["get", "pool.max", "--mountpoint", "HERE"],
        ["set", "pool.max=2G", "--mountpoint", "HERE"],
        ["shrink", "64M", "--mountpoint", "HERE"],
        ["shrink", "64M", "--mountpoint", "HERE", "--deadline", "2s"],
    ],
)
def test_where_nothing_is_mounted_that_is_said_with_the_next_step(tmp_path: Path, refused: Said, arguments: list[str]) -> None:
    here = [str(tmp_path) if argument == "HERE" else argument for argument in arguments]
    assert refused(*here) == (2, f"nothing is mounted at {tmp_path}: run 'tmemfs up' or give the mountpoint")


def test_a_mountpoint_that_is_a_file_is_refused(tmp_path: Path, refused: Said) -> None:
    (tmp_path / "file").write_text("")
    code, said = refused("stat", tmp_path / "file")
    assert code == 2 and "(Not a directory): run 'tmemfs up' or give another one" in said


def test_a_figure_is_shown_and_set(mount: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["get", "pool.max", "--mountpoint", str(mount)]) == 0
    assert capsys.readouterr().out == "67108864\n"
    assert cli.main(["set", "pool.max=a=b", "--mountpoint", str(mount)]) == 0
    assert (mount / "control" / "pool.max").read_text().splitlines()[0] == "a=b"
    assert cli.main(["set", "pool.max", "2G", "--mountpoint", str(mount)]) == 0
    assert (mount / "control" / "pool.max").read_text().splitlines()[0] == "2G"
    assert capsys.readouterr().out == ""


def test_statistics_have_their_forms(mount: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["stat", "--raw", str(mount)]) == 0
    assert capsys.readouterr().out == "codec lz4\npool_max 67108864\n"
    assert cli.main(["stat", "--json", str(mount)]) == 0
    assert '"pool_max": 67108864' in capsys.readouterr().out
    assert cli.main(["stat", "--output", "pool_max,codec", "--noheadings", str(mount)]) == 0
    assert capsys.readouterr().out == "64 MiB  lz4\n"
    assert cli.main(["stat", "--output", "pool_max", "--bytes", str(mount)]) == 0
    assert capsys.readouterr().out == "pool_max\n67108864\n"


def test_an_unknown_column_ends_with_2(mount: Path, refused: Said) -> None:
    assert refused("stat", "--output", "pool_max,nothing", mount) == (2, "no column 'nothing': 'tmemfs stat --raw' lists all")


def test_an_assignment_without_a_value_is_refused_with_an_example(mount: Path, refused: Said) -> None:
    assert refused("set", "pool.max", "--mountpoint", mount) == (
        2,
        "'pool.max' sets nothing: write for example 'tmemfs set pool.max 2G'",
    )


@pytest.mark.parametrize("assignment", ["=2G", "../swap=2G", "control/pool.max=2G"])
def test_an_assignment_to_no_control_file_is_refused(mount: Path, refused: Said, assignment: str) -> None:
    code, said = refused("set", assignment, "--mountpoint", mount)
    assert code == 2 and said.endswith(f"is not a control file: see 'ls {mount}/control'")


def test_a_deadline_that_is_none_is_refused(mount: Path, refused: Said) -> None:
    code, said = refused("shrink", "64M", "--deadline", "soon", "--mountpoint", mount)
    assert code == 2 and said.startswith("'soon' is not a duration: give seconds")


@pytest.mark.parametrize("size", ["0", "5000", "1.5", "-1", "--size=-5M"])
@pytest.mark.parametrize("command", ["mount", "up", "demo"])
def test_a_size_that_is_no_whole_number_of_pages_is_refused(places: Path, refused: Said, command: str, size: str) -> None:
    code, said = refused(command, *([size] if size.startswith("--") else ["--size", size]))
    assert code == 2
    assert said.endswith("is not a positive multiple of the page (4096): give for example 8G")
    assert list(places.iterdir()) == []


@pytest.mark.parametrize("command", ["mount", "up", "demo"])
def test_a_size_that_is_none_is_refused(places: Path, refused: Said, command: str) -> None:
    code, said = refused(command, "--size", "huge")
    assert code == 2 and said.startswith("'huge' is not a size: give bytes")
    assert list(places.iterdir()) == []


def test_a_mount_without_a_size_is_of_twice_the_ram() -> None:
    size = start.swap_bytes(None)
    assert size % 4096 == 0 and 0 <= memory.total_ram_bytes() * 2 - size < 4096
    assert start.swap_bytes("8G") == 8 << 30


@pytest.mark.parametrize("option", ["--size=5000", "--pool-max=lots", "--codec=lzma"])
def test_a_mount_in_the_foreground_that_is_refused_creates_nothing(places: Path, refused: Said, option: str) -> None:
    code, _ = refused("mount", "--foreground", option)
    assert code == 2
    assert list(places.iterdir()) == []


@pytest.mark.parametrize("error", [MemoryError("no memory"), OSError(24, "Too many open files")])
def test_a_mount_that_the_kernel_refuses_creates_nothing(
    places: Path, refused: Said, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(supervisor, "serve", raising(error))
    code, said = refused("mount", "--foreground", "--size", "8M")
    assert code == 2 and said == f"the system refused something ({error}): see 'tmemfs doctor'"
    assert list(places.iterdir()) == []


def test_a_mount_in_the_foreground_is_served_with_what_was_given(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[Options] = []
    monkeypatch.setattr(supervisor, "serve", lambda options, ready: served.append(options))
    given = ["--size", "8M", "--pool-max", "1G", "--backing", "none", "--backing-max", "50%", "--codec", "zstd:3"]
    assert cli.main(["mount", "--foreground", *given, str(places)]) == 0
    assert cli.main(["mount", "--foreground", "--size", "8M"]) == 0
    assert served == [
        Options(places, 8 << 20, "1G", None, "50%", "zstd:3"),
        Options(places / "mountpoint", 8 << 20, "25%", places / "lib" / "backing", "max", "lz4"),
    ]
    assert sorted(path.name for path in places.iterdir()) == ["lib", "mountpoint"]


@pytest.mark.parametrize("arguments", [["down"], ["umount"], ["mount", "--size", "8M"], ["up", "--size", "8M"]])
def test_what_needs_root_says_so(tmp_path: Path, refused: Said, monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    monkeypatch.setattr(capabilities, "is_root", lambda: False)
    assert refused(*arguments, tmp_path) == (2, "mounting and swapping need root: run it with sudo")


def test_down_where_nothing_is_up_is_done(places: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["down", str(places)]) == 0
    assert capsys.readouterr().out == f"{places}: nothing is up\n"


def test_umount_where_nothing_is_mounted_is_refused(places: Path, refused: Said) -> None:
    code, said = refused("umount", places)
    assert code == 2 and said.startswith(f"nothing is mounted at {places}: see 'mount -t fuse.tmemfs'")


@pytest.mark.parametrize("codec", ["lzma", "zstd:99"])
def test_a_demonstration_with_a_codec_there_is_none_of_is_refused(tmp_path: Path, refused: Said, codec: str) -> None:
    code, said = refused("demo", "--codec", codec, "--directory", tmp_path)
    assert code == 2 and ("choose lz4, zstd" in said or "give zstd:1 to zstd:19" in said)
    assert list(tmp_path.iterdir()) == []


def test_a_demonstration_in_a_directory_that_is_not_there_is_refused(tmp_path: Path, refused: Said) -> None:
    code, said = refused("demo", "--size", "64K", "--directory", tmp_path / "deeper")
    assert (code, said) == (2, f"{tmp_path}/deeper cannot be written to: give another --directory")


@pytest.mark.parametrize(("free", "where"), [("available_ram_bytes", "RAM"), ("statvfs", "disk at ")])
def test_a_demonstration_that_may_not_fit_is_refused_with_the_figures(
    tmp_path: Path, refused: Said, monkeypatch: pytest.MonkeyPatch, free: str, where: str
) -> None:
    class Space:
        f_bavail, f_frsize = 2048, 4096

    if free == "statvfs":
        monkeypatch.setattr(os, "statvfs", lambda path: Space)
    else:
        monkeypatch.setattr(demo, "available_ram_bytes", lambda: 8 << 20)
    code, said = refused("demo", "--size", "8M", "--directory", tmp_path)
    assert code == 2 and said.startswith(f"a demonstration of 8 MiB may need 9 MiB of {where}")
    assert said.endswith("and 8 MiB are free: give a smaller --size")


def test_a_demonstration_of_900_tib_is_refused(tmp_path: Path, refused: Said) -> None:
    code, said = refused("demo", "--size", "900T", "--directory", tmp_path)
    assert code == 2 and said.startswith("a demonstration of 900 TiB may need") and list(tmp_path.iterdir()) == []


def test_a_swap_whose_tables_take_more_than_an_eighth_of_ram_is_refused_with_the_figure(
    places: Path, refused: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "total_ram_bytes", lambda: 1 << 30)
    code, said = refused("mount", "--foreground", "--size", "100G")
    assert code == 2
    assert said.startswith(
        "a swap of 100 GiB needs tables of 206 MiB, more than an eighth of RAM (1 GiB): give a --size of at most"
    )
    assert list(places.iterdir()) == []


def test_a_size_that_the_refusal_names_is_taken() -> None:
    ram = 1 << 30
    with pytest.raises(errors.BadValue) as caught:
        options._check_tables(100 << 30, ram)
    options._check_tables(parse_size(str(caught.value).rpartition("at most ")[2]), ram)
    options._check_tables(2 * ram, ram)


@pytest.mark.parametrize("digits", [3, 30, 5000])
@pytest.mark.parametrize("command", ["mount --foreground", "demo"])
def test_a_level_of_any_number_of_digits_is_refused(places: Path, refused: Said, command: str, digits: int) -> None:
    code, said = refused(*command.split(), "--size", "64K", "--codec", f"zstd:{'9' * digits}")
    assert code == 2 and said.startswith("zstd has no level '999") and said.endswith("give zstd:1 to zstd:19")


def test_standard_output_that_is_full_is_no_trace() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "tmemfs", "doctor"], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "No space left on device" in done.stderr


def test_a_reader_that_stops_early_is_no_trace() -> None:
    command = f"{sys.executable} -m tmemfs doctor | true"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, check=False)
    assert done.stderr == ""


def raising(error: BaseException) -> Callable[..., None]:
    def raises(*_: object) -> None:
        raise error

    return raises


@pytest.mark.parametrize("kind", ERRORS)
def test_an_error_ends_with_2_and_a_shrink_that_fell_short_with_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Said, kind: type[TmemfsError]
) -> None:
    monkeypatch.setattr(view, "print_settings", raising(kind("why: what next")))
    assert refused("get", "--mountpoint", tmp_path) == (1 if kind is FellShort else 2, "why: what next")


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (BrokenPipeError(), 0)])
def test_an_interruption_is_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException, code: int
) -> None:
    monkeypatch.setattr(view, "print_stat", raising(error))
    assert cli.main(["stat", str(tmp_path)]) == code
    assert capsys.readouterr() == ("", "")


def test_a_bug_is_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(view, "print_stat", raising(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        cli.main(["stat", str(tmp_path)])


@pytest.mark.parametrize(("ok", "code", "word"), [(True, 0, "ok"), (None, 0, "limited"), (False, 1, "FAILS")])
def test_the_doctor_ends_with_1_if_something_essential_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], ok: bool | None, code: int, word: str
) -> None:
    found = [Check("FUSE", True, "yes"), Check("loop", ok, "maybe", "" if ok else "modprobe loop")]
    monkeypatch.setattr(doctor, "examine", lambda *_: found)
    assert cli.main(["doctor"]) == code
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in shown[:2]] == [["FUSE", "ok", "yes"], ["loop", word, "maybe"]]
    assert [line.strip() for line in shown[2:]] == ([] if ok else ["-> modprobe loop"])


@pytest.mark.parametrize(
    ("left", "word", "said"),
    [
        (None, True, "none is changed"),
        ("in use", True, "vm.watermark_boost_factor 0 (yours: 15000), 1 kernel workers with real-time priority"),
        ("killed", None, "vm.watermark_boost_factor 0 (yours: 15000), 1 kernel workers with real-time priority"),
        ("secret", None, "unknown"),
    ],
)
def test_the_doctor_says_what_is_changed_of_the_kernels_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: str | None, word: bool | None, said: str
) -> None:
    machine = Machine(tmp_path)
    machine.threads({40: "kworker/u4:0"})
    with machine.running():
        user = machine.user()
        if left:
            user.register()
            user.give_priority()
        if left == "killed":
            machine.kill(user)
        monkeypatch.setattr(doctor, "KernelSettings", machine.user)
        if left == "secret":
            monkeypatch.setattr(Path, "read_bytes", _refuse)
        check = doctor._kernel_settings("kernel settings")
        assert (check.ok, check.found) == (word, said)
        assert ("tmemfs down" in check.advice) == (left == "killed") and ("sudo" in check.advice) == (left == "secret")


def _refuse(_: object) -> bytes:
    raise PermissionError


def test_the_doctor_examines_any_machine_and_creates_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--backing", str(tmp_path / "deeper" / "backing")]) in (0, 1)
    shown = capsys.readouterr().out
    assert all(f"\n{name} " in f"\n{shown}" for name in ("root", "kernel", "FUSE", "loop", "programs", "free disk", "RAM"))
    assert list(tmp_path.iterdir()) == []


def test_the_command_imports_nothing_heavy_before_it_knows_what_is_wanted() -> None:
    heavy = "sorted({'trio', 'pyfuse3', 'lz4', 'zstandard', 'xxhash', 'tmemfs.supervisor', 'tmemfs.cli.view'} & sys.modules.keys())"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys, tmemfs.cli; print({heavy})"], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


def test_what_shows_a_mount_imports_nothing_of_the_daemon() -> None:
    program = "import sys, tmemfs.cli.view, tmemfs.observe.registry, tmemfs.control_files; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    roots = ("trio", "pyfuse3", "lz4", "zstandard", "xxhash")
    parts = tuple(
        f"tmemfs.{part}"
        for part in ("supervisor", "worker", "control", "fuse", "jobs", "pages", "policy", "store", "tiers", "services")
    )
    found = [
        name for name in done.stdout.split() if name in roots or name in parts or name.startswith(tuple(f"{p}." for p in parts))
    ]
    assert found == []
