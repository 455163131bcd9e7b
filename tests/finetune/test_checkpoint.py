"""Checkpoints: whatever cuts a save off, a good one loads; whatever is damaged is named, and nothing is loaded in its place."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tiltune.finetune.runs.checkpoint import checkpoints, find, last, rewind, save
from tiltune.finetune.runs.manifest import verify

FAULTS = Path(__file__).with_name("save_faults.py")


def faults(folder: Path, mode: str) -> Any:
    done = subprocess.run([sys.executable, FAULTS, folder, mode], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def content(step: int) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "policy").mkdir()
        (folder / "policy" / "weights").write_bytes(bytes([step]) * 1000)
        (folder / "state.json").write_text(f"state of {step}")

    return write


@pytest.fixture
def tmp_path(tmp_path: Path) -> Iterator[Path]:
    """In memory where there is such a folder: hundreds of saves, each with a dozen fsync."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else tmp_path) as folder:
        yield Path(folder)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run's checkpoints of steps 10, 20 and 30."""
    for step in (10, 20, 30):
        save(tmp_path / "run" / "checkpoints", step, content(step), keep=3)
    return tmp_path / "run" / "checkpoints"


def steps(folder: Path) -> list[int]:
    return [checkpoint.step for checkpoint in checkpoints(folder)]


# --- saving ----------------------------------------------------------------------------------------------------------


