"""The learned soft value against its closed form, and that an error in it costs variance and never truth."""

import math
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler

from tiltune.finetune.config.train import TrainConfig
from tiltune.finetune.learning.batch import Batch
from tiltune.finetune.learning.forward_kl import ForwardKL
from tiltune.finetune.learning.gradients import backward_likelihood
from tiltune.finetune.learning.objectives import reinforce_kl
from tiltune.finetune.learning.path_data import PathData
from tiltune.finetune.learning.rows import states_of
from tiltune.finetune.learning.soft_value import (
    SoftValue,
    fit_soft_value,
    importance_weight,
    standardized,
)
from tiltune.finetune.learning.trainer import Trainer
from tiltune.finetune.learning.value_network import ValueNetwork
from tiltune.finetune.populations.importance import importance_population
from tiltune.finetune.populations.population import Population
from tiltune.samplers.denoiser import ResidualDenoiser, estimated_data, evaluate
from tiltune.samplers.mlp import MLPDenoiser
from tiltune.samplers.rollout import rollout
from tiltune.samplers.schedulers.dispatch import chain_from_scheduler
from tiltune.samplers.trajectory import Trajectories
from toys.linear_gaussian import LinearGaussian

VP = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction", "clip_sample": False}


@pytest.fixture(scope="module")
def task():
    chain = chain_from_scheduler(DDPMScheduler(variance_type="fixed_large", **VP), 10)
    return LinearGaussian(chain, torch.zeros(2, dtype=torch.float64), torch.tensor([1.0, -0.5], dtype=torch.float64))


@pytest.fixture(scope="module")
def population(task):
    drawn = rollout(task.prior(), None, 4000, torch.Generator().manual_seed(0))
    return Population(drawn.with_(energy=task.energy(drawn.terminal)))


def exact(task, state, step):
    """log h_k(s) - log Z in closed form."""
    g, h = task.soft_value
    return (state.double() * g[step]).sum(1) + h[step] - task.log_z


