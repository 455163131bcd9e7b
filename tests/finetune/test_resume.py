"""A run that was stopped and resumed is the run that nobody stopped, bit for bit."""

import os
import shutil
import signal
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler

from tiltune.finetune.config.prior import PriorConfig
from tiltune.finetune.config.run import RunConfig
from tiltune.finetune.config.train import TrainConfig
from tiltune.finetune.distributed.signals import Preempted
from tiltune.finetune.energies.cache import CachedEnergy
from tiltune.finetune.energies.error import EnergyError
from tiltune.finetune.learning.forward_kl import ForwardKL
from tiltune.finetune.learning.metrics_log import MetricsLog
from tiltune.finetune.learning.objective_table import OBJECTIVES
from tiltune.finetune.learning.state import FORMAT
from tiltune.finetune.learning.trainer import Trainer
from tiltune.finetune.learning.value_drift import ValueDrift
from tiltune.finetune.runs import checkpoint, checkpointer
from tiltune.finetune.runs.lock import RunLock
from tiltune.finetune.runs.run import open_run
from tiltune.finetune.runs.state_file import read_state, write_state
from tiltune.finetune.runs.train import train
from tiltune.samplers.denoiser import ResidualDenoiser
from tiltune.samplers.mlp import MLPDenoiser
from tiltune.samplers.schedulers.dispatch import chain_from_scheduler
from toys.linear_gaussian import LinearGaussian

VP = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction", "clip_sample": False}
SIZES = TrainConfig(
    population_size=60, warm_start_updates=4, warm_start_rows=32, updates=4, batch_size=8, monitor_every=3, checkpoint_every=1
)


def from_the_prior(objective):
    """What comparators ask for."""
    return {} if objective.targets_tilted_law else {"warm_start": "none", "tempering_ess": None}


# Every objective with every behavior that it admits, a mixture, and what keeps a state of its own.
CASES: dict[str, TrainConfig] = {
    f"{name} {behavior}": replace(SIZES, objective=name, behavior={behavior: 1.0}, noise_scale=1.2, **from_the_prior(objective))
    for name, objective in OBJECTIVES.items()
    for behavior in sorted(objective.behaviors - {"replay"})
} | {
    "mixture": replace(SIZES, behavior={"on_policy": 0.5, "noised_back": 0.5}),
    "average": replace(SIZES, ema_decay=0.9),
    "soft value": replace(SIZES, objective="reinforce_kl", soft_value_updates=3, forward_rows=16, ema_decay=0.9),
    "value drift": replace(SIZES, warm_start="value_drift", soft_value_updates=3),
    "value drift, average": replace(
        SIZES, objective="reinforce_kl", warm_start="value_drift", soft_value_updates=3, forward_rows=16, ema_decay=0.9
    ),
    "short steps": replace(SIZES, warm_start="value_drift", soft_value_updates=3, warm_start_step_nats=1e-6, step_nats=1e-6),
    "no warm start": replace(SIZES, objective="rtb", warm_start="none", behavior={"on_policy": 1.0}),
    "horizon": replace(SIZES, objective="trust_pcl", horizon=2, soft_value_updates=3, tempering_ess=0.9),
    "replay": replace(SIZES, behavior={"on_policy": 0.5, "replay": 0.5}, warm_start="none"),
    "epochs, a share of the steps": replace(SIZES, objective="rtb", epochs=3, clip=0.1, step_share=0.5),
    "epochs on what is replayed": replace(SIZES, objective="reinforce_kl", behavior={"on_policy": 0.5, "replay": 0.5}, epochs=2),
    "huber, tempered": replace(SIZES, objective="rtb", huber=1.0, tempering_ess=0.9),
}


@pytest.fixture(scope="module")
def task():
    chain = chain_from_scheduler(DDPMScheduler(variance_type="fixed_large", **VP), 5)
    return LinearGaussian(chain, torch.zeros(2, dtype=torch.float64), torch.tensor([1.0, -0.5], dtype=torch.float64))


def policy_of(prior):
    torch.manual_seed(0)
    return ResidualDenoiser(prior.denoiser, MLPDenoiser(width=8, depth=1, fourier_features=2))


def trainer_of(task, config, energy=None, **options):
    energy = task.energy if energy is None else energy
    return Trainer(task.prior(), energy, config, policy=policy_of(task.prior()), progress=False, **options)


def ended(trainer):
    """What a run leaves: its metrics, weights and log Z."""
    result = trainer.train()
    return trainer.history, [weight.detach().clone() for weight in result.policy.parameters()], result.log_z, result.energy_calls


