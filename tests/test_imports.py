"""The one way of imports: samplers <- finetune <- tasks <- launch, one way inside finetune, and no circle anywhere.

Every import counts: those inside functions, and those for type checking.
"""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = ("samplers", "finetune", "tasks", "launch")
# Rooms of finetune, from the ground up; those of one line know nothing of each other.
ROOMS = (
    ("config", "distributed", "estimators", "weight_tail", "strict_json"),
    ("energies",),
    ("populations",),
    ("learning", "certificate"),
    ("runs",),
)


def modules() -> dict[str, ast.Module]:
    """{dotted name below the package: its syntax tree}."""
    found = {}
    for floor in FLOORS:
        for path in sorted((ROOT / floor).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(path.read_text())
    return found


def imported(name: str, tree: ast.Module, names: set[str]) -> Iterator[str]:
    """The modules among ``names`` that module ``name`` imports anywhere."""
    package = name.split(".") if (ROOT / Path(*name.split("."))).is_dir() else name.split(".")[:-1]
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom):
            continue
        if node.level == 0:
            base = (node.module or "").split(".")[1:] if (node.module or "").startswith("tiltune.") else None
        else:
            base = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
        if base is None:
            continue
        place = ".".join(part for part in base if part)
        for alias in node.names:
            inner = f"{place}.{alias.name}"
            if inner in names or place in names:
                yield inner if inner in names else place


def graph(trees: dict[str, ast.Module]) -> dict[str, set[str]]:
    return {name: set(imported(name, tree, set(trees))) - {name} for name, tree in trees.items()}


def height(name: str) -> tuple[int, int]:
    """(floor, room) of a module, each counted from the ground."""
    floor, *rest = name.split(".")
    room = 0
    if floor == "finetune" and rest:
        room = next(number for number, rooms in enumerate(ROOMS) if rest[0] in rooms)
    return FLOORS.index(floor), room


def backward(edges: dict[str, set[str]]) -> list[str]:
    """Arrows that run to a higher floor or room, or across to a room beside."""
    wrong = []
    for name, targets in edges.items():
        for target in targets:
            same_room = name.split(".")[:2] == target.split(".")[:2]
            beside = height(name) == height(target) and name.startswith("finetune.") and not same_room
            if height(target) > height(name) or beside:
                wrong.append(f"{name} -> {target}")
    return wrong


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """One path for each module from which an import leads back to itself."""
    done: set[str] = set()
    found: list[list[str]] = []

    def visit(name: str, path: list[str]) -> None:
        if name in path:
            found.append([*path[path.index(name) :], name])
        elif name not in done:
            for target in sorted(edges[name]):
                visit(target, [*path, name])
            done.add(name)

    for name in edges:
        visit(name, [])
    return found


def test_imports_run_one_way() -> None:
    assert backward(graph(modules())) == []


def test_no_circle_of_imports() -> None:
    assert circles(graph(modules())) == []


@pytest.mark.parametrize(
    ("name", "line", "arrow"),
    [
        ("samplers.chain", "from ..finetune.config.yaml_file import to_yaml", "samplers.chain -> finetune.config.yaml_file"),
        (
            "finetune.energies.energy",
            "def f():\n    from ..learning import trainer",
            "finetune.energies.energy -> finetune.learning.trainer",
        ),
        (
            "finetune.learning.trainer",
            "if TYPE_CHECKING:\n    from ..certificate.verdict import judge_unknown",
            "finetune.learning.trainer -> finetune.certificate.verdict",
        ),
    ],
)
def test_an_arrow_back_is_found(name: str, line: str, arrow: str) -> None:
    trees = modules()
    trees[name].body += ast.parse(line).body
    assert backward(graph(trees)) == [arrow]


def test_a_circle_is_found() -> None:
    trees = modules()
    trees["samplers.chain"].body += ast.parse("def f():\n    from .rollout import rollout").body
    assert any("samplers.rollout" in path for path in circles(graph(trees)))


def test_every_folder_of_code_is_a_package_that_is_installed() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {path.parent.relative_to(ROOT) for floor in FLOORS for path in (ROOT / floor).rglob("*.py")}
    assert sorted(listed) == sorted({"tiltune", *(".".join(("tiltune", *folder.parts)) for folder in folders)})
