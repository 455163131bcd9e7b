"""Workers for an energy: the same numbers whoever computes them, and a batch that survives the ones that die or hang."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from diffusers import DDPMScheduler

from tiltune.finetune.config.energy import EnergyConfig
from tiltune.finetune.config.prior import PriorConfig
from tiltune.finetune.config.run import RunConfig
from tiltune.finetune.config.train import TrainConfig
from tiltune.finetune.energies.cache import CachedEnergy
from tiltune.finetune.energies.energy import EnergyMeter
from tiltune.finetune.energies.error import EnergyError
from tiltune.finetune.energies.names import combine
from tiltune.finetune.energies.weighted_sum import WeightedSum
from tiltune.finetune.energies.workers.pool import EnergyPool
from tiltune.finetune.learning.state import TrainState
from tiltune.finetune.learning.trainer import Trainer
from tiltune.finetune.runs import checkpoint
from tiltune.finetune.runs.energies import open_energies
from tiltune.finetune.runs.train import train
from tiltune.samplers.denoiser import ResidualDenoiser
from tiltune.samplers.mlp import MLPDenoiser
from tiltune.samplers.schedulers.dispatch import chain_from_scheduler
from tiltune.samplers.trajectory import rows_at_once
from toys.linear_gaussian import LinearGaussian

FILE = """
import os, signal, time
from pathlib import Path
import torch

def square(x):
    return x.double().square().sum(1)

def named(x, class_labels, prompts):
    return x[:, 0] + class_labels + torch.tensor([float(len(one)) for one in prompts])

def threads(x):
    return torch.full((len(x),), float(torch.get_num_threads()))

def flawed(x, class_labels):
    kind = int(class_labels[0])
    if kind == 0:
        raise RuntimeError("no license")
    if kind == 1:
        return x.sum()
    if kind == 2:
        return (x * torch.ones(2, requires_grad=True)).sum(1)
    return torch.where(x[:, 0] > 0, float("nan"), 1.0)

def misbehaving(folder, how):  # once for every file in the folder, which it takes away
    def energy(x):
        for token in Path(folder).iterdir():
            token.unlink()
            if how == "dies":
                os._exit(3)
            time.sleep(600)
        return square(x)
    return energy

def stopping(folder):  # hangs in every call from the time that a file lies there
    def energy(x):
        while Path(folder, "hang").exists():
            time.sleep(1)
        return x.flatten(1).mean(1)
    return energy