def test_a_saved_checkpoint_is_found_listed_and_whole(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints"
    assert find(folder, "auto") is None and checkpoints(folder) == []
    path = save(folder, 40, content(40), keep=2)
    assert path == folder / "step-00000040" == find(folder, "auto") == last(folder)
    assert verify(path) == [] and (path / "state.json").read_text() == "state of 40"
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["format"] == 1 and manifest["step"] == 40
    assert manifest["files"].keys() == {"policy/weights", "state.json"}
    (found,) = checkpoints(folder)
    assert found.good and found.step == 40
    assert found.size == sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def test_the_newest_remain_and_nothing_else_is_touched(folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")
    (folder / "step-1").mkdir()
    save(folder, 40, content(40), keep=2)
    assert steps(folder) == [40, 30]
    assert sorted(path.name for path in folder.iterdir()) == ["last", "notes.txt", "step-00000030", "step-00000040", "step-1"]


def test_damaged_checkpoints_do_not_count_as_kept_ones(folder: Path) -> None:
    flip(folder / "step-00000030" / "policy" / "weights")
    save(folder, 40, content(40), keep=2)
    assert [(found.step, found.good) for found in checkpoints(folder)] == [(40, True), (30, False), (20, True)]
    save(folder, 50, content(50), keep=2)
    assert steps(folder) == [50, 40]


def test_a_good_checkpoint_of_the_same_step_stays_and_a_damaged_one_is_replaced(folder: Path) -> None:
    def never(folder: Path) -> None:
        raise AssertionError

    before = (folder / "step-00000030").stat().st_ino
    assert save(folder, 30, never, keep=3).stat().st_ino == before
    flip(folder / "step-00000030" / "state.json")
    assert save(folder, 30, content(30), keep=3).stat().st_ino != before
    assert verify(folder / "step-00000030") == [] and steps(folder) == [30, 20, 10]
    assert not list(folder.glob(".*"))


def test_a_writer_that_fails_leaves_everything_as_it_was(folder: Path) -> None:
    def failing(folder: Path) -> None:
        content(40)(folder)
        raise RuntimeError("the policy cannot be saved")

    before = sorted(folder.rglob("*"))
    with pytest.raises(RuntimeError, match="cannot be saved"):
        save(folder, 40, failing, keep=1)
    assert sorted(folder.rglob("*")) == before and find(folder, "auto") == folder / "step-00000030"


@pytest.mark.parametrize(("step", "keep"), [(-1, 1), (10, 0)])
def test_a_save_that_would_keep_nothing_is_refused(tmp_path: Path, step: int, keep: int) -> None:
    with pytest.raises(ValueError, match="keep at least 1"):
        save(tmp_path / "checkpoints", step, content(10), keep=keep)
    assert not list(tmp_path.iterdir())


def test_going_on_from_an_older_one_removes_the_later_ones(folder: Path) -> None:
    with pytest.raises(ValueError, match="step-00000015 is no good checkpoint"):
        rewind(folder, 15)
    flip(folder / "step-00000020" / "state.json")
    with pytest.raises(ValueError, match="step-00000020 is no good checkpoint"):
        rewind(folder, 20)
    assert steps(folder) == [30, 20, 10] and last(folder).name == "step-00000030"
    rewind(folder, 10)
    assert steps(folder) == [10] and find(folder, "auto") == folder / "step-00000010"
    assert sorted(path.name for path in folder.iterdir()) == ["last", "step-00000010"]


# --- faults of a save ------------------------------------------------------------------------------------------------


def test_sigkill_at_every_write_point_of_a_save(tmp_path: Path) -> None:
    """The checkpoint before it loads, or the new one; and the next save succeeds and leaves nothing behind."""
    found = faults(tmp_path, "kill")
    assert found["losses"] == []
    assert found["points"] > 100


@pytest.mark.parametrize("naive", ["in_place", "prune_first"])
def test_the_same_kills_lose_the_checkpoints_of_a_naive_save(tmp_path: Path, naive: str) -> None:
    """Control of the test above."""
    assert any("killed at point" in loss for loss in faults(tmp_path, naive)["losses"])


def test_disk_full_at_every_write_point_of_a_save(tmp_path: Path) -> None:
    found = faults(tmp_path, "full")
    assert found["losses"] == []
    assert found["points"] > 80


def test_a_power_cut_finds_everything_on_the_disk_before_it_counts(tmp_path: Path) -> None:
    """What a killed process cannot show: the order of fsync and rename."""
    *events, (_, tree, _) = faults(tmp_path, "order")
    assert undurable(events, tree) == []
    without = [event for event in events if event[0] != "fsync"]  # control: a save that never syncs
    assert undurable(without, tree) == ["manifest.json", "policy", "state.json", "weights", "the name", "last", "the pointer"]
    early = sorted(events, key=lambda event: event[:2] not in (["open", "manifest.json"], ["write", "manifest.json"]))
    assert undurable(early, tree) == ["the manifest came first"]


def undurable(events: list[list[Any]], tree: dict[str, int]) -> list[str]:
    """What was not on the disk when something relied on it."""

    def index(name: str, what: str) -> int:
        return next(i for i, event in enumerate(events) if event[:2] == [name, what])

    def synced(path: str, start: int, end: int) -> bool:
        return any(event[0] == "fsync" and event[2] == tree[path] for event in events[start:end])

    named, pointed = index("rename", ".writing-step-00000030"), index("replace", ".last")
    pruned = min(index("rename", "step-00000010"), index("rename", "step-00000020"))
    deleted = next(i for i, event in enumerate(events) if event[0] in ("unlink", "rmdir"))
    assert named < pointed < pruned < deleted
    missing = [path for path in sorted(tree) if path.startswith("step-00000030/") and not synced(path, 0, named)]
    found = sorted(Path(path).name for path in missing)
    found += ["the name"] * (not synced(".", named, pointed)) + ["last"] * (not synced("last", 0, pointed))
    found += ["the pointer"] * (not synced(".", pointed, pruned))
    return found + ["the manifest came first"] * (index("open", "manifest.json") < index("write", "state.json"))


# --- damage ----------------------------------------------------------------------------------------------------------


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def outside(path: Path, name: str) -> None:
    """A manifest that lists a file outside, with the right size and digest."""
    real = path.parent / "step-00000020"
    entry = json.loads((real / "manifest.json").read_text())["files"]["state.json"]
    edit(path, lambda manifest: manifest["files"].update({name: entry}))


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated file": (lambda p: os.truncate(p / "policy" / "weights", 999), "'policy/weights' has 999 bytes instead of 1000"),
    "flipped bit": (lambda p: flip(p / "policy" / "weights"), "'policy/weights' has changed since it was saved"),
    "missing file": (lambda p: (p / "state.json").unlink(), "'state.json' is missing"),
    "extra file": (lambda p: (p / "policy" / "hook.py").write_text(""), "'policy/hook.py' is not in manifest.json"),
    "missing manifest": (lambda p: (p / "manifest.json").unlink(), "manifest.json is missing"),
    "truncated manifest": (lambda p: os.truncate(p / "manifest.json", 50), "manifest.json is not JSON"),
    "manifest in binary": (lambda p: (p / "manifest.json").write_bytes(b"\x80\xff"), "manifest.json is not JSON"),
    "manifest of nothing": (lambda p: (p / "manifest.json").write_text("[]"), "does not say what format"),
    "deep manifest": (lambda p: (p / "manifest.json").write_text("[" * 10**6), "nested too deeply"),
    "later format": (lambda p: edit(p, lambda m: m.update(format=2)), "has the format 2, and this version of tiltune reads 1"),
    "no step": (lambda p: edit(p, lambda m: m.pop("step")), "does not say which step"),
    "no digest": (lambda p: edit(p, lambda m: m["files"]["state.json"].pop("sha256")), "SHA-256 of 'state.json'"),
    "another step": (lambda p: edit(p, lambda m: m.update(step=20)), "manifest.json is of step 20"),
    "path traversal": (lambda p: outside(p, "../step-00000020/state.json"), "'../step-00000020/state.json', which is no place"),
    "hidden traversal": (lambda p: outside(p, "policy/../state.json"), "which is no place in this folder"),
    "absolute path": (lambda p: outside(p, f"{p.parent}/step-00000020/state.json"), "which is no place in this folder"),
    "link to a file": (
        lambda p: ((p / "state.json").unlink(), (p / "state.json").symlink_to("../step-00000020/state.json")),
        "'state.json' is neither a file nor a folder",
    ),
    "link to a folder": (lambda p: (p / "more").symlink_to("../step-00000020"), "'more' is neither a file nor a folder"),
    "link to another checkpoint": (lambda p: (shutil.rmtree(p), p.symlink_to("step-00000020")), "is no folder"),
    "fifo": (lambda p: os.mkfifo(p / "pipe"), "'pipe' is neither a file nor a folder"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_auto_falls_back_loudly_and_an_explicit_path_fails(folder: Path, damage: str) -> None:
    path = folder / "step-00000030"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for which in ("auto", path, folder.parent):  # control: nothing to say about a good one
            assert find(folder, which) == path
    change, says = DAMAGE[damage]
    change(path)
    assert says in "; ".join(verify(path))
    assert [found.good for found in checkpoints(folder)] == [False, True, True]
    with pytest.warns(UserWarning, match=r"going on from .*step-00000020, because") as warned:
        assert find(folder, "auto") == folder / "step-00000020"
    assert says in str(warned[0].message)
    for which in (path, str(folder.parent)):
        with pytest.raises(ValueError, match="step-00000030 is no good checkpoint, and none is taken in its place") as refused:
            find(folder, which)
        assert says in str(refused.value) and "\n" not in str(refused.value)
    assert steps(folder) == [30, 20, 10]
    save(folder, 30, content(30), keep=3)
    assert find(folder, "auto") == path and verify(folder / "step-00000020") == []


def test_a_malicious_pickle_in_place_of_a_file_is_damage_and_is_not_run(folder: Path, tmp_path: Path) -> None:
    bomb = pickle.dumps(Touch(tmp_path / "ran"))
    for name in ("policy/weights", "manifest.json"):
        path = folder / "step-00000030"
        (path / name).write_bytes(bomb)
        with pytest.warns(UserWarning, match="step-00000030"):
            assert find(folder, "auto") == folder / "step-00000020"
        assert not (tmp_path / "ran").exists()
        save(folder, 30, content(30), keep=3)
    pickle.loads(bomb)  # control
    assert (tmp_path / "ran").exists()


def test_several_damaged_ones_are_all_named_and_none_left_is_an_error(folder: Path) -> None:
    for step in (30, 20):
        flip(folder / f"step-000000{step}" / "state.json")
    with pytest.warns(UserWarning, match=r"step-00000030: 'state.json' has changed .*step-00000020: 'state.json' has changed"):
        assert find(folder, "auto") == folder / "step-00000010"
    flip(folder / "step-00000010" / "state.json")
    with pytest.raises(ValueError, match="starting over is not for a resume to decide"):
        find(folder, "auto")


@pytest.mark.parametrize("text", ["", "step-00000099", "../checkpoints/step-00000020", "step-00000020/../step-00000020", "x\0y"])
def test_a_pointer_that_names_nothing_here_is_no_pointer(folder: Path, text: str) -> None:
    (folder / "last").write_text(text)
    with pytest.warns(UserWarning, match="last names"):
        assert find(folder, "auto") == folder / "step-00000030"
    with pytest.raises(ValueError, match="has no such checkpoint"):
        find(folder, folder.parent)
    (folder / "last").unlink()
    with pytest.warns(UserWarning, match="last is missing"):
        assert find(folder, "auto") == folder / "step-00000030"


def test_auto_takes_the_one_that_last_names_and_not_a_newer_one(folder: Path) -> None:
    (folder / "last").write_text("step-00000010\n")
    assert find(folder, "auto") == folder / "step-00000010" == find(folder, folder.parent)


def test_a_path_without_anything_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no such folder"):
        find(tmp_path / "run" / "checkpoints", tmp_path / "elsewhere")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match="last is missing"):
        find(tmp_path / "run" / "checkpoints", tmp_path / "run")
    assert find(tmp_path / "run" / "checkpoints", "auto") is None
