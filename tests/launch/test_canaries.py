"""What we rely on in torch, torchrun and accelerate: where one of them changes, its test fails here before anything else does.

Flags of torchrun, and what becomes of its workers' exit statuses, are in test_launch.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tiltune.finetune.runs.state_file import read_state, write_state


def through_a_file(folder: Path, state: Any) -> Any:
    write_state(folder, "state", state)
    return read_state(folder, "state")


# --- one process -----------------------------------------------------------------------------------------------------


def stepped(weight: Any, optimizer: Any, schedule: Any, steps: range) -> list[float]:
    rates = []
    for step in steps:
        (weight * torch.linspace(-1, 1 + step, 5)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        rates.append(schedule.get_last_lr()[0])
    return rates


def training(weight: torch.Tensor) -> tuple[torch.Tensor, Any, Any]:
    weight = weight.clone().requires_grad_()
    optimizer = torch.optim.Adam([weight], 0.1)
    return weight, optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10, pct_start=0.2)


@pytest.mark.parametrize("restored", [("optimizer", "schedule"), ("optimizer",), ("schedule",)])
def test_adam_and_one_cycle_go_on_bitwise_from_plain_state(restored: tuple[str, ...], tmp_path: Path) -> None:
    """`Trainer.state` and `_restore_phase`: a resumed run is the same run. One of the two alone is not enough."""
    whole = training(torch.ones(5))
    stepped(*whole, range(4))
    kept = through_a_file(tmp_path, [whole[1].state_dict(), whole[2].state_dict()])
    resumed = training(whole[0].detach())
    for name, part, state in zip(("optimizer", "schedule"), resumed[1:], kept, strict=True):
        if name in restored:
            part.load_state_dict(state)
    rates = stepped(*whole, range(4, 9)), stepped(*resumed, range(4, 9))
    same = rates[0] == rates[1] and torch.equal(whole[0], resumed[0])
    assert same == (len(restored) == 2)


@pytest.mark.parametrize("drawn", [1, 7, 16, 625])
def test_a_generator_goes_on_exactly(drawn: int, tmp_path: Path) -> None:
    """`Noise`: the noise behind a checkpoint. Of an odd number of normals, half a pair stays inside."""
    generator, other = torch.Generator().manual_seed(3), torch.Generator()
    for count in (drawn, 1):
        torch.randn(count, generator=generator)
    other.set_state(through_a_file(tmp_path, generator.get_state()))
    for draw in (torch.randn, torch.rand):
        assert torch.equal(draw(33, generator=generator), draw(33, generator=other))
    other.manual_seed(3)  # the control
    assert not torch.equal(torch.randn(33, generator=generator), torch.randn(33, generator=other))


def test_a_grad_scaler_is_plain_state(tmp_path: Path) -> None:
    """`Trainer.state`: the scale of float16 gradients, and the steps since it last grew, survive; a disabled one has no state."""

    def overflowed(scaler: Any, steps: int) -> None:
        weight = torch.ones(2, requires_grad=True)
        optimizer = torch.optim.SGD([weight], 0.1)
        for step in range(steps):
            scaler.scale(weight.sum() * (torch.inf if step == 0 else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    overflowed(scaler, 3)
    other = torch.amp.GradScaler("cpu")
    other.load_state_dict(through_a_file(tmp_path, scaler.state_dict()))
    assert scaler.get_scale() == other.get_scale() == 512.0
    for one in (scaler, other):  # the third good step in a row, counted across the file
        weight = torch.ones(1, requires_grad=True)
        optimizer = torch.optim.SGD([weight], 0.1)
        one.scale(weight.sum()).backward()
        one.step(optimizer)
        one.update()
    assert scaler.get_scale() == other.get_scale() == 1024.0
    disabled = torch.amp.GradScaler("cpu", enabled=False)
    assert disabled.state_dict() == {} and disabled.get_scale() == 1.0
    disabled.load_state_dict({})


# --- two processes ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found(in_two_processes: Any) -> list[dict[str, Any]]:
    """What `two_canaries.py` found in each of two processes."""
    return in_two_processes("two_canaries.py", 120)


def test_torchrun_says_in_the_environment_who_a_process_is(found: Any) -> None:
    """`train` reads RANK and WORLD_SIZE before there is an accelerator, `device_of` and `worker.py` LOCAL_RANK."""
    assert [process["environment"] for process in found] == [
        {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"} for rank in ("0", "1")
    ]


def test_accelerate_joins_on_the_cpu_over_gloo(found: Any) -> None:
    """`Processes`: as torchrun has counted, and without being launched by accelerate."""
    assert [process["accelerate"] for process in found] == [[0, 2, "cpu", "gloo"], [1, 2, "cpu", "gloo"]]


def test_gather_is_in_the_order_of_ranks(found: Any) -> None:
    """`objective_gradient` keeps the columns at its rank; `Processes.agree` names the first process that failed."""
    assert all(process["gathered"] == [[0, 0], [0, 1], [1, 0], [1, 1]] for process in found)


def test_ddp_averages_gradients(found: Any) -> None:
    """`objective_gradient` multiplies by the number of processes because DDP divides by it: (1 + 8) / 2, not 9."""
    assert all(process["gradient"]["one pass"] == 4.5 for process in found)


def test_no_sync_holds_gradients_back_and_the_next_pass_sends_them_along(found: Any) -> None:
    """`Processes.hold`, for all chunks of an update but the last: 1 + 2 and 8 + 16 apart, then (7 + 56) / 2 on both."""
    assert [process["gradient"]["held back"] for process in found] == [3.0, 24.0]
    assert all(process["gradient"]["sent along"] == 31.5 for process in found)


def test_without_broadcast_buffers_a_call_sends_nothing(found: Any) -> None:
    """`Processes.wrap`: sampling costs no collectives. The control is a model that was wrapped as accelerate does by default."""
    assert [process["buffer"] for process in found] == [1.0, 2.0]
    assert [process["buffer that is sent"] for process in found] == [1.0, 1.0]
