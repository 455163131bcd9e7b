"""The soft value's drift as teacher: targets against closed forms, and what finds out what an estimate is worth."""

import math
from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import nn

from tiltune.finetune.config.train import TrainConfig
from tiltune.finetune.learning.calibration import Calibration, calibrate
from tiltune.finetune.learning.path_data import PathData
from tiltune.finetune.learning.soft_value import SoftValue, fit_soft_value
from tiltune.finetune.learning.step_bound import StepBound
from tiltune.finetune.learning.trainer import Trainer
from tiltune.finetune.learning.trust import Trust
from tiltune.finetune.learning.value_drift import ValueDrift, refuse_without_gradient
from tiltune.finetune.learning.value_network import ValueNetwork
from tiltune.finetune.populations.held_out import HeldOut
from tiltune.finetune.populations.population import Population
from tiltune.samplers.denoiser import ResidualDenoiser, estimated_data, evaluate
from tiltune.samplers.mlp import MLPDenoiser
from tiltune.samplers.prior import Prior
from tiltune.samplers.rollout import rollout
from tiltune.samplers.schedulers.dispatch import chain_from_scheduler
from toys.linear_gaussian import LinearGaussian

VP = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}
STEPS = 8


@pytest.fixture(scope="module")
def task():
    chain = chain_from_scheduler(DDPMScheduler(variance_type="fixed_large", clip_sample=False, **VP), STEPS)
    return LinearGaussian(chain, torch.zeros(2, dtype=torch.float64), torch.tensor([1.0, -0.5], dtype=torch.float64))


@pytest.fixture(scope="module")
def population(task):
    drawn = rollout(task.prior(), None, 4000, torch.Generator().manual_seed(0))
    return Population(drawn.with_(energy=task.energy(drawn.terminal)))


@pytest.fixture(scope="module")
def clipped():
    return chain_from_scheduler(DDPMScheduler(variance_type="fixed_large", clip_sample=True, **VP), STEPS)


@pytest.fixture(scope="module")
def clipped_ddim():
    """Beyond the bound its mean follows the output itself, the other way."""
    return chain_from_scheduler(DDIMScheduler(clip_sample=True, **VP), STEPS, eta=1.0)


def exact(task, state, step):
    """log h_k(s) + log Z in closed form, float32, with a graph."""
    g, h = (part.float() for part in task.soft_value)
    return (state * g[step]).sum(1) + h[step]


def seen(task, state, step):
    """x_hat = m + gain (s - signal m) at these states; a terminal state is what it is."""
    gain = torch.cat([task.gain, torch.ones(1, dtype=torch.float64)]).float()
    return gain[step, None] * state  # the mean is 0


def state_of(task, data, step):
    """The states whose x_hat this is."""
    return data / seen(task, torch.ones_like(data), step)


class Estimates(SoftValue):
    """Two estimates of log h that are given, functions (state, step, path) → [N], in place of the networks'."""

    def __init__(self, task, first, second):
        self.task, self.both, self.times = task, (first, second), 1.0

    def estimates(self, data, step, path, times, group=None):
        assert times == 1.0
        return torch.stack([one(state_of(self.task, data, step), step, path) for one in self.both], 1)


def truth(task, sign=1.0):
    return lambda state, step, path: sign * exact(task, state, step)


def noise(seed):
    """A direction of its own for each path, that has nothing to do with its energy."""
    directions = torch.randn(4000, 2, generator=torch.Generator().manual_seed(seed))

    def estimate(state, step, path):
        return (state * directions[torch.zeros(len(state), dtype=torch.long) if path is None else path]).sum(1)

    return estimate


def even(first=1.0, second=0.0):
    """A calibration that takes the estimates at these factors everywhere, and no offset."""
    factor = torch.tensor([[first, second]]).repeat(STEPS, 1)
    return Calibration(factor, torch.zeros(STEPS, 1), torch.zeros(STEPS))


def calibrated(task, population, value):
    return calibrate(value, PathData(task.prior(), population.trajectories), population, task.alpha)


def drift_of(task, population, first, second, calibration=None, seed=3):
    value = first if second is None else Estimates(task, first, second)
    return ValueDrift(task.prior(), population, value, calibration or even(), task.alpha, torch.Generator().manual_seed(seed))


def target_of(drift, state, following, step, prior_output):
    """Of next states of the tilted law, which count in full."""
    return drift.target(state, following, step, prior_output, None, torch.ones_like(step) > 0)


