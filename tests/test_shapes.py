"""Signatures say the shapes of their tensors, and the shapes that they say are those of every call.

The suite itself checks no call, which would cost it three fifths more CPU time (``--check-shapes``). Small runs are checked.
"""

from __future__ import annotations

import ast
import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from shape_check import CHECKED

ROOT = Path(__file__).parents[1]
SHAPED = ("Bool", "Float", "Int", "Real", "Shaped")


def checked_files() -> Iterator[Path]:
    for name in CHECKED:
        place = ROOT.joinpath(*name.split(".")[1:])
        yield from sorted(place.rglob("*.py")) if place.is_dir() else [place.with_suffix(".py")]


def annotations(tree: ast.Module) -> Iterator[ast.expr]:
    """Those of parameters, results and fields, and the values of module-level names, some of which are types."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            arguments = node.args
            every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
            found = [argument.annotation for argument in every if argument is not None]
            yield from (annotation for annotation in (*found, node.returns) if annotation is not None)
        elif isinstance(node, ast.ClassDef):
            yield from (field.annotation for field in node.body if isinstance(field, ast.AnnAssign))
    yield from (node.value for node in tree.body if isinstance(node, ast.Assign))


def is_tensor(node: ast.AST) -> bool:
    return (isinstance(node, ast.Name) and node.id == "Tensor") or (isinstance(node, ast.Attribute) and node.attr == "Tensor")


def is_shaped(node: ast.AST) -> bool:
    return isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id in SHAPED


def plain_tensors(node: ast.AST) -> Iterator[ast.AST]:
    """The tensors without a shape in an annotation."""
    if is_tensor(node):
        yield node
    elif not is_shaped(node):
        for child in ast.iter_child_nodes(node):
            yield from plain_tensors(child)


def without_shape(tree: ast.Module) -> list[str]:
    """The annotations that hold a tensor without a shape, each as it is written."""
    return [ast.unparse(annotation) for annotation in annotations(tree) if any(True for _ in plain_tensors(annotation))]


def test_every_tensor_of_a_signature_has_a_shape() -> None:
    found = {path.name: without_shape(ast.parse(path.read_text())) for path in checked_files()}
    assert {name: missing for name, missing in found.items() if missing} == {}
    assert len(found) > 50


@pytest.mark.parametrize(
    "line",
    [
        "def f(x: Tensor) -> None: ...",
        "def f() -> tuple[Float[Tensor, ' n'], Tensor]: ...",
        "class C:\n    def f(self, *, x: torch.Tensor | None = None) -> None: ...",
        "def f():\n    def g(*x: Tensor) -> None: ...",
        "class C:\n    x: Tensor | None = None",
        "F = Callable[[Tensor], Float[Tensor, '']]",
    ],
)
def test_a_tensor_without_a_shape_is_found(line: str) -> None:
    assert len(without_shape(ast.parse(line))) == 1
    assert without_shape(ast.parse(line.replace("torch.Tensor", "Tensor").replace("Tensor", "Float[Tensor, ' n']"))) == []


def test_every_shape_can_be_read_at_runtime() -> None:
    """What cannot be read, jaxtyping leaves unchecked without a word."""
    aliases, count = {"AnyShape", "Index", "States", "Steps", "Timestep"}, 0
    for path in checked_files():
        module = importlib.import_module(".".join(("tiltune", *path.relative_to(ROOT).with_suffix("").parts)))
        for annotation in annotations(ast.parse(path.read_text())):
            if any(is_shaped(node) or (isinstance(node, ast.Name) and node.id in aliases) for node in ast.walk(annotation)):
                eval(ast.unparse(annotation), dict(vars(module)))
                count += 1
    assert count > 300


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, env=dict(os.environ))


def test_small_runs_of_everything_have_the_shapes_that_are_stated() -> None:
    done = run("-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "--check-shapes", "tests/small_runs.py")
    assert done.returncode == 0, done.stdout[-8000:]


def test_a_program_checks_nothing() -> None:
    code = "import sys, tiltune.finetune.learning.trainer; print('beartype' in sys.modules)"
    assert run("-c", code).stdout.strip() == "False"
