"""Two passes give the naive graph's gradient, on one process and on two, at memory that does not grow with the steps."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor, nn

from tiltune.finetune.learning.batch import Batch
from tiltune.finetune.learning.gradients import MAX_CHUNK, Sampled, backward_trajectories, chunk_rows, objective_gradient
from tiltune.finetune.learning.objective_table import OBJECTIVES
from tiltune.finetune.learning.rows import sampled_steps
from tiltune.launch.bench.case import make_case
from tiltune.launch.bench.memory import KeptBytes
from tiltune.launch.bench.updates import ignore, naive_update, two_pass_update
from tiltune.samplers.chain import Chain
from tiltune.samplers.denoiser import evaluate
from tiltune.samplers.log_ratio import rows_of, step_log_ratio
from tiltune.samplers.prior import Prior
from tiltune.samplers.rollout import draw_start, rollout
from tiltune.samplers.schedulers.brownian import brownian_chain
from tiltune.samplers.schedulers.dispatch import chain_from_scheduler
from tiltune.samplers.trajectory import Trajectories
from toys.moved_policy import moved_policy

ALPHA, BATCH = 0.6, 6


def clipped_ddpm() -> Chain:
    return chain_from_scheduler(DDPMScheduler(variance_type="fixed_large", clip_sample=True, clip_sample_range=0.5), 4)


def clipped_ddim() -> Chain:
    return chain_from_scheduler(DDIMScheduler(clip_sample=True, clip_sample_range=3.0, timestep_spacing="leading"), 4)


CHAINS: dict[str, Callable[[], Chain]] = {
    "brownian": lambda: brownian_chain(4),
    "prior last": lambda: chain_from_scheduler(DDPMScheduler(prediction_type="v_prediction", clip_sample=False), 4),
    "clipped": clipped_ddpm,
    "clipped, raw output kept": clipped_ddim,
}


def make_setting(chain: Chain) -> tuple[Prior, nn.Module, Trajectories]:
    """A small float64 prior, a policy away from it, and its on-policy trajectories with energies."""
    generator = torch.Generator().manual_seed(0)
    prior, policy = moved_policy(chain, generator)
    drawn = rollout(prior, policy, BATCH, generator, start=draw_start(prior, BATCH, generator, torch.float64))
    return prior, policy, drawn.with_(energy=drawn.terminal.square().sum(1))


def make_batch(prior: Prior, policy: nn.Module, trajectories: Trajectories) -> Batch:
    energy = trajectories.energy
    assert energy is not None
    ratio = step_log_ratio(prior.chain, prior.denoiser, policy, trajectories)
    valid = torch.arange(len(energy)) != 1
    return Batch(ratio, energy, valid, trajectories.log_behavior)


def naive_gradient(name: str, prior: Prior, policy: nn.Module, trajectories: Trajectories, huber: float | None) -> Tensor:
    """One graph through every step, one backward; log Z's gradient last."""
    policy, chain = copy.deepcopy(policy), prior.chain
    state, following, step, _ = rows_of(trajectories, chain, slice(None))
    prior_output = evaluate(prior.denoiser, chain, state, step, None)
    shift = chain.kernel.shift(state, step, evaluate(policy, chain, state, step, None), prior_output)
    z = (following - chain.kernel.mean(state, step, prior_output)) / chain.kernel.row(step, state).sigma
    ratio = chain.kernel.log_ratio_from_states(z, shift).reshape(chain.num_kernels, -1)
    log_z = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    batch = replace(make_batch(prior, policy, trajectories), step_log_ratio=ratio)
    OBJECTIVES[name].loss(batch, ALPHA, log_z, huber).backward()
    return flat_gradient(policy, {} if log_z.grad is None else {"log_z": log_z.grad[None]})


def flat_gradient(policy: nn.Module, gradients: dict[str, Tensor]) -> Tensor:
    log_z = gradients.get("log_z", torch.zeros(1, dtype=torch.float64))
    return torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None] + [log_z])


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_two_passes_are_the_naive_gradient(name: str, chain: str) -> None:
    prior, policy, trajectories = make_setting(CHAINS[chain]())
    assert (prior.chain.prior_last_steps > 0) == (chain != "brownian")
    total = prior.chain.num_kernels * BATCH
    for huber in (None, 1.0):
        expected = naive_gradient(name, prior, policy, trajectories, huber)
        for chunk in (1, 7, total):
            policy.zero_grad()
            log_z = torch.tensor([0.2], dtype=torch.float64)
            batch = make_batch(prior, policy, trajectories)
            _, gradients = objective_gradient(OBJECTIVES[name], batch, ALPHA, log_z, huber)
            backward_trajectories(policy, prior.chain, trajectories, gradients["step_log_ratio"], chunk)
            assert relative(flat_gradient(policy, gradients), expected) <= 1e-10


@pytest.mark.parametrize("chain", ["clipped", "clipped, raw output kept"])
def test_the_clip_is_active_in_the_clipped_chains(chain: str) -> None:
    prior, policy, trajectories = make_setting(CHAINS[chain]())
    state, _, step, _ = rows_of(trajectories, prior.chain, slice(None))
    clean = prior.chain.kernel.clean(state, step, evaluate(policy, prior.chain, state, step, None))
    share = (clean.abs() == prior.chain.clip).double().mean().item()
    assert 0.05 < share < 0.95