def fit(task, population, updates, seed=1):
    data = PathData(task.prior(), population.trajectories)
    return fit_soft_value(population, data, task.alpha, updates, torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def fitted(task, population):
    return fit(task, population, 250)


def test_it_learns_the_closed_form(task, population, fitted):
    """Root mean square error at most half of what log h itself spreads, from 4000 paths; a shuffled population shows nothing."""

    def error(value):
        step = torch.arange(10).repeat_interleave(400)
        fresh = rollout(task.prior(), None, 400, torch.Generator().manual_seed(5))
        states = fresh.states[:10].flatten(0, 1)
        data = estimated_data(task.prior().denoiser, task.chain, states, step, None)
        return (value(data, step) - exact(task, states, step)).square().mean().sqrt().item()

    nothing = error(lambda state, step: torch.zeros(len(state)))
    assert error(fitted) < 0.5 * nothing
    mixed = population.trajectories.energy[torch.randperm(4000, generator=torch.Generator().manual_seed(2))]
    blind = fit(task, Population(population.trajectories.with_(energy=mixed)), 100)
    assert error(blind) > 0.9 * nothing


def test_what_the_prior_expects_along_paths_is_x_hat_whoever_evaluated_it(task):
    """m + gain (s - signal m) of the closed form at every state, the terminal one itself; kept outputs cost no evaluation."""
    prior = task.prior()
    drawn = rollout(prior, None, 6, torch.Generator().manual_seed(2), keep_outputs=True)
    step, path = torch.arange(11).repeat_interleave(6)[: 6 * (task.chain.last_trained + 2)], torch.arange(6).repeat(11)
    path = path[: len(step)]
    gain = torch.cat([task.gain, torch.ones(1, dtype=torch.float64)])[step, None].float()
    closed = gain * drawn.states[step, path]
    known = PathData(prior, drawn)
    assert torch.allclose(known(step, path), closed, atol=1e-5)
    assert torch.equal(known(step, path), PathData(prior, drawn.with_(prior_outputs=None))(step, path))
    prior.denoiser = None  # nothing is left to evaluate, but what the last trained step leads to
    before = step <= task.chain.last_trained
    assert torch.allclose(PathData(prior, drawn)(step[before], path[before]), closed[before], atol=1e-5)


def test_an_older_soft_value_is_refused(task, fitted):
    state, steps = fitted.state_dict(), task.chain.last_trained + 1
    SoftValue.from_state_dict(state, (2,), steps, torch.device("cpu"))
    del state["sees"]
    with pytest.raises(ValueError, match="earlier version"):
        SoftValue.from_state_dict(state, (2,), steps, torch.device("cpu"))


def test_a_path_is_judged_by_the_network_that_has_not_seen_it():
    networks = (lambda state, step, group: torch.zeros(len(state)), lambda state, step, group: torch.ones(len(state)))
    value = SoftValue(networks, torch.tensor([0, 1, 1]))  # pyright: ignore[reportArgumentType]
    state, step = torch.zeros(3, 2), torch.zeros(3, dtype=torch.long)
    assert value.of_paths(state, step, torch.tensor([0, 1, 2])).tolist() == [1.0, 0.0, 0.0]
    assert value(state, step).tolist() == [0.5, 0.5, 0.5]


def test_the_global_generator_is_left_alone(task, population):
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    first = fit(task, population, 3)
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(4)
    second = fit(task, population, 3)
    for a, b in zip(first.networks[0].parameters(), second.networks[0].parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("shape", [(2,), (1, 8, 8), (3, 16, 16), (4, 7, 5)])
def test_any_shape_of_state_starts_at_zero(shape):
    network = ValueNetwork(shape, 5)
    assert network(torch.randn(3, *shape), torch.tensor([0, 2, 5])).tolist() == [0.0, 0.0, 0.0]


def test_fresh_states_have_the_law_of_the_stored_ones(task, population):
    """Mean and variance of each coordinate within 5 standard errors (p < 1e-5 together) of the chain's nominal law."""
    step = torch.full((4000,), 5)
    path = torch.arange(4000)
    for fresh in (0.0, 1.0):
        state = states_of(task.chain, population.trajectories.states, path, step, fresh, torch.Generator().manual_seed(7))
        assert state.mean(0).abs().max() < 5 / math.sqrt(4000)
        assert (state.var(0) - 1).abs().max() < 5 * math.sqrt(2 / 4000)
    assert torch.equal(
        states_of(task.chain, population.trajectories.states, path, step, 0.0, torch.Generator()),
        population.trajectories.states[5],
    )


def gradients(task, population, control):
    """Per-path gradient [N] of the likelihood at step 6 along one direction of the shift, by autograd in float64."""
    chain, prior = task.chain, task.prior()
    step = torch.full((4000,), 6)
    state, following = population.trajectories.states[6].double(), population.trajectories.states[7].double()
    output = evaluate(prior.denoiser, chain, state, 6, None)
    weight = importance_weight(population, task.alpha).double()
    theta = torch.zeros(4000, requires_grad=True, dtype=torch.float64)

    def policy(x, timestep, condition=None):
        return prior.denoiser(x, timestep) + theta[:, None] * torch.tensor([0.3, 0.1], dtype=torch.float64)

    backward_likelihood(policy, chain, output, state, following, step, weight, control)  # pyright: ignore[reportArgumentType]
    assert theta.grad is not None
    return theta.grad


def test_the_control_variate_changes_the_variance_and_not_the_mean(task, population):
    """Means with and without it within 4 standard errors of the difference (p < 1e-4); the exact h removes most variance."""
    state, step = population.trajectories.states[6], torch.full((4000,), 6)
    plain = gradients(task, population, torch.zeros(4000))
    controlled = gradients(task, population, exact(task, state, step).exp())
    difference = plain - controlled
    assert difference.mean().abs() < 4 * difference.std() / math.sqrt(4000)
    assert controlled.var() < 0.5 * plain.var()
    # A control that looks at what comes next is not one: it takes the signal out with the noise.
    peeking = gradients(task, population, importance_weight(population, task.alpha).double())
    assert (plain - peeking).mean().abs() > 5 * (plain - peeking).std() / math.sqrt(4000)


def walk(theta, count, generator):
    """Three kernels s' = s + theta + eps on-policy, energy s_3: noise, states [4, N] and the log-ratios' dependence on theta."""
    noise = torch.randn(3, count, generator=generator, dtype=torch.float64)
    states = torch.cat([torch.zeros(1, count, dtype=torch.float64), (noise + theta).cumsum(0)])
    return noise, states


@pytest.mark.parametrize("peek", [False, True])
def test_a_baseline_of_the_state_leaves_the_gradient_unbiased(peek):
    """dL/dtheta over 400 batches of 64 within 4 standard errors of the closed form (p < 1e-4); a baseline that sees the next
    state misses it by far.

    L = KL + E: with shift theta, sum ½ theta² + 3 theta, so dL/dtheta = 3 theta + 3 at alpha = 1.
    """
    generator, theta = torch.Generator().manual_seed(0), 0.4
    found = []
    for _ in range(400):
        noise, states = walk(theta, 64, generator)
        z = noise + theta  # standardized under the prior
        shift = torch.tensor(theta, dtype=torch.float64, requires_grad=True)
        ratio = z * shift - 0.5 * shift**2
        seen = states[1:] if peek else states[:-1]
        value = -1.3 * seen + 0.2 * seen.square()  # wrong on purpose
        batch = Batch(ratio, states[-1], torch.ones(64, dtype=torch.bool), ratio.detach().sum(0), value)
        reinforce_kl(batch, 1.0, torch.zeros(())).backward()
        assert shift.grad is not None
        found.append(shift.grad)
    gradient = torch.stack(found)
    error = gradient.std() / math.sqrt(len(gradient))
    off = (gradient.mean() - (3 * theta + 3)).abs() / error
    assert off > 10 if peek else off < 4


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_training_with_it_comes_closer_and_repeats(task, ema_decay):
    config = TrainConfig(
        objective="reinforce_kl",
        soft_value_updates=60,
        population_size=1000,
        warm_start_updates=60,
        warm_start_rows=256,
        updates=10,
        batch_size=64,
        ema_decay=ema_decay,
        tempering_ess=None,
    )

    def train():
        torch.manual_seed(0)
        policy = ResidualDenoiser(task.prior().denoiser, MLPDenoiser(width=16, depth=1, fourier_features=4))
        return Trainer(task.prior(), task.energy, config, policy=policy, progress=False).train()

    first, second = train(), train()
    assert first.history == second.history
    eubo = [record["eubo"] for record in first.history if "eubo" in record]
    # The forward KL to the tilted law, EUBO - log Z, starts at ½ |slope|² = .6 and must more than halve.
    assert eubo[-1] - task.log_z < 0.5 * (eubo[0] - task.log_z)


class Shift(torch.nn.Module):
    """The prior with every kernel's mean moved by a constant of theta_k standard deviations; theta [num_kernels, 2]."""

    def __init__(self, task):
        super().__init__()
        chain = task.chain
        self.prior, self.labels = task.prior().denoiser, chain.timesteps
        self.gain = ((chain.d * chain.q + chain.e) / chain.sigma)[: chain.num_kernels].float()
        self.theta = torch.nn.Parameter(torch.zeros(chain.num_kernels, 2))

    def forward(self, state, timestep, condition=None):
        step = (timestep.reshape(-1, 1).double() - self.labels).abs().argmin(1).clamp(max=len(self.gain) - 1)
        return self.prior(state, timestep) + self.theta[step] / self.gain[step, None]


class ExactValue:
    def __init__(self, task):
        self.task = task

    def of_paths(self, data, step, path, group=None):
        return exact(self.task, data / self.task.gain[step, None], step).float()


def forward_kl(task, count, slope=1.0):
    """The forward KL of a population of ``count`` prior paths, with a movable policy and the exact soft value."""
    config = TrainConfig(soft_value_updates=1, forward_rows=500, population_size=count)
    trainer = Trainer(task.prior(), task.energy, config, policy=Shift(task), progress=False)
    value: Any = ExactValue(task)
    state, generator = trainer.state, trainer.state.noise.generator
    population = importance_population(state.energies, count, config.alpha, generator, state.log.bar)
    forward = ForwardKL(state.prior, state.wrapped, population, value, config, generator)
    forward.slope *= slope
    return forward, state.wrapped.denoiser.theta


def same(tensor):
    """In place of a gradient scaler's."""
    return tensor


@pytest.mark.parametrize("share", [0.5, 1.0, 2.0])
def test_the_slope_is_what_the_optimal_drift_leaves_of_a_shift(task, share):
    """A shift of 1/share times the optimal drift has slope ``share``, at most 1: closed form, within 4 standard errors of twelve
    populations at each step (p < 1e-3 in all)."""
    slopes = []
    for seed in range(12):
        forward, theta = forward_kl(task, 2000)
        forward.generator.manual_seed(seed)
        with torch.no_grad():
            theta.copy_((task.chain.sigma[:, None] * task.soft_value[0][1:])[: task.chain.num_kernels] / share)
        forward.measure_slope()
        slopes.append(forward.slope)
    found = torch.stack(slopes)
    error = found.std(0) / math.sqrt(len(slopes))
    late = found.mean(0)[3:]  # where there is a drift to speak of
    if share > 1:
        assert (late > 0.99).all()
    else:
        assert ((late - share).abs() < 4 * error[3:] + 0.02).all(), late
    with torch.no_grad():
        theta.copy_(theta.flip(1) * torch.tensor([1.0, -1.0]))  # across the drift: nothing of it is confirmed
    forward.measure_slope()
    assert forward.slope[3:].max() < 0.3


def test_the_forward_rows_learn_the_confirmed_part_of_a_bridged_shift(task):
    """The gradient at zero shift is linear in the slope, on the same draws to 1e-5."""

    def gradient(slope):
        forward, theta = forward_kl(task, 500, slope)
        forward.backward(500, same)
        return theta.grad

    whole = gradient(1.0)
    assert whole.abs().max() > 0.1
    assert torch.allclose(gradient(0.5), 0.5 * whole, atol=1e-5)


@pytest.mark.parametrize("factor", [1.0, 0.25])
def test_forward_rows_give_the_forward_kl_gradient(task, factor):
    """Each component of dKL(p*|policy)/dtheta_k, closed form theta_k - sigma_k grad V_{k+1}/alpha, within 5 standard errors of 40
    calls of 500 rows (p < 1e-4 in all)."""
    forward, theta = forward_kl(task, 8000)
    with torch.no_grad():
        theta += 0.1
    found = []
    for _ in range(40):
        theta.grad = None
        forward.backward(500, same, factor)
        found.append(theta.grad.clone())
    chain = task.chain
    closed = theta.detach() - (chain.sigma[:, None] * task.soft_value[0][1:])[: chain.num_kernels].float()
    gradient = torch.stack(found)
    error = gradient.std(0) / math.sqrt(len(found))
    # The population itself is a sample: its own weighted mean of what the rows average is off by about 1/sqrt(8000).
    assert ((gradient.mean(0) - factor * closed).abs() < 5 * error + 0.03 * factor).all()
    assert (closed.abs() > 0.1).any(), "a gradient that is zero everywhere would prove nothing"


def test_the_returned_weights_are_the_running_average(task):
    config = TrainConfig(warm_start="none", behavior={"on_policy": 1.0}, updates=6, batch_size=16, ema_decay=0.6)
    trainer = Trainer(task.prior(), task.energy, config, policy=Shift(task), progress=False)
    optimization, seen = trainer.state.optimization, []
    step = optimization.step

    def noted(bound):
        before = [weight.clone() for weight in optimization.weights]
        nats = step(bound)
        seen.append((before, [weight.clone() for weight in optimization.weights]))
        return nats

    optimization.step = noted
    result = trainer.train()
    average = seen[0][0]
    for taken, (_, after) in enumerate(seen, 1):
        decay = min(0.6, taken / (taken + 9))
        average = [decay * old + (1 - decay) * new for old, new in zip(average, after, strict=True)]
    ended = [weight.detach() for weight in result.policy.parameters() if weight.requires_grad]
    for ours, theirs, last in zip(ended, average, seen[-1][1], strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)
        assert not torch.allclose(ours, last, atol=1e-6)


def test_half_precision_trains_with_a_scaled_gradient():
    """float16 autocast on the CPU: overflowing steps are left out, the others move the policy, log-ratios stay float32."""
    from tiltune.samplers.denoiser import DiffusersDenoiser
    from tiltune.samplers.prior import Prior
    from tiltune.samplers.schedulers.brownian import brownian_chain

    network = MLPDenoiser(width=16, depth=1, fourier_features=4)
    torch.nn.init.normal_(network.outward.weight, std=0.1)
    prior = Prior(DiffusersDenoiser(network, autocast=torch.float16), brownian_chain(4), (2,))
    config = TrainConfig(warm_start="none", behavior={"on_policy": 1.0}, updates=12, batch_size=64, learning_rate=1e-2)
    trainer = Trainer(prior, lambda x: x[:, 0], config, progress=False)
    assert trainer.state.optimization.scaler.is_enabled()
    result = trainer.train()
    moved = [not torch.equal(a, b) for a, b in zip(network.parameters(), result.policy.parameters(), strict=True)]
    assert all(torch.isfinite(weight).all() for weight in result.policy.parameters()) and any(moved)


def test_a_trainer_trains_once(task):
    trainer = Trainer(
        task.prior(),
        task.energy,
        TrainConfig(warm_start="none", updates=0, population_size=8),
        policy=Shift(task),
        progress=False,
    )
    trainer.train()
    with pytest.raises(ValueError, match="make a new one"):
        trainer.train()


def test_a_few_huge_penalties_do_not_fill_the_scale_that_is_regressed_on():
    """1% of the paths at 1e20: the others keep most of the spread. Forbidden ones count as the worst that has an energy."""
    energy = torch.linspace(0, 3, 1000)
    usual, spread = standardized(Population(Trajectories(torch.zeros(2, 1000, 1), energy=energy)), 1.0)
    energy[::100] = 1e20
    reward, wide = standardized(Population(Trajectories(torch.zeros(2, 1000, 1), energy=energy)), 1.0)
    assert wide < 5 * spread and reward.isfinite().all()
    ordinary = torch.ones(1000, dtype=torch.bool)
    ordinary[::100] = False
    assert (reward[ordinary].max() - reward[ordinary].min()) * wide.item() == pytest.approx(3.0, abs=0.02)
    energy[::100] = math.inf
    forbidden, _ = standardized(Population(Trajectories(torch.zeros(2, 1000, 1), energy=energy)), 1.0)
    assert torch.allclose(forbidden[::100], forbidden[ordinary].min()) and usual.std() == pytest.approx(1.0, abs=1e-5)
