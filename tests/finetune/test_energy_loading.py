"""Energies by name: what a spec means, that files shadow nothing, and one sentence for whatever is wrong."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tiltune.finetune.energies.energy import EnergyMeter
from tiltune.finetune.energies.names import EnergySpec, combine, load_energy, parse_energy
from tiltune.finetune.energies.weighted_sum import WeightedSum

X = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))

SOURCE = """\
from dataclasses import dataclass

LOADED = object()
width = 3.0


def total(x):
    return x.sum(1)


def closeness(target, *, scale=1.0):
    def energy(x):
        return scale * (x - target).square().sum(1)
    return energy


@dataclass
class Ball:
    radius: float = 1.0

    def __call__(self, x):
        return (x.norm(dim=1) - self.radius).relu()


ball = Ball(0.5)


def failing(path):
    raise OSError(f"no weights at {path}")


def number(value: int = 1):
    return value
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder to work in, with an energy file; sys.path and the modules are as before afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    (tmp_path / "my_energy.py").write_text(SOURCE)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith(("_tiltune_energy_", "pack_of_tests", "broken_pack")):
            del sys.modules[name]


# --- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("wanted", EnergySpec(1.0, "", "wanted", "", (), {})),
        ("classes(3)", EnergySpec(1.0, "", "classes", "(3)", (3,), {})),
        ("classes()", EnergySpec(1.0, "", "classes", "()", (), {})),
        ("a.b:c", EnergySpec(1.0, "a.b", "c", "", (), {})),
        ("0.5*f.py:g(3, scale=.5)", EnergySpec(0.5, "f.py", "g", "(3, scale=.5)", (3,), {"scale": 0.5})),
        ("-2 * f.py:g", EnergySpec(-2.0, "f.py", "g", "", (), {})),
        ("1e-3*wanted", EnergySpec(1e-3, "", "wanted", "", (), {})),
        (r"C:\work\f.py:g(-1)", EnergySpec(1.0, r"C:\work\f.py", "g", "(-1)", (-1,), {})),
        ("my (copy)/f.py:g((1, 2))", EnergySpec(1.0, "my (copy)/f.py", "g", "((1, 2))", ((1, 2),), {})),
        ("d(1)/f.py:g(3)", EnergySpec(1.0, "d(1)/f.py", "g", "(3)", (3,), {})),
        (
            'f.py:g("a:b(2)*c", {"k:v": [1, None]}, on=True)',
            EnergySpec(
                1.0, "f.py", "g", '("a:b(2)*c", {"k:v": [1, None]}, on=True)', ("a:b(2)*c", {"k:v": [1, None]}), {"on": True}
            ),
        ),
        ('text("x:y(2)")', EnergySpec(1.0, "", "text", '("x:y(2)")', ("x:y(2)",), {})),
        ("  f.py:g(\n  3,\n)  ", EnergySpec(1.0, "f.py", "g", "(\n  3,\n)", (3,), {})),
    ],
)
def test_specs_are_read(spec: str, expected: EnergySpec) -> None:
    assert parse_energy(spec) == expected


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "cannot be read; write file.py:name"),
        ("f.py:", "cannot be read"),
        ("f.py:g(3", "cannot be read"),
        ("f.py:g(3))", "cannot be read"),
        ("f.py:g(3)(4)", "cannot be read"),
        ("f.py:g(3) + f.py:h", "cannot be read"),
        ("f.py:g.h", "cannot be read"),
        ("g(scale=)", "cannot be read"),
        ("f.py:g(" + "(" * 500 + ")" * 500 + ")", "cannot be read"),
        ("my_energy.py", r"names no function; write my_energy\.py:name"),
        ("package.module", r"names no function; write package\.module:name"),
        ("alpha*f.py:g", "scale 'alpha' of energy .* is not a number"),
        ("*f.py:g", "scale '' of energy"),
        ("0*f.py:g", "scale of energy '0.f.py:g' is 0.0; it must be finite and not zero"),
        ("nan*f.py:g", "scale .* is nan"),
        ("1e999*f.py:g", "scale .* is inf"),
        ("2*3*f.py:g", "cannot be read"),
        ("f.py:g(width)", r"argument width of energy 'f.py:g\(width\)' is not a Python literal"),
        ("f.py:g(3 + x)", r"argument 3 \+ x"),
        ("f.py:g(__import__('os').system('true'))", "not a Python literal"),
        ("f.py:g(*[1])", r"argument \*\[1\]"),
        ("f.py:g(**{'a': 1})", r"has \*\* among its arguments"),
        ("f.py:g({[]: 1})", "not a Python literal"),
        ("f.py:g([i for i in range(3)])", "not a Python literal"),
    ],
)
def test_what_cannot_be_read_is_refused(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        parse_energy(spec)
    assert "\n" not in str(caught.value)


def test_reading_needs_no_torch() -> None:
    code = "import sys; from tiltune.finetune.energies import names as e; e.parse_energy('a:b(3)'); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# --- loading ----------------------------------------------------------------------------------------------------------


def test_energies_of_a_file(here: Path) -> None:
    squared = (X - 2).square().sum(1)
    assert torch.equal(load_energy("my_energy.py:total")(X), X.sum(1))
    assert torch.equal(load_energy("./my_energy.py:closeness(2)")(X), squared)
    assert torch.equal(load_energy(f"{here}/my_energy.py:closeness(target=2, scale=.5)")(X), 0.5 * squared)
    assert torch.equal(load_energy("my_energy.py:Ball(.5)")(X), load_energy("my_energy.py:ball")(X))
    assert torch.equal(load_energy("0.5*my_energy.py:closeness(2)")(X), 0.5 * squared)
    assert torch.equal(EnergyMeter(load_energy("-1*my_energy.py:total"))(X), -X.sum(1))
    # Compiled as it stands: the loader's own `from __future__ import annotations` does not reach into it.
    assert load_energy("my_energy.py:number").__annotations__ == {"value": int}


def test_only_parentheses_make_a_factory(here: Path) -> None:
    """A factory named without them is taken for the energy it is not, and the meter says so."""
    with pytest.raises(ValueError, match=r"energy closeness of my_energy.py returned a function.*factory, to be called first"):
        EnergyMeter(load_energy("my_energy.py:closeness"))(X)


def test_energies_of_modules_and_of_a_task(here: Path) -> None:
    package = here / "pack_of_tests"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "part.py").write_text(SOURCE)
    sys.path.append(str(here))
    assert torch.equal(load_energy("pack_of_tests.part:total")(X), X.sum(1))
    assert torch.equal(load_energy("total", search="pack_of_tests.part")(X), X.sum(1))
    assert torch.equal(load_energy("2*closeness(0)", search="pack_of_tests.part")(X), 2 * X.square().sum(1))
    # A module or a file that is named is never looked up in the task.
    with pytest.raises(ValueError, match="there is no module part"):
        load_energy("part:total", search="pack_of_tests.part")