"""
X = torch.randn(37, 2, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("energies") / "mine.py"
    path.write_text(FILE)
    return str(path)


def children() -> list[psutil.Process]:
    return [one for one in psutil.Process().children(recursive=True) if "workers.worker" in " ".join(one.cmdline())]


@pytest.fixture(autouse=True)
def _nobody_is_left():
    yield
    assert not children()


def test_any_number_of_workers_gives_the_plain_energies_bit_for_bit(file: str) -> None:
    terms = [f"{file}:square", f"0.5*{file}:named", f"{file}:threads"]
    context: dict[str, Any] = {"class_labels": torch.arange(37), "prompts": ["p" * one for one in range(37)]}
    plain = combine(terms)
    torch.set_num_threads(1)
    expected = plain(X, **context)
    pool = EnergyPool(terms, 1)
    with pool:
        for workers in (1, 2, 3):
            pool.workers = workers
            for count in (37, 2, 1, 0):
                part = {key: value[:count] for key, value in context.items()}
                got = pool(X[:count], **part)
                assert got.dtype == expected.dtype and torch.equal(got, expected[:count])
            meter = EnergyMeter(pool)
            assert torch.equal(meter(X, **context), expected.float()) and meter.calls == 37
            assert meter.term_means == {name: value.float().mean().item() for name, value in plain.term_values.items()}
            assert len(children()) == workers
        swapped = pool(X.flip(0), **context)
    assert not torch.equal(swapped, expected)  # the control: other rows, other energies


def test_threads_share_a_function_and_keep_the_terms_apart() -> None:
    plain = WeightedSum({"a": (1.0, lambda x: x[:, 0]), "b": (2.0, lambda x: x.square().sum(1))})
    expected = plain(X)
    seen = set()

    def slow(x: torch.Tensor) -> torch.Tensor:
        seen.add(threading.current_thread())
        time.sleep(0.002)
        return x[:, 0]

    with EnergyPool(WeightedSum({"a": (1.0, slow), "b": plain.terms["b"]}), 3) as pool:
        for _ in range(5):
            assert torch.equal(pool(X), expected)
            assert all(torch.equal(pool.term_values[name], plain.term_values[name]) for name in ("a", "b"))
    assert len(seen) == 3


def test_an_error_names_the_energy_and_the_pool_goes_on(file: str) -> None:
    labels = torch.zeros(37, dtype=torch.long)
    with EnergyPool([f"{file}:flawed"], 1) as pool:
        raised = "energy flawed of mine.py raised RuntimeError on line 18 of mine.py: no license"
        for kind, said in enumerate([raised, "returned shape", "requires grad"]):
            with pytest.raises(EnergyError, match=said):
                pool(X, class_labels=labels + kind)
        with pytest.raises(EnergyError, match=r"energy flawed of mine.py needs class_labels"):
            pool(X)
        meter = EnergyMeter(pool, max_invalid=0.9)
        assert torch.equal(meter(X, class_labels=labels + 3).isnan(), X[:, 0] > 0)
        assert meter.invalid == int((X[:, 0] > 0).sum())
        with pytest.raises(EnergyError, match="returned NaN or -inf"):
            EnergyMeter(pool, max_invalid=0.05)(X.abs(), class_labels=labels + 3)
    flaw = [True]

    def once(x: torch.Tensor) -> torch.Tensor:
        if flaw:
            raise ValueError(flaw.pop())
        return x[:, 0]

    with EnergyPool(once, 2) as pool:
        with pytest.raises(EnergyError, match=r"energy once of test_energy_pool.py raised ValueError"):
            pool(X)
        assert torch.equal(pool(X), X[:, 0])


def test_what_cannot_be_loaded_is_said_before_any_sample(file: str) -> None:
    with pytest.raises(ValueError, match="has no missing"):
        EnergyPool([f"{file}:missing"], 1).open()
    with pytest.raises(ValueError, match="0 workers"):
        EnergyPool([file], 0)
    with pytest.raises(ValueError, match="timeout of the pool is 0"):
        EnergyPool([file], 1, timeout=0)


@pytest.mark.parametrize(("how", "said"), [("dies", "which ended with status 3"), ("hangs", "did not answer for 37 samples")])
def test_a_worker_that_dies_or_hangs_is_replaced(how: str, said: str, file: str, tmp_path: Path) -> None:
    """The batch is asked again, so often and no more."""
    expected = X.double().square().sum(1)
    with EnergyPool(
        f"{file}:misbehaving({str(tmp_path)!r}, {how!r})", 1, timeout=None if how == "dies" else 1.0, retries=1
    ) as pool:
        [first] = children()
        assert torch.equal(pool(X), expected)
        assert children() == [first]  # the control
        (tmp_path / "0").touch()
        assert torch.equal(pool(X), expected)
        assert first not in children() and len(children()) == 1
        for token in range(3):
            (tmp_path / str(token)).touch()
        with pytest.raises(EnergyError, match=f"{said}.*at the last of 2 attempts"):
            pool(X)
        assert len(list(tmp_path.iterdir())) == 1


def test_a_hung_thread_is_left_behind_and_said_so() -> None:
    release, hung = threading.Event(), []

    def energy(x: torch.Tensor) -> torch.Tensor:
        if not hung:
            hung.append(threading.current_thread())
            release.wait(20)
            return torch.zeros(len(x))  # too late, and not to be heard
        return x[:, 0]

    with EnergyPool(energy, 1, timeout=0.2) as pool:
        with pytest.warns(UserWarning, match="a thread cannot be killed: it is left behind"):
            value = pool(X)
        release.set()
        hung[0].join(5)
        assert torch.equal(value, X[:, 0]) and torch.equal(pool(X), X[:, 0])


def test_workers_end_with_a_killed_program_although_their_energy_hangs(file: str, tmp_path: Path) -> None:
    (tmp_path / "0").touch()
    code = f"""
