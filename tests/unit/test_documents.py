"""The developers' pages and the lists of modules: what they name exists, and the layers are drawn in the order that is tested."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Final

import pytest

from tests.unit.test_layers import LAYERS

ROOT: Final = Path(__file__).parents[2]
DOCS: Final = ROOT / "docs"
PAGES: Final = ("architecture", "concurrency", "format", "contributing", "performance")
LINKED: Final = (ROOT / "README.md", *sorted(DOCS.glob("*.md")), *sorted(DOCS.glob("decisions/*.md")))
PATH: Final = re.compile(r"\.?[\w-]+(/[\w-]+)*(/|\.(py|pyx|pyi|pxi|md|c|sh))")
#: Names of the kernel, of C and of variables that are not assigned anywhere.
OF_OTHERS: Final = frozenset({
    "MCL_CURRENT", "RLIMIT_NPROC", "fuse_io_alloc", "lo_rw_aio", "stx_dio_offset_align", "max_examples",
    "TMEMFS_FUZZ_SEED", "TMEMFS_PURE_PYTHON", "TMEMFS_ROUNDS", "TMEMFS_SEED",
})  # fmt: skip


@cache
def names() -> dict[str, set[str]]:
    """By class: what it and the classes below it define. Under '': every name in the tree."""
    found: dict[str, set[str]] = {"": set()}
    for file in [*ROOT.glob("tmemfs/**/*.py*"), *ROOT.glob("tools/**/*.py"), *ROOT.glob("tests/**/*.py")]:
        if file.suffix in (".py", ".pyi"):
            _collect(ast.parse(file.read_text()), found)
        found[""].add(file.stem)
    return found


def _collect(tree: ast.Module, found: dict[str, set[str]]) -> None:
    for node in ast.walk(tree):
        found[""] |= _defined(node)
        if isinstance(node, ast.ClassDef):
            found.setdefault(node.name, set()).update(*map(_defined, ast.walk(node)))


def _defined(node: ast.AST) -> set[str]:
    match node:
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            return {name}
        case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()) | ast.arg(arg=name):
            return {name}
        case _:
            return set()


def text_of(page: str) -> str:
    """The page."""
    return (DOCS / f"{page}.md").read_text()


def _in_backticks(text: str) -> list[str]:
    return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", re.sub(r"```.*?```", "", text, flags=re.S))


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_a_page_names_exists(page: str) -> None:
    paths = [path for path in _in_backticks(text_of(page)) if PATH.fullmatch(path) and not path.startswith("control/")]
    places = (ROOT, ROOT / "tmemfs", ROOT / "tmemfs/store", ROOT / "tmemfs/fuse")
    assert [path for path in paths if not any((place / path).exists() for place in places)] == []


@pytest.mark.parametrize("page", PAGES)
def test_every_attribute_that_a_page_names_exists(page: str) -> None:
    dotted = re.findall(r"\b([A-Z]\w+)\.(_?[a-z]\w*)\b", text_of(page))
    of_ours = [(owner, name) for owner, name in dotted if f"{owner}.{name}" not in ("README.md", "CHANGELOG.md")]
    assert [f"{owner}.{name}" for owner, name in of_ours if name not in names().get(owner, set())] == []


@pytest.mark.parametrize("page", PAGES)
def test_every_class_constant_and_function_that_a_page_names_exists(page: str) -> None:
    words = set(_in_backticks(text_of(page)))
    ours = {word for word in words if re.fullmatch(r"_?[A-Z]\w*[a-z]\w*|_?[A-Z]+_[A-Z_]+|_?[a-z]+(_[a-z]+)+", word)}
    # Keys of stat are names, too.
    known = names()[""] | set(re.findall(r"\w+", (DOCS / "control.md").read_text()))
    assert ours - known - OF_OTHERS == set()


def _headings(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def _links(page: Path) -> Iterator[tuple[str, str]]:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not re.match(r"\w+:", target):
            path, _, anchor = target.partition("#")
            yield path, anchor


@pytest.mark.parametrize("page", LINKED, ids=lambda page: page.name)
def test_every_link_leads_to_a_page_and_a_heading(page: Path) -> None:
    broken = []
    for path, anchor in _links(page):
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in _headings(target)):
            broken.append(f"{path}#{anchor}")
    assert broken == []


def test_the_drawing_of_the_layers_is_the_order_that_is_tested() -> None:
    section = re.search(r"^## Layers\n(.*?)^```", text_of("architecture"), re.M | re.S)
    assert section is not None
    drawn = re.findall(r"^ {4}(\w+)/? ", section[1], re.M)
    assert drawn == [layer for layer in LAYERS if layer not in ("__main__", "tmemfs")]


@pytest.mark.parametrize("package", sorted((ROOT / "tmemfs").glob("*/__init__.py")), ids=lambda file: file.parent.name)
def test_the_docstring_of_a_package_names_all_its_modules(package: Path) -> None:
    described = set(re.findall(r"\w+", ast.get_docstring(ast.parse(package.read_text())) or ""))
    assert {file.stem for file in package.parent.glob("*.py*")} - {"__init__"} - described == set()