def best_shift(task):
    """[num_kernels, 2]: sigma_k grad log h_{k+1}, the closed form."""
    kernels = task.chain.num_kernels
    return (task.chain.sigma[:, None] * task.soft_value[0][1:])[:kernels]


# --- clipping -------------------------------------------------------------------------------------------------------------


def outputs_for(chain, state, step, clean):
    """The outputs at which the unclipped x_hat is ``clean``."""
    row = chain.kernel.row(step, state)
    return (clean - row.p * state) / row.q


def rows(seed=0, count=400, kernels=STEPS - 1):
    generator = torch.Generator().manual_seed(seed)
    state = torch.randn(count, 3, generator=generator)
    step = torch.randint(kernels, (count,), generator=generator)
    return state, step, generator


def test_straight_through_the_clipping_the_value_stays_and_a_gradient_comes(clipped):
    """x_hat is beyond the bound by .5: values equal to rounding, the gradient zero with the clipping and d q / sigma without."""
    state, step, _ = rows()
    beyond = outputs_for(clipped, state, step, torch.full_like(state, 1.5))
    prior_output = outputs_for(clipped, state, step, torch.full_like(state, 0.3))
    found = {}
    for straight in (False, True):
        output = beyond.clone().requires_grad_(True)
        shift = clipped.kernel.shift(state, step, output, prior_output, straight=straight)
        shift.sum().backward()
        found[straight] = shift.detach(), output.grad
    assert torch.allclose(found[True][0], found[False][0], rtol=1e-5, atol=1e-5)
    assert found[False][1].abs().max() == 0
    row = clipped.kernel.row(step, state)
    assert torch.allclose(found[True][1], (row.d * row.q / row.sigma).expand_as(state), rtol=1e-5)


def test_within_the_bounds_and_without_clipping_straight_changes_nothing(clipped, task):
    """Bit for bit without clipping; the control is the test above."""
    state, step, generator = rows()
    prior_output = torch.randn(state.shape, generator=generator)
    policy_output = prior_output + 0.1 * torch.randn(state.shape, generator=generator)
    both = [task.chain.kernel.shift(state, step, policy_output, prior_output, straight=straight) for straight in (False, True)]
    assert torch.equal(*both)
    inside = [outputs_for(clipped, state, step, clean * torch.ones_like(state)) for clean in (0.2, 0.4)]
    gradients = []
    for straight in (False, True):
        output = inside[0].clone().requires_grad_(True)
        clipped.kernel.shift(state, step, output, inside[1], straight=straight).sum().backward()
        gradients.append(output.grad)
    assert torch.allclose(*gradients, rtol=1e-6)


def test_a_reachable_target_is_one_that_x_hat_can_take(clipped):
    """The policy whose x_hat moves by what was asked for has that very shift; beyond the bound, that of an x_hat at the bound."""
    state, step, generator = rows(seed=1)
    row = clipped.kernel.row(step, state)
    here = 0.9 * (2 * torch.rand(state.shape, generator=generator) - 1)
    there = 3.0 * (2 * torch.rand(state.shape, generator=generator) - 1)
    prior_output = outputs_for(clipped, state, step, here)
    asked = row.d / row.sigma * (there - here)
    reachable = clipped.kernel.reachable(state, step, prior_output, asked)
    policy_output = outputs_for(clipped, state, step, there.clamp(-1, 1))
    reached = clipped.kernel.shift(state, step, policy_output, prior_output)
    assert torch.allclose(reachable, reached, rtol=1e-3, atol=1e-4)
    inside = there.abs() < 1
    assert torch.allclose(reachable[inside], asked[inside], rtol=1e-3, atol=1e-4)
    # The control: what was asked for beyond the bound is no policy's shift.
    assert ((asked - reachable).abs() > 0.1)[there.abs() > 2].float().mean() > 0.9
    assert 0.2 < inside.float().mean() < 0.5


