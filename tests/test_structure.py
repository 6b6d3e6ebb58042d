"""The house: what imports what, read from the sources. Arrows point downwards only, and nothing goes in a circle."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[1]
PACKAGE = "diffusers_guidance"
FLOORS = ("kernels", "guidance", "support", "attach", "pictures", "search", "bench", "app", "shell")
"""From the ground up; a module imports from its own floor and those below it. `samples` is data, for all of them."""


def modules() -> dict[str, Path]:
    """By name, the files of the package; not the public list, and not the examples, which are users' code."""
    found = {}
    for folder in ("guidance", "kernels", "pipelines", "samples"):
        for file in (CHECKOUT / folder).rglob("*.py"):
            parts = file.relative_to(CHECKOUT).with_suffix("").parts
            parts = parts[1:] if folder == "guidance" else parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            if parts and parts[:2] not in (("samples", "examples"), ("samples", "training")):
                found[".".join((PACKAGE, *parts))] = file
    return found


MODULES = modules()
TREES = {name: ast.parse(file.read_text(encoding="utf-8")) for name, file in MODULES.items()}


def imported(tree: ast.Module) -> Iterator[str]:
    """Every name that is imported: under TYPE_CHECKING and inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def module_of(name: str) -> str | None:
    """The package's module that an imported name is, or is in."""
    while name not in MODULES and "." in name:
        name = name.rpartition(".")[0]
    return name if name in MODULES else None


ARROWS = {name: {to for each in imported(tree) if (to := module_of(each))} - {name} for name, tree in TREES.items()}


def floor(name: str) -> str:
    """`kernels`, `guidance`, `samples`, or the folder of `pipelines`."""
    parts = name.split(".")
    if parts[1] == "pipelines":
        return parts[2] if len(parts) > 2 else "kernels"  # the folder's own file is empty
    return parts[1] if parts[1] in ("kernels", "samples") else "guidance"


def test_every_file_has_a_floor():
    assert {floor(name) for name in MODULES} == {*FLOORS, "samples"}


@pytest.mark.parametrize("of", FLOORS)
def test_arrows_point_down(of):
    below = {*FLOORS[: FLOORS.index(of) + 1], "samples"}
    up = [f"{name} -> {to}" for name in MODULES if floor(name) == of for to in ARROWS[name] if floor(to) not in below]
    assert not up


def test_data_imports_nothing():
    assert not [f"{name} -> {to}" for name in MODULES if floor(name) == "samples" for to in ARROWS[name]]


def test_no_module_is_in_a_circle():
    left = {name: set(arrows) for name, arrows in ARROWS.items()}
    while ends := {name for name, arrows in left.items() if not arrows}:
        left = {name: arrows - ends for name, arrows in left.items() if name not in ends}
    # What only leads into a circle is not in it.
    while starts := set(left) - {to for arrows in left.values() for to in arrows}:
        left = {name: arrows for name, arrows in left.items() if name not in starts}
    assert not left


def test_the_public_list_is_for_users():
    """It imports from all floors, so whoever imports from it is in a circle."""
    public = {
        f"{name} imports {each}"
        for name, tree in TREES.items()
        for each in imported(tree)
        if each == PACKAGE or (each.startswith(f"{PACKAGE}.") and not module_of(each) and each.count(".") == 1)
    }
    assert not public


def test_diffusers_is_imported_in_pipelines_alone():
    knows = {name for name, tree in TREES.items() if any(each.split(".")[0] == "diffusers" for each in imported(tree))}
    assert not {name for name in knows if not name.startswith(f"{PACKAGE}.pipelines.")}


def test_modules_are_imported_by_statements():
    """No `importlib.import_module`, no `__import__`: such arrows could not be seen here."""
    tricks = {
        name
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if (isinstance(node, ast.Attribute) and node.attr == "import_module")
        or (isinstance(node, ast.Name) and node.id in ("__import__", "import_module"))
    }
    assert not tricks


def test_the_map_of_attach_shows_every_file():
    folder = f"{PACKAGE}.pipelines.attach"
    words = set(re.findall(r"\w+", ast.get_docstring(TREES[folder]) or ""))
    assert {name.rpartition(".")[2] for name in MODULES if name.startswith(f"{folder}.")} <= words