class Gathered:
    """What ``accelerator.gather`` gives: every process's tensor, in rank order. Calls come in the same order everywhere."""

    def __init__(self, batches: list[Batch], rank: int) -> None:
        self.rank = rank
        fields = ("step_log_ratio", "energy", "valid", "log_behavior")
        columns = [[getattr(batch, name) for batch in batches] for name in fields]
        self.waiting = [[part.T for part in columns[0]], *columns[1:]]

    def __call__(self, tensor: Tensor) -> Tensor:
        parts = self.waiting.pop(0)
        assert torch.equal(parts[self.rank], tensor)
        return torch.cat(parts)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_two_processes_give_the_gradient_of_the_global_batch(name: str) -> None:
    """Local columns times W, averaged as DDP does; log Z's gradient is global and equal on both, never summed."""
    prior, policy, trajectories = make_setting(CHAINS["prior last"]())
    expected = naive_gradient(name, prior, policy, trajectories, None)
    parts = [trajectories.select(torch.arange(0, 3)), trajectories.select(torch.arange(3, 6))]
    whole = make_batch(prior, policy, trajectories)
    assert whole.log_behavior is not None
    halves = (slice(0, 3), slice(3, 6))
    batches = [Batch(whole.step_log_ratio[:, s], whole.energy[s], whole.valid[s], whole.log_behavior[s]) for s in halves]
    losses, gradients, log_z_gradients = [], [], []
    for rank in range(2):
        policy.zero_grad()
        log_z = torch.tensor([0.2], dtype=torch.float64)
        gather = Gathered(batches, rank)
        loss, found = objective_gradient(OBJECTIVES[name], batches[rank], ALPHA, log_z, gather=gather, rank=rank, world_size=2)
        backward_trajectories(policy, prior.chain, parts[rank], found["step_log_ratio"], 4)
        flat = flat_gradient(policy, found)
        losses.append(loss)
        gradients.append(flat[:-1])
        log_z_gradients.append(flat[-1])
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(log_z_gradients[0], log_z_gradients[1])
    averaged = torch.cat([0.5 * (gradients[0] + gradients[1]), log_z_gradients[0][None]])
    assert relative(averaged, expected) <= 1e-10
    # The processes' own shares differ, so that the average is what matters.
    assert relative(gradients[0], gradients[1]) > 0.1


def test_pass_one_leaves_the_policy_alone() -> None:
    prior, policy, trajectories = make_setting(CHAINS["brownian"]())
    batch = make_batch(prior, policy, trajectories)
    _, gradients = objective_gradient(OBJECTIVES["rtb"], batch, ALPHA, torch.zeros(1, dtype=torch.float64))
    g = gradients["step_log_ratio"]
    assert set(gradients) == {"step_log_ratio", "log_z"}
    assert all(parameter.grad is None for parameter in policy.parameters())
    assert g.shape == batch.step_log_ratio.shape
    assert g[:, 1].eq(0).all()  # the masked trajectory
    assert not g.requires_grad


def test_memory_does_not_grow_with_the_steps() -> None:
    """Peak bytes that autograd keeps, weights and states left out: flat from K = 20 to 320, 30 times below naive at 80."""
    peaks: dict[int, int] = {}
    for steps in (20, 80, 320):
        case = make_case("mlp", steps, 64, "cpu")
        with KeptBytes(case.weights) as kept:
            two_pass_update(case, torch.Generator().manual_seed(0), 64, kept.ignore)
        assert kept.now == 0
        peaks[steps] = kept.peak
    case = make_case("mlp", 80, 64, "cpu")
    with KeptBytes(case.weights) as kept:
        naive_update(case, torch.Generator().manual_seed(0), kept.ignore)
    assert peaks[20] > 0
    assert peaks[320] / peaks[20] <= 1.05
    assert kept.peak / peaks[80] >= 30


def test_the_benchmark_compares_equal_gradients() -> None:
    case = make_case("mlp", 10, 32, "cpu")
    gradients = []
    for update in (
        lambda generator: two_pass_update(case, generator, 50, ignore),
        lambda generator: naive_update(case, generator, ignore),
    ):
        case.policy.zero_grad()
        generator = torch.Generator().manual_seed(0)
        # The library draws the (pinned) start too.
        if gradients:
            torch.randn((32, 2), generator=generator)
        update(generator)
        gradients.append(torch.cat([p.grad.flatten() for p in case.policy.parameters() if p.grad is not None]))
    assert relative(gradients[0], gradients[1]) < 1e-4


