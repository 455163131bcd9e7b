"""A window of trained steps: the policy is the prior at the others, and every row of a log-ratio knows its step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from tiltune.finetune.certificate.evidence import gather_evidence
from tiltune.finetune.config.train import TrainConfig
from tiltune.finetune.learning.calibration import Calibration
from tiltune.finetune.learning.gradients import backward_trajectories
from tiltune.finetune.learning.soft_value import SoftValue
from tiltune.finetune.learning.step_bound import StepBound
from tiltune.finetune.learning.trainer import Trainer
from tiltune.finetune.learning.value_drift import ValueDrift
from tiltune.finetune.populations.population import Population
from tiltune.samplers.bridge import noise_back
from tiltune.samplers.chain import Chain
from tiltune.samplers.condition import Condition
from tiltune.samplers.denoiser import Denoiser, evaluate
from tiltune.samplers.inflated import inflated_rollout
from tiltune.samplers.log_ratio import rows_of, step_log_ratio
from tiltune.samplers.mlp import MLPDenoiser
from tiltune.samplers.policy import Policy
from tiltune.samplers.prior import Prior
from tiltune.samplers.rollout import draw_start, rollout
from tiltune.samplers.schedulers.brownian import brownian_chain
from tiltune.samplers.schedulers.dispatch import chain_from_scheduler
from tiltune.samplers.trained_steps import step_window, trained_line, with_trained_steps
from toys.moved_policy import moved_policy

CHAINS: dict[str, Callable[[], Chain]] = {
    "ddpm": lambda: chain_from_scheduler(DDPMScheduler(variance_type="fixed_large", clip_sample=False), 8),
    "ddim, clipped": lambda: chain_from_scheduler(DDIMScheduler(clip_sample=True, timestep_spacing="trailing"), 8),
    "flow": lambda: chain_from_scheduler(FlowMatchEulerDiscreteScheduler(), 8),
    "brownian": lambda: brownian_chain(8),
}
FIRST, LAST, BATCH = 2, 4, 6
OTHERS = (0, 1, 5, 6)


def networks(chain: Chain) -> tuple[Prior, nn.Module]:
    """A small float64 prior and a policy away from it at every step."""
    return moved_policy(chain, torch.Generator().manual_seed(0))


def windowed(prior: Prior) -> Prior:
    return Prior(prior.denoiser, with_trained_steps(prior.chain, FIRST, LAST), prior.shape)


def inside_only(prior: Prior, policy: Denoiser) -> Denoiser:
    """The policy at the timesteps of the window, the prior at all others: what a window means, on the full chain."""
    inside = prior.chain.timesteps[FIRST : LAST + 1]

    def denoiser(state: Tensor, timestep: Tensor, condition: Condition | None = None) -> Tensor:
        at = torch.isin(timestep.double(), inside).reshape(-1, 1)
        return torch.where(at, policy(state, timestep, condition), prior.denoiser(state, timestep, condition))

    return denoiser


def draw(prior: Prior, policy: Denoiser | None, **options) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return rollout(prior, policy, BATCH, generator, start=draw_start(prior, BATCH, generator, torch.float64), **options)


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("drawn_by", ["policy", "prior"])
def test_the_ratio_is_exactly_zero_at_the_other_steps(name: str, drawn_by: str) -> None:
    """Against the full chain with a policy that is the prior outside of the window: the same states and the same ratios."""
    prior, policy = networks(CHAINS[name]())
    window = windowed(prior)
    drawn = draw(window, policy, drawn_by=drawn_by)
    whole = draw(prior, inside_only(prior, policy), drawn_by=drawn_by)
    assert torch.equal(drawn.states, whole.states)
    rows = [prior.chain.trained.index(k) for k in window.chain.trained]
    assert drawn.step_log_ratio.shape == (LAST - FIRST + 1, BATCH)
    assert torch.equal(drawn.step_log_ratio, whole.step_log_ratio[rows])
    others = [k for k in range(prior.chain.num_kernels) if k not in rows]
    assert whole.step_log_ratio[others].eq(0).all()
    # Control: the policy itself differs from the prior there.
    assert draw(prior, policy).step_log_ratio[others].abs().min() > 0
    # From stored states, and by Policy.sample's loop.
    torch.testing.assert_close(step_log_ratio(window.chain, prior.denoiser, policy, drawn), drawn.step_log_ratio)
    network, moved = networks(CHAINS[name]())
    small = Prior(network.denoiser.float(), window.chain, (2,))
    expected = rollout(small, moved.float(), BATCH, torch.Generator().manual_seed(0)).terminal
    assert torch.equal(Policy(small, moved.float()).sample(BATCH), expected)


@pytest.mark.parametrize("name", CHAINS)
def test_inflated_noise_stays_inside_the_window(name: str) -> None:
    prior, policy = networks(CHAINS[name]())
    window = windowed(prior)
    generator = torch.Generator().manual_seed(3)
    drawn = inflated_rollout(window, policy, BATCH, generator, 1.7, start=draw_start(prior, BATCH, generator, torch.float64))
    plain = draw(window, None)
    assert torch.equal(drawn.states[: FIRST + 1], plain.states[: FIRST + 1])
    assert drawn.step_log_ratio is not None
    torch.testing.assert_close(step_log_ratio(window.chain, prior.denoiser, policy, drawn), drawn.step_log_ratio)


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("trained", [tuple(range(FIRST, LAST + 1)), (1, 3, 4)], ids=["window", "with a gap"])
def test_the_gradient_is_the_full_one_at_these_rows(name: str, trained: tuple[int, ...]) -> None:
    """Pass 2 with weights g on the trained rows = pass 2 of the full chain with g there and 0 elsewhere."""
    prior, policy = networks(CHAINS[name]())
    drawn = draw(prior, policy)
    some = replace(prior.chain, trained=trained)
    whole_g = torch.randn(prior.chain.num_kernels, BATCH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    g = whole_g[list(trained)]
    masked = torch.zeros_like(whole_g)
    masked[list(trained)] = g

    def gradient(chain: Chain, weights: Tensor, chunk: int) -> Tensor:
        policy.zero_grad()
        backward_trajectories(policy, chain, drawn, weights, chunk)
        return torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])

    expected = gradient(prior.chain, masked, 7)
    for chunk in (1, 4, 1000):
        torch.testing.assert_close(gradient(some, g, chunk), expected, rtol=1e-9, atol=1e-10)
    # Control: the other rows do matter, and so does which row is which step.
    for other in (gradient(prior.chain, whole_g, 7), gradient(replace(some, trained=(0, 1, 2)), g, 7)):
        assert (other - expected).norm() > 0.01 * expected.norm()


def test_rows_and_steps_name_each_other() -> None:
    chain = replace(brownian_chain(8), trained=(1, 3, 4, 7))
    row = torch.tensor([2, 0, 3, 3, 1])
    assert chain.step_of_row(row).tolist() == [4, 1, 7, 7, 3]
    assert torch.equal(chain.row_of_step(chain.step_of_row(row)), row)
    assert chain.row_of_step(torch.tensor([0, 2])).tolist() == [-1, -1]
    assert (chain.num_kernels, chain.last_trained, chain.prior_last_steps) == (4, 7, 0)
    drawn = rollout(Prior(lambda state, timestep, condition=None: state, chain, (2,)), None, 5, torch.Generator().manual_seed(0))
    state, following, step, _ = rows_of(drawn, chain, slice(3, 18))
    for n, flat in enumerate(range(3, 18)):
        k, b = chain.trained[flat // 5], flat % 5
        assert step[n] == k
        assert torch.equal(state[n], drawn.states[k, b]) and torch.equal(following[n], drawn.states[k + 1, b])


class Linear(SoftValue):
    """Two given estimates of log h, linear in the state, with a slope of their own for each step."""

    def __init__(self) -> None:
        self.times = 1.0
        self.slopes = torch.randn(2, 9, 2, generator=torch.Generator().manual_seed(2))

    def estimates(self, state: Tensor, step: Tensor, path: Tensor | None, times: float, group: Tensor | None = None) -> Tensor:
        return torch.stack([(state * slope[step]).sum(1) for slope in self.slopes], 1)


def test_a_teachers_calibration_belongs_to_its_step() -> None:
    prior = networks(CHAINS["ddpm"]())[0]
    prior = Prior(prior.denoiser.float(), prior.chain, (2,))
    drawn = rollout(prior, None, 64, torch.Generator().manual_seed(0))
    population = Population(drawn.with_(energy=drawn.terminal.square().sum(1)))
    generator = torch.Generator().manual_seed(4)
    states = prior.chain.num_steps + 1
    factor, offset = torch.rand(states, 2, generator=generator), torch.rand(states, 1, generator=generator)
    step = torch.arange(FIRST, LAST + 1).repeat_interleave(10)
    path = torch.arange(len(step))
    state, following = (drawn.states[at, path] for at in (step, step + 1))
    output = evaluate(prior.denoiser, prior.chain, state, step, None)

    def target(of: Prior, factor: Tensor) -> Tensor:
        calibration = Calibration(factor, offset, torch.zeros(states))
        drift = ValueDrift(of, population, Linear(), calibration, 1.0, generator)
        return drift.target(state, following, step, output, None, step % 2 == 0)

    expected = target(prior, factor)
    assert torch.equal(target(windowed(prior), factor), expected)
    assert not torch.allclose(target(windowed(prior), factor.flip(0)), expected)  # control


def test_what_is_measured_lies_inside_the_window() -> None:
    prior, policy = networks(CHAINS["ddpm"]())
    prior, policy = windowed(Prior(prior.denoiser.float(), prior.chain, (2,))), policy.float()
    drawn = rollout(prior, policy, BATCH, torch.Generator().manual_seed(0))
    bound = StepBound(prior, policy, lambda nats: nats)
    bound.look_at(drawn, torch.Generator().manual_seed(0))
    assert set(bound.step.tolist()) <= set(range(FIRST, LAST + 1))
    evidence = gather_evidence(
        prior, policy, lambda x: x.square().sum(1), 1.0, torch.Generator().manual_seed(0), size=400, starts=0
    )
    assert evidence.step_kl.shape == (LAST - FIRST + 1,)
    assert evidence.step_kl.sum().item() == pytest.approx(evidence.log_ratio.mean().item(), rel=1e-4)


@pytest.mark.parametrize("warm_start", ["tlm", "value_drift"])
@pytest.mark.parametrize("objective", ["reinforce_kl", "rtb"])
def test_a_training_changes_nothing_outside_of_the_window(warm_start: str, objective: str) -> None:
    """Every phase of a run on a window; at the end the policy's paths are the prior's up to the window's first step."""
    prior, _ = networks(CHAINS["ddpm"]())
    prior = windowed(Prior(prior.denoiser.float(), prior.chain, (2,)))
    config = TrainConfig(
        objective=objective,
        warm_start=warm_start,
        warm_start_updates=6,
        warm_start_rows=16,
        soft_value_updates=8,
        population_size=64,
        updates=4,
        batch_size=8,
        forward_rows=8,
        tempering_ess=None,
        learning_rate=0.01,
    )
    result = Trainer(prior, lambda x: x.square().sum(1), config, progress=False).train()
    moved, still = (rollout(prior, one, 16, torch.Generator().manual_seed(1)) for one in (result.policy, None))
    assert torch.equal(moved.states[: FIRST + 1], still.states[: FIRST + 1])
    pairs = zip(result.policy.parameters(), prior.denoiser.parameters(), strict=True)
    same = all(torch.equal(weight, before) for weight, before in pairs)
    assert result.improvement is not None and same == (result.improvement.reached == "prior")


