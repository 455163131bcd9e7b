"""State that comes back exactly, or is refused in a sentence; files that say anything else are refused, and nothing is run."""

from __future__ import annotations

import json
import math
import os
import pickle
import struct
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tiltune.finetune.runs.state_file import DTYPES, read_state, write_state


def there_and_back(folder: Path, tree: Any) -> Any:
    write_state(folder, "state", tree)
    assert sorted(path.name for path in folder.iterdir()) == ["state.json", "state.safetensors"]
    return read_state(folder, "state")


def same(a: Any, b: Any) -> bool:
    """Equal in type, structure, order and every bit."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and bits(a) == bits(b)
    if isinstance(a, dict):
        keys = [(type(key), key) for key in a] == [(type(key), key) for key in b]
        return keys and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return struct.pack(">d", a) == struct.pack(">d", b) if isinstance(a, float) else a == b


def bits(tensor: Tensor) -> list[int]:
    return tensor.detach().contiguous().flatten().view(torch.uint8).tolist()


PAYLOAD = struct.unpack(">d", bytes.fromhex("fff8dead0000beef"))[0]


@pytest.mark.parametrize(
    "tree",
    [
        None, True, 0, -(2**80), "", "a\n\0\"ü😀\ud800", 0.1, -0.0, 5e-324, 1.7976931348623157e308, math.inf, -math.inf, PAYLOAD,
        [], (), {}, [[], [()]], ((1,), [2]), {1: "int", "1": "str"}, {"tuple": [1]}, {"dict": []}, {"float": "inf"},
        {"tensor": "0"}, {"b": 1, "a": {-3: (None, False, 1, 1.0)}},
    ],
    ids=repr,
)  # fmt: skip
def test_plain_values_come_back_exactly(tmp_path: Path, tree: Any) -> None:
    assert same(there_and_back(tmp_path, tree), tree)


def test_the_comparison_sees_what_equality_does_not() -> None:
    """Control."""
    for a, b in ((0.0, -0.0), (1, 1.0), (1, True), ([1], (1,)), (PAYLOAD, math.nan), ({1: 2, 3: 4}, {3: 4, 1: 2})):
        assert not same(a, b)
    assert not same(torch.tensor(0.0), torch.tensor(-0.0)) and not same(torch.ones(1), torch.ones(1, dtype=torch.float64))
    assert same(torch.tensor(math.nan), torch.tensor(math.nan))


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_come_back_bit_for_bit(tmp_path: Path, dtype: str) -> None:
    kind = DTYPES[dtype]
    raw = torch.randint(0, 2 if dtype == "bool" else 256, (24 * kind.itemsize,), generator=torch.Generator().manual_seed(0))
    flat = raw.to(torch.uint8).view(kind)  # any bits: NaN with payloads among the floats
    tree = {"matrix": flat.view(4, 6), "transposed": flat.view(4, 6).T, "slice": flat[3:7], "strided": flat[::3]}
    tree |= {"scalar": flat[5].clone().view(()), "view": flat[5:6].view(()), "empty": flat[:0], "twice": [flat, flat]}
    back = there_and_back(tmp_path, tree)
    assert same(back, tree)
    back["twice"][0].zero_()
    assert same(back["twice"][1], flat)


def test_what_was_read_does_not_follow_the_file(tmp_path: Path) -> None:
    write_state(tmp_path, "state", torch.ones(100_000))
    back = read_state(tmp_path, "state")
    with open(tmp_path / "state.safetensors", "r+b") as file:
        file.write(bytes((tmp_path / "state.safetensors").stat().st_size))
    assert torch.equal(back, torch.ones(100_000))


def test_complex_views_and_parameters(tmp_path: Path) -> None:
    numbers = torch.randn(5, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    parameter = torch.nn.Parameter(torch.ones(2, 3))
    back = there_and_back(tmp_path, [numbers.conj(), numbers.conj().imag, parameter, torch.ones(1).expand(4, 2)])
    assert torch.equal(back[0], numbers.conj()) and torch.equal(back[1], -numbers.imag)
    assert type(back[2]) is Tensor and not back[2].requires_grad and torch.equal(back[2], parameter)
    assert torch.equal(back[3], torch.ones(4, 2))


def test_an_optimizer_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    """Adam with its schedule, module and generator: ten steps are five, a file, and five, bit for bit."""

    def made() -> Any:
        generator = torch.Generator().manual_seed(3)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
        return module, optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=20), generator

    def advance(parts: Any, count: int) -> list[Tensor]:
        module, optimizer, schedule, generator = parts
        for _ in range(count):
            optimizer.zero_grad()
            module(torch.randn(8, 3, generator=generator)).square().sum().backward()
            optimizer.step()
            schedule.step()
        return [value.clone() for value in module.state_dict().values()]

    whole = made()
    advance(whole, 5)
    write_state(
        tmp_path, "trainer", [*(part.state_dict() for part in whole[:3]), whole[3].get_state(), {"step": 5, "log_z": math.nan}]
    )
    resumed = made()
    module, optimizer, schedule, generator, counters = read_state(tmp_path, "trainer")
    for part, state in zip(resumed[:3], (module, optimizer, schedule), strict=True):
        part.load_state_dict(state)
    resumed[3].set_state(generator)
    assert counters["step"] == 5 and math.isnan(counters["log_z"])
    assert all(map(same, advance(resumed, 5), advance(whole, 5)))
    fresh = made()  # control: without the state of the optimizer
    fresh[0].load_state_dict(module)
    assert not all(map(same, advance(fresh, 5), advance(resumed, 0)))


class Point(NamedTuple):
    x: int


@pytest.mark.parametrize(
    ("tree", "says"),
    [
        ({"a": [1, {2, 3}]}, r"state\['a'\]\[1\] is a builtins.set"),
        (Point(1), "Point"),
        (b"bytes", "builtins.bytes"),
        ({(1, 2): 3}, r"the key \(1, 2\)"),
        ({True: 3}, "the key True"),
        ({"a": torch.zeros(2, dtype=torch.complex128)}, "complex128"),
        (torch.eye(2).to_sparse(), "sparse"),
        (torch.zeros(2, device="meta"), "meta"),
    ],
)  # fmt: skip
def test_what_would_not_come_back_is_refused_before_anything_is_written(tmp_path: Path, tree: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        write_state(tmp_path, "state", tree)
    assert not list(tmp_path.iterdir())


def test_a_state_that_contains_itself_is_refused(tmp_path: Path) -> None:
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(ValueError, match="does it contain itself"):
        write_state(tmp_path, "state", loop)


def test_an_ordered_dict_is_a_dict_afterwards(tmp_path: Path) -> None:
    assert same(there_and_back(tmp_path, OrderedDict(b=1, a=2)), {"b": 1, "a": 2})


@pytest.mark.parametrize("name", ["../state", "/tmp/state", "a/b", "", ".", "..", "a\0b", "a\\b"])
def test_a_name_that_leads_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "inner").mkdir()
    with pytest.raises(ValueError, match="no name for a state"):
        write_state(tmp_path / "inner", name, 1)
    with pytest.raises(ValueError, match="no name for a state"):
        read_state(tmp_path / "inner", name)
    assert list(tmp_path.rglob("*")) == [tmp_path / "inner"]


# --- files of someone else -------------------------------------------------------------------------------------------


class Touch:
    """Unpickled, it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def state(node: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / "state.json").write_text(f'{{"format": 1, "state": {node}}}')