import torch
from tiltune.finetune.energies.workers.pool import EnergyPool
EnergyPool([f"{file}:misbehaving({str(tmp_path)!r}, 'hangs')"], 1)(torch.zeros(8, 2))
"""
    program = subprocess.Popen([sys.executable, "-c", code])
    try:
        until = time.monotonic() + 30
        while list(tmp_path.iterdir()) and time.monotonic() < until:
            time.sleep(0.01)
        workers = psutil.Process(program.pid).children(recursive=True)
        assert len(workers) == 1 and workers[0].is_running()
        program.kill()
        assert not psutil.wait_procs(workers, timeout=5)[1]
    finally:
        program.kill()
        program.wait()


# --- overlapped -------------------------------------------------------------------------------------------------------

VP = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction", "clip_sample": False}
SIZES = TrainConfig(
    population_size=60, warm_start_updates=4, warm_start_rows=32, updates=3, batch_size=8, monitor_every=2, checkpoint_every=1
)
MIXED = replace(SIZES, objective="rtb", behavior={"on_policy": 0.5, "prior": 0.25, "noised_back": 0.25}, tempering_ess=0.9)


@pytest.fixture(scope="module")
def task() -> LinearGaussian:
    chain = chain_from_scheduler(DDPMScheduler(variance_type="fixed_large", **VP), 5)
    return LinearGaussian(chain, torch.zeros(2, dtype=torch.float64), torch.tensor([1.0, -0.5], dtype=torch.float64))


def trained(task: LinearGaussian, energy: Any, config: TrainConfig = MIXED) -> tuple[str, list[torch.Tensor], float, int, int]:
    torch.manual_seed(0)
    policy = ResidualDenoiser(task.prior().denoiser, MLPDenoiser(width=8, depth=1, fourier_features=2))
    trainer = Trainer(task.prior(), energy, config, policy=policy, progress=False)
    result = trainer.train()
    weights = [weight.detach() for weight in result.policy.parameters()]
    meter = trainer.state.energies.meter
    return str(trainer.history), weights, result.log_z, meter.calls, meter.cache_hits


def same(first: Any, second: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True)) and first[::2] == second[::2]


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A population of several chunks."""
    assert rows_at_once((2,), torch.device("cpu")) > 60
    monkeypatch.setattr("tiltune.finetune.populations.importance.rows_at_once", lambda shape, device: 13)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("cache", [False, True])
def test_overlapped_training_is_the_same_to_the_last_bit(cache: bool, task: LinearGaussian) -> None:
    def terms() -> WeightedSum:
        return WeightedSum({"a": (1.0, task.energy), "b": (0.5, lambda x: x.square().sum(1))})

    plain = trained(task, CachedEnergy(terms()) if cache else terms())
    with EnergyPool(terms(), 2) as pool:
        overlapped = trained(task, CachedEnergy(pool) if cache else pool)
    assert plain[0] == overlapped[0] and "terms" in plain[0] and same(plain, overlapped)
    probed, population, held_out, updates = 12, 60, 15, 3 * 6 + 3 * 2 * task.prior().chain.prior_last_steps
    judged = plain[3] + plain[4] - (probed + population + held_out + updates)
    assert plain[3] == overlapped[3] and judged in (256, 512)  # the warm start, and the updates behind it
    assert not same(plain, trained(task, task.energy))  # the control: another energy