def test_a_file_shadows_nothing_and_leaves_the_path_alone(here: Path) -> None:
    (here / "random.py").write_text("raise RuntimeError('the neighbor was imported')\n")
    (here / "torch.py").write_text("raise RuntimeError('the neighbor was imported')\n")
    (here / "helper.py").write_text("def shift(x):\n    return x + 1\n")
    (here / "json.py").write_text(
        "import sys\nsys.modules.pop('random', None)\nimport random, torch\nfrom .helper import shift\n"
        "assert hasattr(random, 'Random')\ndef energy(x):\n    return shift(x).sum(1)\n"
    )
    (here / "greedy.py").write_text("import helper\n")
    path, json_module = list(sys.path), sys.modules["json"]
    assert torch.equal(load_energy("json.py:energy")(X), (X + 1).sum(1))
    assert sys.path == path
    assert sys.modules["json"] is json_module
    assert "helper" not in sys.modules
    with pytest.raises(ValueError, match=r"raised ModuleNotFoundError on line 1 of greedy.py \(No module named 'helper'\)"):
        load_energy("greedy.py:energy")


def test_a_file_is_imported_once_and_again_when_its_text_changes(here: Path) -> None:
    def loaded() -> Any:
        return load_energy("my_energy.py:total").__globals__["LOADED"]  # type: ignore[attr-defined]

    first = loaded()
    assert loaded() is first
    # Same length, same second: neither the size nor the time of the file tells.
    (here / "my_energy.py").write_text(SOURCE.replace("x.sum(1)", "x.std(1)"))
    assert loaded() is not first
    assert torch.equal(load_energy("my_energy.py:total")(X), X.std(1))
    (here / "copy.py").write_text(SOURCE)
    assert load_energy("copy.py:total").__globals__["LOADED"] is not first  # type: ignore[attr-defined]