@pytest.mark.parametrize("name", ["clipped", "clipped_ddim"])
def test_reachable_is_the_nearest_shift_of_all_outputs_between_the_bounds(name, request):
    """Brute force: 201 values of x_hat between the bounds, and the prior's own, which may lie beyond them."""
    chain = request.getfixturevalue(name)
    state, step, generator = rows(seed=2, kernels=chain.num_kernels)
    prior_output = outputs_for(chain, state, step, 3.0 * (2 * torch.rand(state.shape, generator=generator) - 1))
    size = (chain.sensitivity.float()[step][:, None] / chain.kernel.row(step, state).q).abs()
    asked = size * torch.randn(state.shape, generator=generator)
    candidates = [chain.kernel.shift(state, step, prior_output, prior_output)]
    for clean in torch.linspace(-1, 1, 201):
        output = outputs_for(chain, state, step, clean * torch.ones_like(state))
        candidates.append(chain.kernel.shift(state, step, output, prior_output))
    lowest, highest = torch.stack(candidates).aminmax(dim=0)
    expected = asked.clamp(lowest, highest)
    assert torch.allclose(chain.kernel.reachable(state, step, prior_output, asked), expected, rtol=1e-3, atol=1e-4)
    # Not all is reachable, and not nothing.
    changed = ((expected - asked).abs() > 0.1 * size).float().mean()
    assert 0.1 < changed < 0.9


@pytest.mark.parametrize("held", [True, False])
def test_on_a_clipped_ddim_chain_the_target_is_found_from_beyond_the_bound(clipped_ddim, held):
    """Outputs, free for each row, descend to a target from an x_hat of 1.5: they reach it. Control: as if there were no
    clipping (``held`` False) they run away from it."""
    chain = clipped_ddim
    state, step, generator = rows(seed=3, kernels=chain.num_kernels)
    prior_output = outputs_for(chain, state, step, torch.full_like(state, 1.5))
    size = chain.sensitivity.float()[step][:, None]
    target = chain.kernel.reachable(state, step, prior_output, 0.2 * size * torch.randn(state.shape, generator=generator))
    output = prior_output.clone().requires_grad_(True)

    def loss():
        shift = chain.kernel.shift(state, step, output, prior_output, straight=True)
        if not held:
            loose = replace(chain, clip=None).kernel.shift(state, step, output, prior_output)
            shift = loose + (shift - loose).detach()
        return (0.5 * ((shift - target) / size) ** 2).sum()

    first = loss().item()
    for _ in range(2000):
        (gradient,) = torch.autograd.grad(loss(), output)
        output.data -= 0.2 * gradient
    last = loss().item()
    assert last < 0.05 * first if held else not last <= 100 * first


def test_without_clipping_every_target_is_reachable(task):
    state, step, generator = rows()
    shift = 100 * torch.randn(state.shape, generator=generator)
    assert torch.equal(task.chain.kernel.reachable(state, step, torch.zeros_like(state), shift), shift)


# --- targets and calibration ------------------------------------------------------------------------------------------------


def unweighed(drift):
    """All of its rows count as the tilted law's: where log h is linear, every next state has the same target."""
    target = drift.target
    drift.target = lambda *given: target(*given[:5], torch.ones_like(given[5]))
    return drift


def stored(task, population, each=50):
    """(state, next state, step, prior output) of stored paths, ``each`` of every step."""
    step = torch.arange(STEPS - 1).repeat_interleave(each)
    path = torch.arange(len(step))
    state, following = (population.trajectories.states[at, path] for at in (step, step + 1))
    return state, following, step, evaluate(task.prior().denoiser, task.chain, state, step, None)


def test_a_prior_without_a_gradient_is_refused_and_a_residual_one_has_its_own(task):
    """x_hat of a residual policy that serves as a prior has the derivative that finite differences find."""
    prior = task.prior()
    refuse_without_gradient(prior)
    dark = Prior(torch.no_grad()(prior.denoiser), prior.chain, prior.shape)
    with pytest.raises(ValueError, match="has none"):
        refuse_without_gradient(dark)
    network = MLPDenoiser(width=8, depth=1, fourier_features=2)
    residual = Prior(ResidualDenoiser(prior.denoiser, network), prior.chain, prior.shape)
    refuse_without_gradient(residual)
    state, step = torch.zeros(1, 2, requires_grad=True), torch.tensor([4])
    found = torch.autograd.grad(estimated_data(residual.denoiser, prior.chain, state, step, None).sum(), state)[0]
    with torch.no_grad():
        ahead, here = (estimated_data(residual.denoiser, prior.chain, at, step, None) for at in (state + 1e-2, state))
    assert torch.allclose(found, (ahead - here) / 1e-2, rtol=1e-3)