@pytest.mark.usefixtures("small_chunks")
def test_the_next_samples_are_drawn_while_the_energy_works(task: LinearGaussian, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where another rollout follows in the population or the batch, the energy does not return before it has begun."""
    drawn = threading.Condition()
    count = [0]

    def counting(*arguments: Any, **options: Any) -> Any:
        with drawn:
            count[0] += 1
            drawn.notify_all()
        return rollout(*arguments, **options)

    from tiltune.samplers.rollout import rollout

    for module in ("populations.importance", "learning.preparation", "learning.monitor", "learning.behaviors"):
        monkeypatch.setattr(f"tiltune.finetune.{module}.rollout", counting)
    probe, population, held_out, update, judged = [False] * 4, [*[True] * 4, False], [True, False], [True, False], [False]
    waits = iter([*probe, *population, *held_out, *judged, *update, *judged])
    met: list[bool] = []

    class Held(EnergyPool):
        """Knows how many rollouts there were when a batch was started, as each of its parts does."""

        def start(self, x: torch.Tensor, **context: Any) -> Any:
            held.append((count[0], next(waits)))
            return super().start(x, **context)

    held: list[tuple[int, bool]] = []

    def energy(x: torch.Tensor) -> torch.Tensor:
        before, wait = held[-1]
        if wait:
            with drawn:
                met.append(drawn.wait_for(lambda: count[0] > before, 5))
        return task.energy(x)

    config = replace(SIZES, updates=1, objective="rtb", population="importance")
    config = replace(config, behavior={"on_policy": 0.5, "prior": 0.5})
    with Held(energy, 2) as pool:
        trained(task, pool, config)
    assert len(held) == 15 and len(met) >= 6 and all(met)


@pytest.mark.slow
def test_a_hung_energy_stops_the_run_with_a_checkpoint_that_goes_on_bit_for_bit(
    file: str, prior: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = RunConfig(
        prior=PriorConfig(str(prior), steps=3),
        energy=EnergyConfig((f"{file}:stopping({str(tmp_path)!r})",), workers=1, timeout=0.5),
        train=replace(SIZES, population_size=16, behavior={"on_policy": 0.5, "prior": 0.5}),
        device="cpu",
    )

    def left(run: Path) -> list[bytes]:
        return [(run / name).read_bytes() for name in ("metrics.jsonl", "policy/diffusion_pytorch_model.safetensors")]

    plain = replace(config, energy=EnergyConfig(config.energy.terms))
    train(plain, tmp_path / "whole", progress=False)
    run, complete = tmp_path / "run", TrainState.complete_step

    def hang_after_the_first_update(state: TrainState, bar: Any) -> None:
        complete(state, bar)
        if state.global_step == 5:
            (tmp_path / "hang").touch()

    with monkeypatch.context() as patch:
        patch.setattr(TrainState, "complete_step", hang_after_the_first_update)
        with pytest.raises(EnergyError, match=r"did not answer for \d+ samples within 0\.5 s.*last of 3 attempts"):
            train(config, run, progress=False)
    assert not children()
    assert checkpoint.last(run / "checkpoints").name == "step-00000005" and left(run) != left(tmp_path / "whole")
    (tmp_path / "hang").unlink()
    patient = replace(config, energy=replace(config.energy, workers=2, timeout=30.0))
    train(patient, run, resume="auto", progress=False)
    assert left(run) == left(tmp_path / "whole")
    (run / "run.json").unlink()
    with pytest.raises(ValueError, match=r"energy\.workers is 2 there and 0 here"):
        train(plain, run, resume="auto", progress=False)


def test_a_timeout_without_workers_is_refused() -> None:
    with pytest.raises(ValueError, match="timeout needs workers"):
        EnergyConfig(("a.py:b",), timeout=3.0)
    assert EnergyConfig(("a.py:b",), workers=1, timeout=3.0).timeout == 3.0
    with pytest.raises(ValueError, match="workers is -1"):
        EnergyConfig(("a.py:b",), workers=-1)


def test_functions_and_remote_scorers_get_threads_and_other_names_get_processes(file: str, tmp_path: Path) -> None:
    spec = f"{file}:stopping({str(tmp_path)!r})"
    config = RunConfig(prior=PriorConfig("p"), energy=EnergyConfig((spec,), workers=1, cache=True))
    with open_energies(config, None, None) as energy:
        assert isinstance(energy, CachedEnergy) and isinstance(energy.energy, EnergyPool) and len(children()) == 1
        assert torch.equal(energy(X), X.mean(1)) and torch.equal(energy(X), X.mean(1)) and energy.cache_hits == 37
    assert not children()
    (tmp_path / "hang").touch()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with open_energies(config, None, None) as energy:
        begun = len(children())
        threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            energy(X)
    assert begun == 1 and not children()  # nobody outlives a Ctrl-C, although the energy hangs
    remote = replace(config, energy=EnergyConfig(("tiltune:from_remote('http://127.0.0.1:9/')",), workers=2))
    for case, function in (remote, None), (config, lambda x: x[:, 0]):
        with open_energies(case, None, function):
            assert not children()