def written(suffix: str, data: bytes) -> Callable[[Path], Any]:
    return lambda folder: (folder / f"state.{suffix}").write_bytes(data)


def tensor(name: str = "0", dtype: str = "float32", shape: str = "[2]") -> str:
    return f'{{"tensor": "{name}", "dtype": "{dtype}", "shape": {shape}}}'


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda folder: (folder / "state.json").unlink(), "No such file"),
        (lambda folder: (folder / "state.safetensors").unlink(), "No such file"),
        (lambda folder: os.truncate(folder / "state.safetensors", 20), "eader"),
        (lambda folder: os.truncate(folder / "state.json", 20), "Unterminated|Expecting"),
        (written("json", b"\x80\x04\xff"), "decode"),
        (written("json", b"[" * 10**6), "nested too deeply"),
        (written("json", b"[]"), "not a state of format 1"),
        (written("json", b'{"format": 2, "state": null}'), "not a state of format 1"),
        (state("[" * 500 + tensor() + "]" * 500), "nested deeper than 100"),
        (state('{"tuple": ' * 200 + "1" + "}" * 200), "stands for nothing"),
        (state('{"dict": [["a", ' * 200 + "1" + "]]}" * 200), "nested deeper than 100"),
        (state("NaN"), "NaN is not JSON"),
        (state("1" * 10_000), "digits"),
        (state(tensor("1")), "'1' is not in the safetensors file"),
        (state(tensor("../../etc/passwd")), "'../../etc/passwd' is not in the safetensors file"),
        (state(f"[{tensor()}, {tensor()}]"), "has two places"),
        (state(tensor(dtype="float64")), r"is torch.float32 \[2\] in the safetensors file, and float64 \[2\] is stated"),
        (state(tensor(shape="[1, 2]")), r"float32 \[1, 2\] is stated"),
        (lambda folder: save_file({"0": torch.ones(2).half()}, folder / "state.safetensors"), "is torch.float16"),
        (lambda folder: save_file({"0": torch.ones(2), "x": torch.ones(1)}, folder / "state.safetensors"), "'x'. have no place"),
        (state("null"), r"\['0'\] have no place"),
        (state('{"__reduce__": ["os.system", "true"]}'), "stands for nothing"),
        (state('{"float": "inf"}'), "stands for nothing"),
        (state('{"tuple": [], "list": []}'), "stands for nothing"),
        (state('{"dict": {"a": 1}}'), "stands for nothing"),
        (state('{"dict": [["a", 1], ["a", 2]]}'), "not a new string or integer"),
        (state('{"dict": [[1.5, 1]]}'), "not a new string or integer"),
        (state('{"dict": [[true, 1]]}'), "not a new string or integer"),
        (state('{"dict": ["ab"]}'), "not a new string or integer"),
    ],
)  # fmt: skip
def test_files_that_do_not_fit_are_refused_in_a_sentence(tmp_path: Path, change: Callable[[Path], Any], says: str) -> None:
    write_state(tmp_path, "state", {"w": torch.ones(2)})
    assert torch.equal(read_state(tmp_path, "state")["w"], torch.ones(2))  # control
    change(tmp_path)
    with pytest.raises(ValueError, match=says) as refused:
        read_state(tmp_path, "state")
    assert "\n" not in str(refused.value) and "cannot be restored" in str(refused.value)