def test_the_exact_value_gives_the_optimal_policy(task, population):
    """Target = the optimal kernel's shift at states of every step, to 1e-5; with the other factor it is the other estimate's."""
    state, following, step, prior_output = stored(task, population)
    optimal = task.chain.kernel.shift(state, step, evaluate(task.policy(), task.chain, state, step, None), prior_output)
    assert optimal.abs().max() > 0.3
    assert torch.allclose(optimal, best_shift(task)[step].float(), atol=1e-5)
    for sign in (1.0, -1.0):
        drift = drift_of(task, population, truth(task), truth(task, -1.0), even(sign == 1.0, sign == -1.0))
        assert torch.allclose(target_of(drift, state, following, step, prior_output), sign * optimal, atol=1e-5)


@pytest.mark.parametrize("weighed", [True, False])
def test_of_prior_paths_the_weighed_targets_have_the_optimal_mean(task, weighed):
    """log h = a quadratic of the next state, whose optimal shift is known: the mean over 40,000 next states of the prior, weighed
    by h(next) / h(state), within 5 standard errors (p < 1e-5); unweighed it is off by many."""
    count, k, curve = 40_000, 3, 0.8
    slope = torch.tensor([1.0, -0.5])
    prior, generator = task.prior(), torch.Generator().manual_seed(11)
    state = torch.tensor([[0.4, -0.2]]).repeat(count, 1)
    step = torch.full((count,), k)
    output = evaluate(prior.denoiser, task.chain, state, step, None)
    mean, sigma = task.chain.kernel.mean(state, step, output)[0], task.chain.sigma[k].item()

    def log_h(at, when, path):
        """Of the next state -curve/2 |s|² + slope s; of this one, its log mean over the kernel, in closed form."""
        ahead = (at @ slope) - 0.5 * curve * at.square().sum(1)
        spread = 1 / (1 / sigma**2 + curve)
        pull = mean / sigma**2 + slope
        here = 0.5 * spread * pull.square().sum() - 0.5 * mean.square().sum() / sigma**2 + math.log(spread / sigma**2)
        return torch.where(when == k + 1, ahead, here)

    following = mean + sigma * torch.randn(count, 2, generator=generator)
    drift = drift_of(task, Population(rollout(prior, None, 4, generator).with_(energy=torch.zeros(4))), log_h, log_h)
    found = drift.target(state, following, step, output, None, torch.full((count,), not weighed))
    spread = 1 / (1 / sigma**2 + curve)
    closed = (spread * (mean / sigma**2 + slope) - mean) / sigma
    off = (found.mean(0) - closed).abs() / (found.std(0) / math.sqrt(count))
    assert off.max() < 5 if weighed else off.max() > 20


def test_a_weight_is_cut_where_one_next_state_would_decide(task, population):
    """h(next) / h(state) is e^3 and e^-1: the first counts 4 times and not 20 times, the second as it is; of the tilted law both
    count once."""
    state, following, step, output = (part[:2] for part in stored(task, population))
    ratio = torch.tensor([3.0, -1.0])

    def log_h(at, when, path):
        return exact(task, at, when) + torch.where(
            when == step + 1, ratio + exact(task, state, step) - exact(task, at, when).detach(), 0
        )

    drift = drift_of(task, population, log_h, log_h)
    plain, weighed = (drift.target(state, following, step, output, None, torch.tensor([tilted] * 2)) for tilted in (True, False))
    assert torch.allclose(plain, best_shift(task)[step].float(), atol=1e-5)
    assert torch.allclose(weighed, torch.tensor([[4.0], [math.exp(-1)]]) * plain, rtol=1e-4)


def test_two_right_estimates_are_mixed_to_the_truth(task, population):
    """Their factors sum to 1 within 4 standard errors of a slope of log h, and the nats are those of KL(tilted || prior) of
    states in closed form, ½ |g|² var(s_k), likewise."""
    found = calibrated(task, population, Estimates(task, truth(task), truth(task)))
    g = task.soft_value[0][1:STEPS].float()
    states = population.trajectories.states[1:STEPS]
    closed = 0.5 * torch.stack([torch.einsum("i,ij,j->", one, state.T.cov(), one) for one, state in zip(g, states, strict=True)])
    effective = 0.3 * 4000
    error = (2 * closed * effective).rsqrt()
    assert ((found.factor[1:STEPS].sum(1) - 1).abs() < 4 * error).all()
    assert torch.allclose(found.factor[:, 0], found.factor[:, 1], atol=1e-4)
    assert ((found.nats[1:STEPS] - closed).abs() < 4 * (2 * closed / effective).sqrt() + 0.01).all()
    assert closed[-1] > 0.4