def test_a_path_noised_back_reaches_the_end_by_the_prior() -> None:
    chain = with_trained_steps(CHAINS["ddpm"](), FIRST, LAST)
    prior = Prior(MLPDenoiser(dim=2, width=8, depth=1, fourier_features=4), chain, (2,))
    samples = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    drawn = noise_back(prior, samples, torch.Generator().manual_seed(1))
    assert drawn.states.shape == (9, 5, 2)
    again = noise_back(Prior(prior.denoiser, CHAINS["ddpm"](), (2,)), samples, torch.Generator().manual_seed(1))
    assert torch.equal(drawn.states[: LAST + 2], again.states[: LAST + 2])
    assert not torch.equal(drawn.states[LAST + 2], again.states[LAST + 2])


REFUSED = [
    ("ddpm", 4, 3, r"train_steps 4:3 holds no step: LAST is below FIRST"),
    ("ddpm", 2, 8, r"train_steps 2:8 reaches beyond the chain, whose 8 steps are 0 \(noise\) to 7 \(sample\)"),
    ("ddpm", 2, 7, r"holds step 7, which draws no noise, so that it has no density to train; .* steps 0 to 6 can be trained"),
    ("flow", 2, 7, r"holds step 7, which belongs to the prior; of this chain the steps 0 to 6 can be trained"),
]


@pytest.mark.parametrize(("name", "first", "last", "message"), REFUSED)
def test_refusals_say_why(name: str, first: int, last: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        with_trained_steps(CHAINS[name](), first, last)


@pytest.mark.parametrize("text", ["", "3", "a:b", "1-3", "1:2:3", "-1:3", "1.5:3"])
def test_a_window_is_written_first_last(text: str) -> None:
    with pytest.raises(ValueError, match="write FIRST:LAST, such as 10:19"):
        step_window(text)


def test_a_window_in_words() -> None:
    assert step_window("10:19") == (10, 19)
    assert trained_line(with_trained_steps(brownian_chain(20), 10, 19)) == (
        "steps 10 to 19 of 20 are trained; the others are the prior's own"
    )
    assert trained_line(with_trained_steps(brownian_chain(20), 3, 3)).startswith("step 3 of 20 is trained")