def test_a_malicious_pickle_in_place_of_a_file_is_not_run(tmp_path: Path) -> None:
    for suffix in ("safetensors", "json"):
        write_state(tmp_path, "state", {"w": torch.ones(2)})
        (tmp_path / f"state.{suffix}").write_bytes(pickle.dumps(Touch(tmp_path / "ran")))
        with pytest.raises(ValueError, match="cannot be restored"):
            read_state(tmp_path, "state")
        assert not (tmp_path / "ran").exists()
    pickle.loads((tmp_path / "state.json").read_bytes())  # control
    assert (tmp_path / "ran").exists()


def test_a_dtype_that_torch_cannot_hold_is_refused(tmp_path: Path) -> None:
    write_state(tmp_path, "state", {"w": torch.ones(2)})
    header = json.dumps({"0": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).replace("F32", "F99").encode()
    (tmp_path / "state.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(ValueError, match="cannot be restored"):
        read_state(tmp_path, "state")
    header = header.replace(b"F99", b"F4").replace(b"8]", b"1]")
    (tmp_path / "state.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(1))
    with pytest.raises(ValueError, match="cannot be restored"):
        read_state(tmp_path, "state")


def test_the_file_is_an_ordinary_safetensors_file(tmp_path: Path) -> None:
    write_state(tmp_path, "state", {"a": [torch.arange(3)], "b": torch.zeros(2)})
    plain = load_file(tmp_path / "state.safetensors")
    assert torch.equal(plain["0"], torch.arange(3)) and torch.equal(plain["1"], torch.zeros(2))