def test_an_estimate_of_nothing_is_not_followed(task, population):
    """Beside the truth, and two of noise: factors of less than .1, no nats. Opposite estimates: the right one is followed."""
    found = calibrated(task, population, Estimates(task, truth(task), noise(4)))
    late = found.factor[4:STEPS]
    assert (late[:, 0] > 0.8).all() and (late[:, 1].abs() < 0.1).all()
    found = calibrated(task, population, Estimates(task, noise(5), noise(4)))
    assert found.factor[2:].abs().max() < 0.15 and found.nats[1:].abs().max() < 0.05
    found = calibrated(task, population, Estimates(task, truth(task), truth(task, -1.0)))
    along, against = found.factor[4:STEPS].T
    assert (along - against > 0.8).all()


# --- cross-fitting --------------------------------------------------------------------------------------------------------


class Memory(nn.Module):
    """A network that knows by heart the energies of the paths of its half, by their states; of others it says what is nearest."""

    def __init__(self, task, population, half):
        super().__init__()
        self.task, self.states, self.reward = task, population.trajectories.states[:, half], -population.energy[half]

    def estimates(self, data, step, times, group=None):
        k = int(step[0])  # one step at a time, as `calibrate` asks
        nearest = torch.cdist(state_of(self.task, data, step), self.states[k]).argmin(1)
        return self.reward[nearest][:, None].expand(-1, 2)


@pytest.mark.parametrize("by_heart", [False, True])
def test_what_is_learned_by_heart_is_worth_nothing(task, population, by_heart):
    """In an early state, which says little of the end: judged by the other half, memory has hardly any nats. Were it judged by
    itself, it would have most of those that there are at the end."""
    half = torch.arange(4000) % 2
    networks = [Memory(task, population, half == side) for side in (0, 1)]
    found = calibrated(task, population, SoftValue((networks[0], networks[1]), 1 - half if by_heart else half))
    whole = 0.5 * torch.tensor([1.0, -0.5]).square().sum()
    assert found.nats[1] > 0.8 * whole if by_heart else found.nats[1] < 0.15 * whole


# --- learning -------------------------------------------------------------------------------------------------------------


class Shift(nn.Module):
    """The prior with every kernel's mean moved by a constant of theta_k standard deviations; theta [num_kernels, 2]."""

    def __init__(self, task):
        super().__init__()
        chain = task.chain
        self.prior, self.labels = task.prior().denoiser, chain.timesteps
        self.gain = ((chain.d * chain.q + chain.e) / chain.sigma)[: chain.num_kernels].float()
        self.theta = nn.Parameter(torch.zeros(chain.num_kernels, 2))

    def forward(self, state, timestep, condition=None):
        step = (timestep.reshape(-1, 1).double() - self.labels).abs().argmin(1).clamp(max=len(self.gain) - 1)
        return self.prior(state, timestep) + self.theta[step] / self.gain[step, None]


@pytest.mark.parametrize("chunk", [2048, 37])
def test_the_gradient_is_that_of_the_plain_formula(task, population, chunk):
    """Σ_k E ½ |theta_k - delta_k|² has the gradient theta_k - delta_k, in chunks too; ``scale`` multiplies it.

    To .5%: the strides through 4000 rows give a step one row more or less than its share.
    """
    policy = Shift(task)
    with torch.no_grad():
        policy.theta += 0.1
    miss = policy.theta.detach() - best_shift(task).float()
    drift = unweighed(drift_of(task, population, truth(task), truth(task, -1.0)))
    drift.chunk = chunk
    drift.laws.renew(task.prior().denoiser, 400)  # of log-ratio 0
    loss = drift.backward(policy, 4000, lambda value: value)
    assert loss.item() == pytest.approx(0.5 * miss.square().sum().item(), rel=5e-3)
    assert torch.allclose(policy.theta.grad, miss, rtol=5e-3)
    gradient, policy.theta.grad = policy.theta.grad, None
    drift.backward(policy, 4000, lambda value: 8 * value)
    assert torch.allclose(policy.theta.grad, 8 * gradient, rtol=1e-2)
    drift.calibration = even(0.0, 1.0)  # the control: towards the opposite
    policy.theta.grad = None
    drift.backward(policy, 4000, lambda value: value)
    assert not torch.allclose(policy.theta.grad, gradient, atol=0.1)


