"""The command line as a user meets it: help is instant, bad input is refused before any work, nothing is overwritten."""

import subprocess
import sys
import time

import pytest

from tiltune.launch import cli
from tiltune.launch.verbs import two_d
from tiltune.tasks.task import TASKS


def tiltune(*arguments, cwd=None):
    return subprocess.run([sys.executable, "-m", "tiltune", *arguments], capture_output=True, text=True, cwd=cwd, timeout=300)


def test_help_names_the_verbs_and_loads_nothing_heavy():
    code = "import sys, tiltune.launch.cli as c; sys.argv = ['tiltune', '--help']\ntry: c.main()\nexcept SystemExit: pass\n"
    code += "print([m for m in ('torch', 'diffusers', 'accelerate', 'matplotlib', 'numpy') if m in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "2d" in shown and "bench" in shown and "example" in shown
    assert shown.strip().endswith("[]")


def test_every_verbs_help_has_an_example_and_loads_nothing_heavy():
    code = """
import sys, time
from tiltune.launch import cli
from tiltune.tasks.task import TASKS
for verb in [*cli.VERBS, *(f"train {task}" for task in TASKS)]:
    started = time.perf_counter()
    try:
        cli.run([*verb.split(), "--help"])
    except SystemExit as exit:
        assert exit.code == 0
    print(f"== {time.perf_counter() - started:.2f} s")
print([m for m in ("torch", "diffusers", "accelerate", "matplotlib", "numpy") if m in sys.modules])
"""
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    *helps, loaded = shown.split("\n== ")
    assert loaded.splitlines()[-1] == "[]"
    assert len(helps) == len(cli.VERBS) + len(TASKS)
    for text in helps:
        assert "usage: tiltune " in text and "example: " in text
    own = helps[list(cli.VERBS).index("train")], helps[len(cli.VERBS)]
    assert "'classes(3)'" not in own[0] and "'classes(3)'" in own[1]  # a task's help shows what its recipe says


def test_the_console_script_is_quick():
    """Measured: .3 s for a verb's help, .1 s for the list of verbs. What is tested leaves room for a busy machine."""
    for arguments, limit in ((["--help"], 3), (["train", "--help"], 5)):
        started = time.perf_counter()
        assert tiltune(*arguments).returncode == 0
        took = time.perf_counter() - started
        print(f"{arguments}: {took:.2f} s")
        assert took < limit


def test_statuses_and_sentences(monkeypatch, capsys):
    from types import SimpleNamespace

    from tiltune.finetune.certificate.criteria import EXIT_STATUS

    def breaking(error):
        def main(argv):
            raise error

        return lambda name, package: SimpleNamespace(main=main)

    for error, status in (
        (KeyboardInterrupt(), 130),
        (ValueError("one sentence."), 2),
        (FileNotFoundError(2, "No such file", "x"), 2),
        (FloatingPointError("the gradient is not finite."), 1),
    ):
        monkeypatch.setattr(cli, "import_module", breaking(error))
        assert cli.run(["train"]) == status
        assert len(capsys.readouterr().err.splitlines()) == 1
    for error in (
        RuntimeError("a\nbug"),
        MemoryError("a bug"),
        AssertionError("a bug"),
    ):  # keeps its traceback, and is no verdict
        monkeypatch.setattr(cli, "import_module", breaking(error))
        assert cli.run(["evaluate"]) == 70
        shown = capsys.readouterr().err
        assert shown.startswith("Traceback") and "in main" in shown
        assert shown.splitlines()[-1] == f"tiltune evaluate: unexpected {type(error).__name__}: a bug"
    assert 70 not in EXIT_STATUS.values()
    monkeypatch.setattr(cli, "import_module", breaking(SystemExit(0)))
    with pytest.raises(SystemExit):  # control: how tyro ends
        cli.run(["train"])
    assert cli.run(["tranin"]) == 2
    assert "did you mean train" in capsys.readouterr().err


def test_a_reader_that_has_had_enough_is_no_error():
    command = f"{sys.executable} -m tiltune train --help | head -1"
    shown = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert shown.stdout.startswith("usage: tiltune train")
    assert shown.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["2d", "--alpha", "0"], "alpha > 0"),
        (["2d", "--alpha", "-1"], "alpha > 0"),
        (["2d", "--objective", "ppo"], "log_variance"),
        (["2d", "--chain", "dpm"], "brownian"),
        (["2d", "--steps", "1"], "at least 2 steps"),
        (["2d", "--threads", "0"], "at least one thread"),
        (["3d"], "unknown verb"),
        ([], "usage"),
    ],
)
def test_bad_input_exits_2_and_leaves_nothing_behind(tmp_path, arguments, says):
    shown = tiltune(*arguments, cwd=tmp_path)
    assert shown.returncode == 2
    assert says in shown.stdout + shown.stderr
    assert "Traceback" not in shown.stderr
    assert not list(tmp_path.iterdir())


def test_a_folder_that_holds_a_run_is_refused_untouched(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("kept")
    shown = tiltune("2d", "--out", str(tmp_path))
    assert shown.returncode == 2 and "--overwrite" in shown.stderr
    assert (tmp_path / "metrics.jsonl").read_text() == "kept"


def test_a_temperature_without_closed_form_truth_is_refused(tmp_path):
    shown = tiltune("2d", "--alpha", "20", "--out", str(tmp_path / "run"))
    assert shown.returncode == 2 and "closed form" in shown.stderr


def test_the_command_line_names_are_frozen():
    import dataclasses

    names = [field.name for field in dataclasses.fields(two_d.Options)]
    frozen = ["objective", "alpha", "chain", "steps", "warm_start", "seed", "out", "overwrite", "compare", "threads"]
    assert names == frozen


def test_importing_the_package_is_instant():
    code = "import sys, tiltune; print([m for m in ('torch', 'numpy', 'diffusers') if m in sys.modules])"
    started = time.perf_counter()
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    # What is tested is that nothing heavy is loaded; the clock is printed for whoever wonders.
    print(f"{time.perf_counter() - started:.2f} s")
    assert shown.strip() == "[]"


def test_every_public_name_resolves():
    import tiltune

    for name in tiltune.__all__:
        assert getattr(tiltune, name) is not None
    with pytest.raises(AttributeError):
        tiltune.nothing  # noqa: B018