def test_a_file_that_failed_is_tried_again(here: Path) -> None:
    file = here / "needs.py"
    file.write_text("from .later import energy\n")
    with pytest.raises(ValueError, match=r"ModuleNotFoundError on line 1 of needs.py"):
        load_energy("needs.py:energy")
    (here / "later.py").write_text("def energy(x):\n    return x.sum(1)\n")
    assert torch.equal(load_energy("needs.py:energy")(X), X.sum(1))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("absent.py:total", "there is no file /.*absent.py"),
        ("folder/absent.py:total", "there is no file"),
        ("folder.py:total", r"folder.py cannot be read \(Is a directory\)"),
        ("folder/thing:total", "folder/thing is not a .py file"),
        ("my-energy:total", "'my-energy' is neither a .py file nor the dotted name of a module"),
        ("my_energy:total", r"there is no module my_energy; for the file, write my_energy.py:total"),
        ("no_such_package.part:total", "there is no module no_such_package"),
        ("my_energy.py:totl", "my_energy.py has no totl; did you mean total"),
        ("my_energy.py:zzz", "has no zzz; it defines total, closeness, Ball, ball, failing, number"),
        ("empty.py:energy", "has no energy; it defines no function"),
        ("my_energy.py:width", "width in my_energy.py is not callable, it is a float"),
        ("my_energy.py:width(3)", "not callable"),
        ("my_energy.py:Ball", r"'my_energy.py:Ball' is a class, not an energy; make one of it: my_energy.py:Ball\(...\)"),
        ("my_energy.py:failing('here')", r"the call raised OSError on line 29 of my_energy.py \(no weights at here\)\.$"),
        ("my_energy.py:closeness()", r"the call raised TypeError \(.*missing.*'target'\); if closeness itself is the energy"),
        ("my_energy.py:closeness(2, width=1)", "the call raised TypeError .*unexpected keyword argument 'width'"),
        ("my_energy.py:number(3)", "the call returned int, not an energy; if number itself is the energy"),
        ("name.py:energy", r"importing /.*name.py raised NameError on line 3 of name.py \(name 'torch' is not defined\)"),
        ("syntax.py:energy", r"raised SyntaxError on line 2 of syntax.py"),
        ("null.py:energy", "raised SyntaxError"),
        ("quits.py:energy", r"raised SystemExit on line 2 of quits.py \(3\)"),
        ("silent.py:energy", r"raised AssertionError on line 1 of silent.py\.$"),
        ("lines.py:energy", r"raised ValueError on line 1 of lines.py \(one two\)"),
        ("indirect.py:energy", r"raised ZeroDivisionError on line 2 of divides.py"),
        ("above.py:energy", "raised ImportError on line 1 of above.py .*relative import"),
        (
            "broken_pack:energy",
            r"importing broken_pack raised ModuleNotFoundError on line 1 of __init__.py \(No module named 'nothing_such'\)",
        ),
        ("broken_pack.part:energy", "importing broken_pack.part raised ModuleNotFoundError"),
        ("total", r"energy 'total' names neither a file nor a module, and no task.*write file.py:total"),
    ],
)
def test_what_is_not_there_is_said_in_one_sentence(here: Path, spec: str, message: str) -> None:
    (here / "folder.py").mkdir()
    (here / "folder").mkdir()
    files = {
        "empty.py": "",
        "name.py": "\n\nx = torch.zeros(3)\n",
        "syntax.py": "x = 1\ndef energy(x:\n",
        "null.py": "x = 1\0",
        "quits.py": "import sys\nsys.exit(3)\n",
        "silent.py": "assert False\n",
        "lines.py": "raise ValueError('one\\n  two')\n",
        "divides.py": "def divide():\n    return 1 / 0\n",
        "indirect.py": "from .divides import divide\ndivide()\n",
        "above.py": "from ..elsewhere import energy\n",
    }
    for name, text in files.items():
        (here / name).write_text(text)
    (here / "broken_pack").mkdir()
    (here / "broken_pack" / "__init__.py").write_text("import nothing_such\n")
    (here / "broken_pack" / "part.py").write_text("")
    if spec.startswith("broken_pack"):
        sys.path.append(str(here))
    with pytest.raises(ValueError, match=message) as caught:
        load_energy(spec)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("call", ["", "()"])
def test_an_interrupt_while_loading_stays_one(here: Path, call: str) -> None:
    stop = "raise KeyboardInterrupt\n"
    (here / "slow.py").write_text(f"def energy():\n    {stop}" if call else stop)
    before = set(sys.modules)
    with pytest.raises(KeyboardInterrupt):
        load_energy(f"slow.py:energy{call}")
    assert not any(".file_" in name for name in set(sys.modules) - before) or call


# --- several ----------------------------------------------------------------------------------------------------------


def test_specs_combine_into_a_weighted_sum(here: Path) -> None:
    (here / "other.py").write_text(SOURCE)
    energy = combine(["my_energy.py:closeness(2)", "0.1*my_energy.py:total", "-3*other.py:total"])
    assert isinstance(energy, WeightedSum)
    assert [scale for scale, _ in energy.terms.values()] == [1.0, 0.1, -3.0]
    meter = EnergyMeter(energy)
    torch.testing.assert_close(meter(X), (X - 2).square().sum(1) - 2.9 * X.sum(1))
    mean = X.sum(1).mean().item()
    expected = {"closeness(2)": (X - 2).square().sum(1).mean().item(), "my_energy.py:total": mean, "other.py:total": mean}
    assert meter.term_means == pytest.approx(expected)


def test_what_cannot_be_combined_is_refused(here: Path) -> None:
    with pytest.raises(ValueError, match="name at least one term"):
        combine([])
    with pytest.raises(ValueError, match=r"energy 'my_energy.py:total' is given 2 times; give it once, with the sum"):
        combine(["my_energy.py:total", "0.5*my_energy.py:total"])