def test_steps_are_of_the_tilted_law_and_of_the_policy(task, population):
    """The mean of the noise that was drawn at each step: the optimal shift of the tilted law's, the policy's own shift of the
    others, within 5 standard errors (p < 1e-5), and off each other's (the control). Both take half of the steps. The
    log-ratios are the policy's on its own steps, 0 on the tilted law's."""
    policy = Shift(task)
    with torch.no_grad():
        policy.theta -= 0.5 * best_shift(task).float()
    laws, kernel = drift_of(task, population, truth(task), truth(task)).laws, task.chain.kernel
    laws.renew(policy, 40_000)
    state, following, step, _, tilted, log_ratio, weight = laws.draw(40_000)
    assert 0.48 < tilted.float().mean() < 0.52
    prior_output = evaluate(task.prior().denoiser, task.chain, state, step, None)
    z = kernel.standardize(following, state, step, prior_output)
    shift = kernel.shift(state, step, evaluate(policy, task.chain, state, step, None), prior_output)
    expected = torch.where(tilted, 0.0, kernel.log_ratio_from_states(z, shift))
    assert torch.allclose(log_ratio, expected.detach(), atol=1e-4)
    assert weight.sum().item() == pytest.approx(task.chain.num_kernels, rel=1e-2)
    best = best_shift(task).float()
    for kind, own, other in ((tilted, best, policy.theta.detach()), (~tilted, policy.theta.detach(), best)):
        for k in range(1, task.chain.num_kernels):
            here = z[kind & (step == k)]
            error = here.std(0) / math.sqrt(min(len(here), 1000))  # paths are drawn more than once
            assert ((here.mean(0) - own[k]).abs() < 5 * error).all()
        assert ((z[kind].mean(0) - other[step[kind]].mean(0)).abs() > 0.1).any()


def held_out_of(task, count=4000, times=1.0):
    """All of so many new prior paths, by their weight at ``times`` the target's temperature."""
    drawn = rollout(task.prior(), None, count, torch.Generator().manual_seed(20))
    paths = Population(drawn.with_(energy=task.energy(drawn.terminal)))
    weight = paths.log_weight(times * task.alpha).double().softmax(0)
    return HeldOut(task.prior(), paths.trajectories, weight, times * task.alpha, times)


class Milder(Estimates):
    """The exact log h, said to be learned at ``times`` the target's temperature: there it is smaller by as much."""

    def __init__(self, task, times):
        super().__init__(task, truth(task), truth(task))
        self.own, self.times = times, times

    def estimates(self, data, step, path, times, group=None):
        return torch.stack([one(state_of(self.task, data, step), step, path) for one in self.both], 1) * times / self.own


@pytest.mark.parametrize(("asked", "expected"), [(1.0, 1.0), (0.5, 2.0), (-1.0, 0.0)])
@pytest.mark.parametrize("learned", [1.0, 0.3])
@pytest.mark.parametrize("times", [1.0, 2.0])
def test_targets_are_rescaled_to_what_the_policys_shift_is_worth(task, population, asked, expected, learned, times):
    """Targets of ``asked`` times the optimal shift get the factor 1/asked, however much of them the policy has learned so far,
    and at whatever temperature they were learned; ones that point away are dropped. To about 4 standard errors (p < 1e-4)."""
    policy = Shift(task)
    with torch.no_grad():
        policy.theta += learned * best_shift(task).float()
    drift = drift_of(task, population, Milder(task, times), None, even(asked))
    drift.trust.share = 0.01
    drift.rescale(policy, held_out_of(task, times=times), lambda sums: sums)
    assert drift.scale == pytest.approx(expected, abs=0.1 / abs(asked))
    assert drift.trust.share == pytest.approx(max(0.01, min(1.0, abs(1 - drift.scale)))), "updates may go as far as they have to"
    state, step = population.trajectories.states[3, :5], torch.full((5,), 3)
    output = task.prior().denoiser(state, task.chain.timestep(step, state))
    scaled = target_of(drift, state, state, step, output)
    assert torch.allclose(scaled, drift.scale * asked * best_shift(task)[3].float().expand_as(scaled), rtol=1e-4, atol=1e-6)


