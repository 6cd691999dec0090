"""One name, one thing: what the code calls a class or a module means one thing, and what is private stays private."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

import tmemfs

SOURCE: Final = Path(tmemfs.__file__).parent
TOOLS: Final = SOURCE.parent / "tools"
#: Names that are not ours to choose.
SPECIAL: Final = {"__init__", "__main__"}
#: Public, though the standard library has them begin with an underscore.
OF_PYTHON: Final = {"_exit", "_replace"}


def sources(directory: Path) -> Iterator[tuple[Path, ast.Module]]:
    for file in sorted(directory.rglob("*.py")):
        yield file, ast.parse(file.read_text())


def test_no_two_classes_have_one_name() -> None:
    places = defaultdict(list)
    for file, tree in sources(SOURCE):
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(str(file.relative_to(SOURCE)))
    assert {name: files for name, files in places.items() if len(files) > 1} == {}


def test_no_two_modules_have_one_name() -> None:
    places = defaultdict(list)
    for file in [*SOURCE.rglob("*.py"), *SOURCE.rglob("*.pyx")]:
        places[file.stem].append(str(file.relative_to(SOURCE)))
    assert {name: files for name, files in places.items() if len(files) > 1 and name not in SPECIAL} == {}


def test_settings_of_the_machine_are_changed_in_one_place_only() -> None:
    """What writes them is imported by kernel_settings.py alone, and no other module names a file below /proc/sys to write."""
    users = {
        str(file.relative_to(SOURCE))
        for file, tree in sources(SOURCE)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module in ("tmemfs.system.sysctl", "tmemfs.system.kworkers")
    }
    assert users == {"system/kernel_settings.py"}
    schedulers = {
        str(file.relative_to(SOURCE))
        for file, tree in sources(SOURCE)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr == "sched_setscheduler"
    }
    assert schedulers == {"system/kworkers.py", "system/memory.py"}  # the second sets our own threads'


@pytest.mark.skipif(not TOOLS.is_dir(), reason="tmemfs is installed without its tools")
def test_tools_use_public_names_only() -> None:
    used = {(str(file.relative_to(TOOLS)), name) for file, tree in sources(TOOLS) for name in private_names_of_others(tree)}
    assert used == set()


def private_names_of_others(tree: ast.Module) -> Iterator[str]:
    """Private names that a module imports, or uses of an object other than `self`, unless it defines them itself."""
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)}
    own |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and is_self(node.value)} | OF_PYTHON
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.ImportFrom) else []
        names += [node.attr] if isinstance(node, ast.Attribute) and not is_self(node.value) else []
        yield from (name for name in names if name.startswith("_") and not name.startswith("__") and name not in own)


def is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")
