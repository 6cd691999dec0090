"""Imports point down and in no circle, also those for types alone and those inside functions."""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator
from functools import cache
from pathlib import Path
from typing import Final

import tmemfs

SOURCE: Final = Path(tmemfs.__file__).parent
#: From the top down: a module imports its own layer and those after it.
LAYERS: Final = (
    "__main__",
    "cli",
    "candidate",
    "supervisor",
    "deaths",
    "watchdog",
    "forking",
    "worker",
    "shutdown",
    "trial",
    "handover",
    "manifest",
    "holdings",
    "backing",
    "options",
    "fuse",
    "control",
    "control_files",
    "observe",
    "services",
    "engine",
    "jobs",
    "pages",
    "store",
    "policy",
    "tiers",
    "system",
    "units",
    "errors",
    "tmemfs",
)
#: The store from the top down, module by module: what counts and what changes places are below what plans.
STORE: Final = (
    "consistency",
    "statistics",
    "recompression",
    "tmem",
    "native",
    "compiled",
    "constants",
    "append",
    "reclaim",
    "merges",
    "merge_copy",
    "merge_plans",
    "plans",
    "recovery",
    "transitions",
    "ledger",
    "clean_copies",
    "lanes",
    "occupancy",
    "segments",
    "frames",
    "extents",
    "slots",
    "region",
    "damage",
    "dictionary",
    "codec",
    "record",
)
#: Imports that point up, and circles: each with the reason why it is still there.
UPWARD: Final[dict[tuple[str, str], str]] = {}
CIRCLES: Final[dict[tuple[str, ...], str]] = {}

Graph = dict[str, frozenset[str]]


@cache
def graph() -> Graph:
    """The modules of tmemfs that each one imports."""
    files = {_module_of(file): file for file in [*SOURCE.rglob("*.py"), *SOURCE.rglob("*.pyi")]}
    return {module: frozenset(_imports(file, files.keys())) - {module} for module, file in files.items()}


def _module_of(file: Path) -> str:
    parts = file.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(file: Path, modules: Collection[str]) -> Iterator[str]:
    known = set(modules)
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            assert not node.level, f"{file}: a relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            yield from names & known
            # Names of a package's own come from its __init__, submodules do not.
            if node.module in known and names - known:
                yield node.module


def _layer(module: str) -> str:
    return module.split(".")[1] if "." in module else module


def circles(imports: Graph) -> set[tuple[str, ...]]:
    """Modules that can reach each other."""
    reach = {module: _reached(imports, module) for module in imports}
    found = {tuple(sorted({module} | {o for o in reach[module] if module in reach[o]})) for module in imports}
    return {circle for circle in found if len(circle) > 1}


def _reached(imports: Graph, module: str) -> set[str]:
    found: set[str] = set()
    left = [module]
    while left:
        new = imports[left.pop()] - found
        found |= new
        left += new
    return found


def test_no_modules_import_each_other() -> None:
    assert circles(graph()) == set(CIRCLES)


def test_every_module_belongs_to_a_layer_that_is_listed() -> None:
    assert {_layer(module) for module in graph()} - set(LAYERS) == set()
    assert {module.split(".")[2] for module in graph() if module.startswith("tmemfs.store.")} == set(STORE)


def test_no_import_points_up() -> None:
    layers = {name: number for number, name in enumerate(LAYERS)}
    up = {(a, b) for a, imported in graph().items() for b in imported if layers[_layer(b)] < layers[_layer(a)]}
    assert up == set(UPWARD)


def test_no_import_inside_the_store_points_up() -> None:
    order = {f"tmemfs.store.{name}": number for number, name in enumerate(STORE)}
    inside = ((a, b) for a, imported in graph().items() for b in imported if a in order and b in order)
    assert {(a, b) for a, b in inside if order[b] < order[a]} == set()


def test_a_circle_is_found_and_what_hangs_on_it_is_not_part_of_it() -> None:
    imports = {"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}
    assert circles({module: frozenset(names) for module, names in imports.items()}) == {("b", "c")}