def test_few_paths_leave_the_scale_near_1_and_what_is_no_number_at_1(task, population):
    policy = Shift(task)
    drift = drift_of(task, population, truth(task), truth(task))
    drift.rescale(policy, held_out_of(task, 8), lambda sums: sums)  # a policy at the prior: 0/0
    assert drift.scale == 1.0
    with torch.no_grad():
        policy.theta += best_shift(task).float()
    drift.calibration = even(0.25)
    scales = []
    for count in (8, 4000):
        drift.rescale(policy, held_out_of(task, count), lambda sums: sums)
        scales.append(drift.scale)
    assert scales[0] < 2.0 and scales[1] == 3.0  # 4 is more than there may be
    with torch.no_grad():
        policy.theta[0] = math.nan
    drift.rescale(policy, held_out_of(task, 8), lambda sums: sums)
    assert drift.scale == 1.0


def test_trust_sees_what_the_targets_ask_for_and_what_the_policy_misses(task, population):
    """Weighed as the loss is at that time."""
    policy = Shift(task)
    drift = unweighed(drift_of(task, population, truth(task), truth(task)))
    drift._moves = torch.linspace(0.5, 2.0, len(drift._moves))
    seen = []
    drift.trust.observe = lambda *sides: seen.append(sides)
    nats = {progress: (0.5 * drift.eased(progress)[:, None] * best_shift(task).square()).sum().item() for progress in (0.0, 1.0)}
    assert nats[0.0] < 0.9 * nats[1.0]
    for factor, progress in ((0.0, 0.0), (2.5, 1.0)):
        with torch.no_grad():
            policy.theta.copy_(factor * best_shift(task).float())
        drift.laws.renew(task.prior().denoiser, 80)
        drift.backward(policy, 800, lambda value: 8 * value, progress)
    (asked, missed), (again, far) = seen
    assert asked == missed == pytest.approx(nats[0.0], rel=0.01)
    assert again == pytest.approx(nats[1.0], rel=0.01) and far == pytest.approx(1.5**2 * nats[1.0], rel=0.01)


def test_a_warm_start_takes_no_longer_steps_than_trust_or_the_config_allow(task, population, monkeypatch):
    limits = []
    shorten = StepBound.shorten

    def watched(self, before, weights, limit):
        limits[-1].append(limit)
        return shorten(self, before, weights, limit)

    monkeypatch.setattr(StepBound, "shorten", watched)
    for nats in (1e-3, 1e-4, 10.0):
        limits.append([])
        monkeypatch.setattr(Trust, "nats", nats)
        config = TrainConfig(
            population_size=60, soft_value_updates=2, warm_start="value_drift", warm_start_updates=6, warm_start_rows=16
        )
        Trainer(task.prior(), task.energy, replace(config, updates=0), policy=Shift(task), progress=False).train()
    assert len(limits[0]) == len(limits[1]) == len(limits[2]) > 2
    assert limits[1] == pytest.approx([0.1 * limit for limit in limits[0]])
    assert limits[2] == pytest.approx([1e3 * limit for limit in limits[0]])  # warm_start_step_nats, 1


@pytest.mark.parametrize(("warm_start", "rows"), [("value_drift", 24), ("value_drift", 0), ("tlm", 24)])
def test_updates_learn_beside_the_objective_what_the_warm_start_followed(task, monkeypatch, warm_start, rows):
    """Of the targets of value_drift, at steps of both laws, alpha times the gradient, as reinforce_kl has it; elsewhere never."""
    asked = []
    learn = ValueDrift.backward

    def watched(self, policy, count, scale, progress=1.0):
        asked.append((count, scale(torch.ones(())).item(), progress, len(self.laws.own)))
        return learn(self, policy, count, scale, progress)

    monkeypatch.setattr(ValueDrift, "backward", watched)
    sizes = {"warm_start_updates": 3, "warm_start_rows": 16, "updates": 2, "batch_size": 4, "forward_rows": rows}
    sizes["tempering_ess"] = None
    config = TrainConfig("reinforce_kl", 0.5, population_size=60, soft_value_updates=2, warm_start=warm_start, **sizes)
    trainer = Trainer(task.prior(), task.energy, config, policy=Shift(task), progress=False)
    trainer.train()
    of_updates = [each for each in asked if each[0] == 24]
    assert len(asked) - len(of_updates) == (3 if warm_start == "value_drift" else 0)
    assert of_updates == ([(24, 0.5, 1.0, 35)] * 2 if warm_start == "value_drift" and rows else [])
    assert (trainer.state.preparation.value_drift is None) == (warm_start == "tlm" or not rows)