def test_chunk_rows_fits_its_budget() -> None:
    case = make_case("mlp", 20, 128, "cpu")
    chain = case.prior.chain
    trajectories = rollout(case.prior, case.policy, 128, torch.Generator().manual_seed(0))

    def rows(budget_mb: float) -> int:
        return chunk_rows(case.policy, chain, trajectories, budget_mb)

    chosen = [rows(budget) for budget in (1e-6, 0.1, 1.0, 1e6)]
    assert chosen == sorted(chosen)
    assert chosen[0] == 1
    assert chosen[-1] == min(MAX_CHUNK, 20 * 128)
    assert rows(1.0) == chosen[2]
    with KeptBytes([*case.weights, trajectories.states]) as kept:
        backward_trajectories(case.policy, chain, trajectories, torch.ones(20, 128), chosen[2])
    assert 0.5 < kept.peak / 2**20 < 1.3
    one = rollout(case.prior, case.policy, 1, torch.Generator().manual_seed(0))
    assert 1 <= chunk_rows(case.policy, chain, one, 1e6) <= 20


class Squashed(nn.Module):
    """A network whose last layer keeps its own output for the backward pass; that output, by weak reference."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.outputs = network, list[weakref.ref[Tensor]]()

    def forward(self, *inputs: Tensor) -> Tensor:
        output = self.network(*inputs).tanh()
        self.outputs.append(weakref.ref(output))
        return output


@pytest.mark.parametrize("budget_mb", [1e-6, 1.0])
def test_nothing_that_was_measured_stays_in_memory(budget_mb: float) -> None:
    prior, policy, trajectories = make_setting(brownian_chain(8))
    squashed = Squashed(policy)
    chunk_rows(squashed, prior.chain, trajectories, budget_mb)
    with KeptBytes([]) as kept:
        squashed(trajectories.states[0], torch.zeros(trajectories.states.shape[1], dtype=torch.long))
    assert squashed.outputs and not any(output() is not None for output in squashed.outputs)
    assert kept.peak > 0 and kept.now == 0


def test_an_output_that_its_graph_keeps_as_it_is_stays_in_memory() -> None:
    """The control: what the measurement would leave behind if it did not detach what it is shown."""
    _, policy, trajectories = make_setting(brownian_chain(8))
    squashed = Squashed(policy)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
        squashed(trajectories.states[0], torch.zeros(trajectories.states.shape[1], dtype=torch.long))
    gc.collect()
    assert squashed.outputs[0]() is not None


def gradient_by(prior: Prior, policy: nn.Module, trajectories: Trajectories, g: Tensor, sampled: Sampled | None) -> Tensor:
    policy.zero_grad()
    backward_trajectories(policy, prior.chain, trajectories, g, 100, sampled=sampled)
    return torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])


def test_a_share_of_the_steps_has_the_gradient_of_all_in_the_mean() -> None:
    """10,000 draws of a quarter of eight steps: of 20 random projections, each within 3.5 standard errors (p = .01 in all)."""
    chain = chain_from_scheduler(DDPMScheduler(prediction_type="v_prediction", clip_sample=False), 9)
    prior, policy, trajectories = make_setting(chain)
    batch = make_batch(prior, policy, trajectories)
    g = objective_gradient(OBJECTIVES["log_variance"], batch, ALPHA, torch.zeros(1))[1]["step_log_ratio"]
    whole = gradient_by(prior, policy, trajectories, g, None)
    one_by_one = torch.stack(
        [gradient_by(prior, policy, trajectories, g, (row[None], torch.ones(1))) for row in torch.arange(g.numel())]
    )
    assert torch.allclose(one_by_one.sum(0), whole)
    generator = torch.Generator().manual_seed(2)
    directions = torch.randn(len(whole), 20, generator=generator, dtype=torch.float64)
    each = one_by_one @ directions
    draws = [sampled_steps(prior.chain, BATCH, 0.25, generator) for _ in range(10_000)]
    assert {len(row) for row, _ in draws} == {2 * BATCH}
    found = torch.stack([(weight.double()[:, None] * each[row]).sum(0) for row, weight in draws])
    error = found.std(0) / 100
    assert ((found.mean(0) - whole @ directions).abs() < 3.5 * error).all()
    # The control: without the weights the gradient is another one.
    unweighted = torch.stack([4 * each[row].sum(0) for row, _ in draws])
    assert ((unweighted.mean(0) - whole @ directions).abs() > 3.5 * unweighted.std(0) / 100).any()
    row, weight = draws[0]
    assert torch.allclose(
        gradient_by(prior, policy, trajectories, g, draws[0]), (weight.double()[:, None] * one_by_one[row]).sum(0)
    )


def test_kept_outputs_of_the_prior_give_the_same_log_ratios() -> None:
    for chain in CHAINS.values():
        prior, policy, _ = make_setting(chain())
        generator = torch.Generator().manual_seed(3)
        drawn = rollout(
            prior, None, BATCH, generator, start=draw_start(prior, BATCH, generator, torch.float64), keep_outputs=True
        )
        assert drawn.prior_outputs is not None
        expected = step_log_ratio(prior.chain, prior.denoiser, policy, drawn.with_(prior_outputs=None))
        some = torch.tensor([4, 0, 1])
        found = step_log_ratio(prior.chain, not_called, policy, drawn.select(some))
        assert torch.allclose(found, expected[:, some], rtol=1e-12, atol=1e-12)


def not_called(*_: object) -> Tensor:
    raise AssertionError("the prior's outputs are there")