def same(first, second):
    return (
        str(first[0]) == str(second[0])  # as text: NaN is not equal to itself
        and all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))
        and first[2:] == second[2:]
    )


@pytest.mark.parametrize("name", CASES)
def test_resumed_at_any_step_it_is_the_same_run(name, task, tmp_path):
    config = CASES[name]

    def keep(trainer):
        folder = tmp_path / str(trainer.global_step)
        folder.mkdir()
        write_state(folder, "run", trainer.state_dict())
        write_state(folder, "process", trainer.own_state_dict())

    whole = ended(trainer_of(task, config, on_checkpoint=keep))
    steps = sorted(int(folder.name) for folder in tmp_path.iterdir())
    first = 0 if config.warm_start == "none" else 4
    # A warm start that falls behind its best ends early.
    assert set(range(first + 1, first + 5)) <= set(steps) <= set(range(1, first + 5)) and steps[0] == 1
    for step in steps:
        torch.manual_seed(step)  # nothing hangs on the global generator
        resumed = trainer_of(task, config)
        resumed.load_state_dict(read_state(tmp_path / str(step), "run"), read_state(tmp_path / str(step), "process"))
        assert same(ended(resumed), whole), step


@pytest.mark.parametrize("lost", ["generator", "optimizer", "meter", "average", "forward_kl"])
def test_a_state_that_forgets_something_is_caught(lost, task):
    """The control: with one entry as it is at the start of a run, the check above fails."""
    config = replace(CASES["soft value"], tempering_ess=0.9)
    states: dict[int, Any] = {}
    whole = ended(trainer_of(task, config, on_checkpoint=lambda trainer: states.update({trainer.global_step: both(trainer)})))
    step = {"forward_kl": 3, "average": 2}.get(lost, 6)  # of the updates' average only what comes closest is left
    common, own = states[step]
    if lost == "forward_kl":  # the slope is measured between the halves of the warm start
        forward = own["preparation"]["forward_kl"]
        forward["slope"] = torch.zeros_like(forward["slope"])
    elif lost == "average":
        common["optimization"]["average"] = [torch.zeros_like(one) for one in common["optimization"]["average"]]
    elif lost == "optimizer":
        common["optimization"]["optimizer"]["state"] = {}
    elif lost == "meter":
        common["energies"]["counts"] = [[0, 0, 0, 0]]
    else:
        own["noise"]["generator"] = torch.Generator().manual_seed(1).get_state()
    resumed = trainer_of(task, config)
    resumed.load_state_dict(common, own)
    assert not same(ended(resumed), whole)


@pytest.mark.parametrize("lost", ["calibration", "scale", "share", "held_out"])
def test_a_state_that_forgets_something_of_the_value_drift_is_caught(lost, task):
    """The control, in the warm start."""
    config, at = CASES["short steps" if lost == "share" else "value drift"], 2
    if lost == "scale":
        config, at = replace(config, warm_start_updates=8), 5  # after half of them, where it is set
    states: dict[int, Any] = {}
    whole = ended(trainer_of(task, config, on_checkpoint=lambda trainer: states.update({trainer.global_step: both(trainer)})))
    common, own = states[at]
    if lost == "calibration":
        calibration = own["preparation"]["value_drift"]["calibration"]
        calibration["factor"] = torch.zeros_like(calibration["factor"])
    elif lost == "scale":
        own["preparation"]["value_drift"]["scale"] = 0.0
    elif lost == "share":
        assert own["bound"]["share"] < 0.5
        own["bound"]["share"] = 1.0
    else:
        own["preparation"]["held_out"]["weight"] = own["preparation"]["held_out"]["weight"].flip(0)
    resumed = trainer_of(task, config)
    resumed.load_state_dict(common, own)
    assert not same(ended(resumed), whole)


def both(trainer):
    return copied(trainer.state_dict()), copied(trainer.own_state_dict())