def test_scale_and_trust_are_kept(task, population):
    drift = drift_of(task, population, truth(task), noise(4))
    drift.scale = 1.5
    drift.trust.observe(2.0, 1.0)
    other = drift_of(task, population, truth(task), noise(4))
    other.load_state_dict(drift.state_dict())
    assert other.scale == 1.5 and other.trust.state_dict() == drift.trust.state_dict()


# --- cumulants ------------------------------------------------------------------------------------------------------------


class Told(ValueNetwork):
    """The network, with the mean and the variance that it is told, in units of its spread."""

    def __init__(self, told, spread):
        super().__init__((2,), STEPS, spread=torch.tensor([spread]))
        self.told = told

    def heads(self, state, step, group=None):
        return torch.stack([torch.zeros(len(state)), *self.told], 1)


def test_mean_and_half_of_the_variance_are_log_h_where_the_energy_is_gaussian(task):
    """-E/alpha of 20000 paths from each of 12 states of 4 steps: m + v/2 is log h up to one constant, within 5 standard errors of
    their moments; without v/2 it is not. Continued to half the temperature they are that of twice the tilt; a linear continuation
    is not."""
    chain, generator = task.chain, torch.Generator().manual_seed(8)
    step = torch.tensor([1, 3, 5, 7]).repeat_interleave(3)
    start = torch.randn(12, 2, generator=generator)
    mean, variance = [], []
    for k, at in zip(step.tolist(), start, strict=True):
        state = at.repeat(20000, 1)
        for step_taken in range(k, chain.num_steps):
            output = evaluate(task.prior().denoiser, chain, state, step_taken, None)
            state = chain.kernel.mean(state, step_taken, output)
            if step_taken < chain.num_kernels:
                state = state + chain.sigma[step_taken].item() * torch.randn(state.shape, generator=generator)
        reward = -task.energy(state) / task.alpha
        mean.append(reward.mean())
        variance.append(reward.var())
    spread, m, v = 1.7, torch.stack(mean), torch.stack(variance)
    offset = 0.6  # of the standardization
    network = Told([(m - offset) / spread, v / spread**2], spread)
    found = network.estimates(start, step)[:, 1].detach() + offset
    closed = exact(task, start, step)
    error = (v / 20000 + 0.5 * v.square() / 20000).sqrt()
    assert ((found - closed).abs() < 5 * error + 1e-4).all()
    assert ((m - closed).abs() > 5 * error + 0.05)[:6].all()
    colder = LinearGaussian(chain, torch.zeros(2, dtype=torch.float64), torch.tensor([2.0, -1.0], dtype=torch.float64))
    continued = network.estimates(start, step, 2.0)[:, 1].detach() + 2 * offset
    assert ((continued - exact(colder, start, step)).abs() < 5 * (4 * v / 20000 + 8 * v.square() / 20000).sqrt() + 1e-4).all()
    assert ((2 * found - exact(colder, start, step)).abs() > 0.1)[:6].all()


def test_the_cumulants_learn_the_optimal_drift(task, population):
    """From 4000 energies, 150 updates: the target of the cumulants alone takes most of the square error out of no drift at all;
    with the energies of other paths it does not."""

    def left(energy):
        shuffled = Population(population.trajectories.with_(energy=energy))
        data = PathData(task.prior(), shuffled.trajectories)
        value = fit_soft_value(shuffled, data, task.alpha, 150, torch.Generator().manual_seed(1))
        drift = drift_of(task, shuffled, value, None, even(0.0, 1.0))
        state, following, step, output = stored(task, population, 100)
        closed = best_shift(task)[step].float()
        return ((target_of(drift, state, following, step, output) - closed).square().sum() / closed.square().sum()).item()

    energy = population.trajectories.energy
    assert left(energy) < 0.3
    assert left(energy[torch.randperm(4000, generator=torch.Generator().manual_seed(2))]) > 0.8


def test_narrow_kernels_count_less_at_first_and_in_full_at_the_end(task, population):
    drift = drift_of(task, population, truth(task), truth(task))
    first, last = drift.eased(0.0), drift.eased(1.0)
    assert torch.equal(last, torch.ones_like(last))
    assert first.min() < 0.9 and first.max() == 1.0  # the control: there is something to ease
    moves = ((task.chain.d * task.chain.q + task.chain.e) / task.chain.sigma)[: task.chain.num_kernels].abs()
    assert first.argmin() == moves.argmax() and (first[moves <= moves.median()] == 1).all()