def copied(state):
    """A deep copy: a state holds the trainer's own tensors."""
    if isinstance(state, torch.Tensor):
        return state.detach().clone()
    if isinstance(state, dict):
        return {key: copied(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(copied(value) for value in state)
    return state


@pytest.mark.parametrize("call", [1, 2, 4, 6])
@pytest.mark.parametrize("cache", [False, True])
def test_broken_off_within_a_step_it_goes_on_from_the_last_whole_one(call, cache, task):
    """The energy is interrupted: after generator, temperature and counters of the broken step have already moved. Calls 1 and 6
    judge what the warm start and the updates have reached."""
    config = replace(SIZES, objective="rtb", tempering_ess=0.9, behavior={"on_policy": 0.5, "prior": 0.5}, ema_decay=0.9)
    energy = CachedEnergy(task.energy) if cache else task.energy
    whole = ended(trainer_of(task, config, energy))
    kept = []

    asked = []

    def interrupted(x):
        asked.append(len(x))
        if len(asked) == 6 + call:  # after the probe, four calls, the population and the held-out paths
            raise Preempted("SIGTERM")
        return task.energy(x)

    broken = CachedEnergy(interrupted) if cache else interrupted
    trainer = trainer_of(task, config, broken, on_checkpoint=lambda trainer: kept.append(both(trainer)))
    result = trainer.train()
    assert result.interrupted and result.preempted
    resumed = trainer_of(task, config, CachedEnergy(task.energy) if cache else task.energy)
    resumed.load_state_dict(*kept[-1])
    assert same(ended(resumed), whole)


@pytest.mark.parametrize(
    ("teacher", "own"),
    [(ForwardKL, {}), (ValueDrift, {"warm_start": "value_drift", "soft_value_updates": 3, "forward_rows": 16})],
)
def test_a_climb_that_is_renewed_by_the_policy_goes_on_from_wherever_it_was_broken_off(task, monkeypatch, teacher, own):
    """Each call of the energy and of the teacher after the first step is interrupted: within renewals by the policy, behind them,
    in judgements and in updates. The population, the temperature that it carries and the noise are then of one moment."""
    sizes = replace(SIZES, population_size=240, warm_start_updates=10, updates=2)
    config = replace(sizes, population="smc", objective="rtb", behavior={"on_policy": 0.5, "tilted_prior": 0.5}, **own)
    calls, stop, kept = [0], [0], []
    backward = teacher.backward

    def called():
        calls[0] += 1
        if calls[0] == stop[0]:
            raise Preempted("SIGTERM")

    def energy(x):
        called()
        return task.energy(x)

    def teach(*arguments):
        called()
        return backward(*arguments)

    def run():
        calls[0] = 0
        kept.clear()
        return trainer_of(task, config, energy, on_checkpoint=lambda trainer: kept.append((calls[0], both(trainer))))

    monkeypatch.setattr(teacher, "backward", teach)
    whole = ended(run())
    first, last = kept[0][0] + 1, calls[0] + 1
    assert last - first > 15
    for number in range(first, last):
        stop[0] = number
        assert run().train().interrupted
        stop[0], state = 0, kept[-1][1]
        resumed = trainer_of(task, config, energy)
        resumed.load_state_dict(*state)
        assert same(ended(resumed), whole), number


@pytest.mark.parametrize("written", [{"format": FORMAT - 1}, {}])
def test_the_state_of_another_version_is_refused_with_what_to_do(written, task):
    trainer = trainer_of(task, SIZES)
    state, own = both(trainer)
    trainer.load_state_dict(state, own)  # the control
    del state["format"]
    with pytest.raises(ValueError, match=r"another version of Tiltune wrote this checkpoint.*--overwrite"):
        trainer.load_state_dict({**state, **written}, own)


def test_the_state_of_another_policy_is_refused(task):
    trainer = trainer_of(task, SIZES)
    other = Trainer(task.prior(), task.energy, SIZES, policy=MLPDenoiser(width=4, depth=1, fourier_features=1), progress=False)
    with pytest.raises(ValueError, match="of another policy"):
        other.load_state_dict(trainer.state_dict(), trainer.own_state_dict())


# --- as a run folder --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def config(prior):
    """A run on the tiny pipeline."""
    return RunConfig(
        prior=PriorConfig(str(prior), steps=3), train=replace(SIZES, population_size=16, checkpoint_every=3), device="cpu"
    )


def ink(x):
    return x.flatten(1).mean(1)


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """The run that nobody stopped."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(config, folder, energy=ink, progress=False)
    return folder


def left(folder):
    """What must be the same: metrics and policy, byte for byte."""
    names = ("metrics.jsonl", "policy/diffusion_pytorch_model.safetensors")
    return [(folder / name).read_bytes() for name in names]


def breaking(call, error):
    """Ink, until the given call, at which ``error`` is called."""
    asked = []

    def energy(x):
        asked.append(len(x))
        if len(asked) == call:
            error()
        return ink(x)

    return energy


def raised(error):
    def now():
        raise error

    return now


STOPS = {
    "Ctrl-C": lambda: signal.raise_signal(signal.SIGINT),
    "SIGTERM": lambda: signal.raise_signal(signal.SIGTERM),
    "SIGUSR1": lambda: signal.raise_signal(signal.SIGUSR1),
    "an error": raised(RuntimeError("the scorer is gone")),
}


@pytest.mark.parametrize("name", STOPS)
def test_a_stopped_run_folder_goes_on_as_if_nobody_had_stopped_it(name, config, whole, tmp_path):
    run = tmp_path / "run"
    before = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if name == "an error":
        with pytest.raises(ValueError, match="the scorer is gone"):
            train(config, run, energy=breaking(10, STOPS[name]), progress=False)
    else:
        record = train(config, run, energy=breaking(10, STOPS[name]), progress=False).record
        assert record["interrupted"] and record["preempted"] == (name != "Ctrl-C")
    assert signal.getsignal(signal.SIGTERM) is before
    # The last whole step, not the last of the cadence: nothing computed is lost.
    assert checkpoint.last(run / "checkpoints").name == "step-00000006"
    assert left(run) != left(whole)
    train(config, run, energy=ink, resume="auto", progress=False)
    assert left(run) == left(whole)
    done = train(config, run, energy=breaking(1, raised(RuntimeError())), resume="auto", progress=False)
    assert not done.record["interrupted"] and left(run) == left(whole)
    with pytest.raises(ValueError, match="is finished"):
        train(config, run, energy=ink, resume=run, progress=False)


@pytest.mark.parametrize(("call", "step"), [(7, 4), (12, 8)])
def test_stopped_while_it_is_judged_a_run_has_lost_no_step(call, step, config, whole, tmp_path):
    """The warm start ends between two checkpoints of the cadence, and so do the updates."""
    run = tmp_path / "run"
    with pytest.raises(ValueError, match="the scorer is gone"):
        train(config, run, energy=breaking(call, STOPS["an error"]), progress=False)
    assert checkpoint.last(run / "checkpoints").name == f"step-{step:08}"
    train(config, run, energy=ink, resume="auto", progress=False)
    assert left(run) == left(whole)


def test_a_checkpoint_of_0_3_0_is_refused_with_what_to_do(config, tmp_path, monkeypatch):
    """Its state says how many processes there were, and no format."""
    run = tmp_path / "run"
    with pytest.raises(EnergyError, match="no space"):
        train(config, run, energy=breaking(11, raised(OSError("no space"))), progress=False)
    monkeypatch.setattr(checkpointer, "read_state", lambda folder, name: {"processes": 1, "taken": 6})
    with pytest.raises(ValueError, match=r"another version of Tiltune wrote this checkpoint.*--overwrite"):
        train(config, run, energy=ink, resume="auto", progress=False)


def test_a_killed_process_loses_the_steps_since_its_last_checkpoint_and_nothing_else(config, whole, tmp_path):
    run = tmp_path / "run"
    child = os.fork()
    if child == 0:  # pragma: no cover - the child is killed
        train(config, run, energy=breaking(11, lambda: os.kill(os.getpid(), signal.SIGKILL)), progress=False)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    known = read_state(checkpoint.last(run / "checkpoints"), "run")["log"]["history"]
    assert not (run / "run.json").exists() and len((run / "metrics.jsonl").read_text().splitlines()) > len(known)
    with pytest.raises(ValueError, match="already holds a run"):
        train(config, run, energy=ink, progress=False)
    resumed = train(config, run, energy=ink, resume="auto", progress=False)
    assert left(run) == left(whole) and not resumed.record["interrupted"]


@pytest.mark.parametrize("name", ["config.yaml", "run.json"])
def test_killed_while_it_writes_about_itself_a_run_goes_on(name, config, whole, tmp_path, monkeypatch):
    """Neither file is ever there in part."""
    run, replace_file = tmp_path / "run", os.replace

    def killed(source, target):
        if target == run / name:
            os.kill(os.getpid(), signal.SIGKILL)
        replace_file(source, target)

    child = os.fork()
    if child == 0:  # pragma: no cover - the child is killed
        monkeypatch.setattr(os, "replace", killed)
        train(config, run, energy=ink, progress=False)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert not (run / name).exists() and (run / f".{name}").exists()
    train(config, run, energy=ink, resume="auto", progress=False)
    assert left(run) == left(whole)


def test_a_signal_in_the_last_save_does_not_undo_the_end(config, whole, tmp_path, monkeypatch):
    """The run has ended: started again by a cluster, it would be refused as finished."""
    run, replace_file = tmp_path / "run", os.replace

    def asked(source, target):
        if target == run / "run.json":
            signal.raise_signal(signal.SIGTERM)
        replace_file(source, target)

    monkeypatch.setattr(os, "replace", asked)
    record = train(config, run, energy=ink, progress=False).record
    assert not record["interrupted"] and left(run) == left(whole)


def test_auto_starts_where_there_is_nothing_and_a_path_does_not(config, whole, tmp_path):
    train(config, tmp_path / "new", energy=ink, resume="auto", progress=False)
    assert left(tmp_path / "new") == left(whole)
    with pytest.raises(ValueError, match="no such folder"):
        train(config, tmp_path / "other", energy=ink, resume=tmp_path / "nothing", progress=False)
    assert not (tmp_path / "other").exists()


def test_a_damaged_checkpoint_is_fallen_back_from_loudly_and_never_from_a_path(config, whole, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(ValueError, match="is gone"):
        train(config, run, energy=breaking(11, STOPS["an error"]), progress=False)
    newest = checkpoint.last(run / "checkpoints")
    weights = newest / "run.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ValueError, match="no good checkpoint"):
        train(config, run, energy=ink, resume=newest, progress=False)
    with pytest.warns(UserWarning, match=r"run\.safetensors"):
        train(config, run, energy=ink, resume="auto", progress=False)
    assert left(run) == left(whole)


def test_what_breaks_behind_the_optimizers_step_leaves_no_checkpoint_of_half_a_step(config, whole, tmp_path, monkeypatch):
    """Full disks and other processes break off there. Weights of one step with the counters of another would not go on."""
    run, record = tmp_path / "run", MetricsLog.record

    def full(log, bar, global_step, line):
        if global_step == 7:
            raise OSError("no space left")
        record(log, bar, global_step, line)

    monkeypatch.setattr(MetricsLog, "record", full)
    with pytest.raises(OSError, match="no space left"):
        train(config, run, energy=ink, progress=False)
    monkeypatch.undo()
    assert checkpoint.last(run / "checkpoints").name == "step-00000006"
    train(config, run, energy=ink, resume="auto", progress=False)
    assert left(run) == left(whole)


@pytest.mark.parametrize("every", [3, 0])
def test_auto_starts_over_what_ended_before_its_first_checkpoint(every, config, whole, tmp_path):
    """Another process was killed in the first save, say. A run that keeps none may hold hours, and is not replaced."""
    run = tmp_path / "run"
    config = replace(config, train=replace(config.train, checkpoint_every=every))
    with pytest.raises(ValueError, match="is gone"):
        train(config, run, energy=breaking(11, STOPS["an error"]), progress=False)
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
    before = left(run)
    if every:
        train(config, run, energy=ink, resume="auto", progress=False)
        assert left(run) == left(whole) != before
    else:
        with pytest.raises(ValueError, match="already holds a run"):
            train(config, run, energy=ink, resume="auto", progress=False)
        assert left(run) == before


def test_a_checkpoint_of_another_run_is_refused(config, whole, tmp_path):
    theirs = checkpoint.last(whole / "checkpoints")
    for there in (False, True):
        with pytest.raises(ValueError, match="is of another run than"):
            train(config, tmp_path / "run", energy=ink, resume=theirs, progress=False)
        assert sorted(tmp_path.rglob("*")) == ([tmp_path / "run"] if there else [])
        (tmp_path / "run").mkdir(exist_ok=True)


def test_another_config_is_refused_with_the_field_that_differs(config, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(ValueError, match="is gone"):
        train(config, run, energy=breaking(11, STOPS["an error"]), progress=False)
    other = replace(config, train=replace(config.train, learning_rate=0.5))
    with pytest.raises(ValueError, match=r"train\.learning_rate is .* there and 0\.5 here"):
        train(other, run, energy=ink, resume="auto", progress=False)


def test_the_policy_of_a_checkpoint_is_one_that_diffusers_loads(config, tmp_path):
    from diffusers import UNet2DModel

    run = tmp_path / "run"
    with pytest.raises(ValueError, match="is gone"):
        train(config, run, energy=breaking(11, STOPS["an error"]), progress=False)
    saved = UNet2DModel.from_pretrained(checkpoint.last(run / "checkpoints") / "policy")
    ours: Any = open_run(run).policy.denoiser
    for name, weight in ours.model.state_dict().items():
        assert torch.equal(weight, saved.state_dict()[name])


def test_a_run_that_is_being_written_is_left_alone(config, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    with RunLock(run), pytest.raises(ValueError, match="is being written by process"):
        train(config, run, energy=ink, progress=False)
    assert not list(run.iterdir())
