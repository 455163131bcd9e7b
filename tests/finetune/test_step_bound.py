"""Steps in nats: their measure against a closed form, and what is left of a step that is too long, or of no use at all."""

import math

import pytest
import torch
from diffusers import DDPMScheduler
from torch import nn

from tiltune.finetune.learning.step_bound import GROWTH, ROWS, StepBound
from tiltune.samplers import denoiser
from tiltune.samplers.denoiser import ResidualDenoiser
from tiltune.samplers.mlp import MLPDenoiser
from tiltune.samplers.rollout import rollout
from tiltune.samplers.schedulers.dispatch import chain_from_scheduler
from tiltune.samplers.trajectory import Trajectories
from toys.linear_gaussian import LinearGaussian

VP = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction", "clip_sample": False}
LIMIT = 0.05  # nats


@pytest.fixture(scope="module")
def task():
    chain = chain_from_scheduler(DDPMScheduler(variance_type="fixed_large", **VP), 8)
    return LinearGaussian(chain, torch.zeros(2, dtype=torch.float64), torch.tensor([1.0, -0.5], dtype=torch.float64))


@pytest.fixture(scope="module")
def states(task):
    return rollout(task.prior(), None, 200, torch.Generator().manual_seed(0)).states


class Moved(nn.Module):
    """The prior, its output moved by a constant [2]."""

    def __init__(self, prior):
        super().__init__()
        self.prior = prior
        self.move = nn.Parameter(torch.zeros(2))

    def forward(self, state, timestep, condition=None):
        return self.prior(state, timestep) + self.move


def nonlinear(prior):
    network = MLPDenoiser(width=16, depth=2, fourier_features=4)
    generator = torch.Generator().manual_seed(1)
    for parameter in network.parameters():
        parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return ResidualDenoiser(prior.denoiser, network)


def bound_of(task, policy, states):
    bound = StepBound(task.prior(), policy, lambda value: value)
    bound.look_at(Trajectories(states), torch.Generator().manual_seed(2))
    bound.begin()
    return bound


def trained(policy):
    return [weight.detach() for weight in policy.parameters() if weight.requires_grad]


def copies(policy):
    return [weight.clone() for weight in trained(policy)]


@torch.no_grad()
def step(policy, size, seed=3):
    """Move every weight by ``size``, up or down: what Adam does with a first gradient. Returns the weights before."""
    generator = torch.Generator().manual_seed(seed)
    before = copies(policy)
    for weight in trained(policy):
        weight += size * torch.randn(weight.shape, generator=generator).sign()
    return before


@torch.no_grad()
def adam(policy, size, states, task):
    """A step of torch's Adam at the learning rate ``size``, on any loss."""
    with torch.enable_grad():
        optimizer = torch.optim.Adam(policy.parameters(), size)
        before = copies(policy)
        policy(states[3], task.chain.timestep(torch.full((200,), 3), states[3])).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return before


def moved_by(task, policy, before, states):
    """KL(before || after) over paths from scratch, nats: the kernels' means in float64 on all ``states``, every step."""
    chain, after, total = task.chain, copies(policy), 0.0
    for k in range(chain.num_kernels):
        means = []
        for weights in (before, after):
            for own, weight in zip(trained(policy), weights, strict=True):
                own.copy_(weight)
            with torch.no_grad():
                output = policy(states[k], chain.timestep(torch.full((states.shape[1],), k), states[k])).double()
            clean = chain.p[k] * states[k].double() + chain.q[k] * output
            means.append(chain.c[k] * states[k].double() + chain.d[k] * clean + chain.e[k] * output)
        total += 0.5 * ((means[1] - means[0]) / chain.sigma[k]).square().sum(1).mean().item()
    for own, weight in zip(trained(policy), after, strict=True):
        own.copy_(weight)
    return total


class Rounded(Moved):
    """Its output, 1 and what moved it, is off by a share ``rounding``, up or down, as the weights happen to be."""

    def __init__(self, prior, rounding):
        super().__init__(prior)
        self.rounding = rounding

    def forward(self, state, timestep, condition=None):
        output = 1 + super().forward(state, timestep)
        bits = torch.Generator().manual_seed(int.from_bytes(self.move.detach().numpy().tobytes(), "little") % 2**63)
        return output * (1 + self.rounding * torch.randn(output.shape, generator=bits).sign())


@pytest.mark.parametrize(("rounding", "taken"), [(2.0**-20, True), (0.5, False)])
def test_a_step_that_moves_by_rounding_alone_is_taken(task, states, rounding, taken):
    """No length brings it below the limit. Of 16,000 numbers through 860 million weights it was 9e-5 nats, where the schedule
    began at 1.6e-5. The control: what is more than small is not taken."""
    policy = Rounded(task.prior().denoiser, rounding)
    bound = bound_of(task, policy, states)
    before = step(policy, 1e-6)
    assert (bound.shorten(before, trained(policy), 1e-20) > 0) is taken
    assert torch.equal(before[0], trained(policy)[0]) is not taken


def test_a_large_network_sees_few_states_at_once(task, states, monkeypatch):
    """The nats are those of all states at once; without the split sixteen of Stable Diffusion's, both halves, take its memory."""
    at_once, nats = [], []
    for rows in (100, 3):
        monkeypatch.setattr(denoiser, "rows_at_once", lambda shape, device, rows=rows: rows)
        policy = nonlinear(task.prior())
        policy.register_forward_pre_hook(lambda _, inputs: at_once.append(len(inputs[0])))
        bound = bound_of(task, policy, states)
        nats.append(bound.shorten(step(policy, 1e-3), trained(policy), math.inf))
    assert nats[1] == pytest.approx(nats[0], rel=1e-4) and nats[0] > 0
    assert at_once == 2 * [ROWS] + 2 * (ROWS // 3 * [3] + [ROWS % 3])


def test_a_constant_shift_has_the_nats_of_its_closed_form(task, states):
    """½ Σ_k |(d_k q_k + e_k) Δ / sigma_k|²: each draw of rows is within a half of it, their mean within 4 standard errors."""
    policy = Moved(task.prior().denoiser)
    bound, chain = bound_of(task, policy, states), task.chain
    move = torch.tensor([0.03, -0.02], dtype=torch.float64)
    per_output = (chain.d * chain.q + chain.e) / chain.sigma
    closed = 0.5 * (per_output[: chain.num_kernels].square().sum() * move.square().sum()).item()
    before = copies(policy)
    with torch.no_grad():
        policy.move += move.float()
    assert bound.shorten(before, trained(policy), math.inf) > 0
    # The next step counts from there: nothing moved, no nats.
    assert bound.shorten(copies(policy), trained(policy), math.inf) == 0.0
    after, found = copies(policy), []
    for seed in range(200):
        for weights in (before, after):
            for own, weight in zip(trained(policy), weights, strict=True):
                own.copy_(weight)
            if weights is before:
                bound.look_at(Trajectories(states), torch.Generator().manual_seed(seed))
                bound.begin()
        found.append(bound.shorten(before, trained(policy), math.inf))
    found = torch.tensor(found, dtype=torch.float64)
    assert 0.5 * closed < found.min() and found.max() < 1.5 * closed
    assert abs(found.mean() - closed) < 4 * found.std() / math.sqrt(len(found)) < 0.05 * closed


@pytest.mark.parametrize("times", [100.0, 1e3])
def test_a_step_that_is_too_long_is_shortened_in_its_own_direction(task, states, times):
    """A network of three layers at 100 and 1000 times a fair rate. Without the bound the same step is fifteen limits long, or
    thousands of them."""
    policy = nonlinear(task.prior())
    bound = bound_of(task, policy, states)
    before = step(policy, 1e-3 * times)
    full = copies(policy)
    unbounded = moved_by(task, policy, before, states)
    assert unbounded > (15 if times == 100 else 2000) * LIMIT
    nats = bound.shorten(before, trained(policy), LIMIT)
    assert 0.1 * LIMIT < nats <= LIMIT
    assert 0 < bound.share < 1
    for old, new, taken in zip(before, full, trained(policy), strict=True):
        assert torch.allclose(taken - old, bound.share * (new - old), atol=1e-6)
    # The rows that it is measured on say what all states do: within a factor 2.
    assert 0.5 * nats < moved_by(task, policy, before, states) < 2 * nats


def test_steps_of_adam_stay_within_the_limit_and_the_share_is_remembered(task, states):
    policy = nonlinear(task.prior())
    bound = bound_of(task, policy, states)
    shares = []
    for _ in range(5):
        before = adam(policy, 1.0, states, task)
        assert 0 < bound.shorten(before, trained(policy), LIMIT) <= LIMIT
        shares.append(bound.share)
    assert max(shares) < 0.1
    before = adam(policy, 1.0, states, task)
    assert moved_by(task, policy, before, states) > 100 * LIMIT  # the control: the same step without the bound


def test_a_step_within_the_limit_is_left_alone(task, states):
    """Bit for bit; a tenth of the limit shows that it is the limit which decides."""
    policy = nonlinear(task.prior())
    bound = bound_of(task, policy, states)
    before = step(policy, 1e-4)
    full = copies(policy)
    nats = bound.shorten(before, trained(policy), math.inf)
    assert all(torch.equal(a, b) for a, b in zip(full, trained(policy), strict=True))
    assert nats > 0 and bound.share == 1.0
    for own, weight in zip(trained(policy), before, strict=True):
        own.copy_(weight)
    bound.begin()
    for own, weight in zip(trained(policy), full, strict=True):
        own.copy_(weight)
    assert bound.shorten(before, trained(policy), nats) == nats
    assert all(torch.equal(a, b) for a, b in zip(full, trained(policy), strict=True))
    for own, weight in zip(trained(policy), before, strict=True):
        own.copy_(weight)
    bound.begin()
    for own, weight in zip(trained(policy), full, strict=True):
        own.copy_(weight)
    assert bound.shorten(before, trained(policy), 0.1 * nats) <= 0.1 * nats
    assert not any(torch.equal(a, b) for a, b in zip(full, trained(policy), strict=True))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_to_no_number_is_not_taken(task, states, value):
    """It says nothing of how long the next one may be, which is taken as it would have been."""
    policy = nonlinear(task.prior())
    bound = bound_of(task, policy, states)
    before = step(policy, 1e-4)
    with torch.no_grad():
        trained(policy)[-1].fill_(value)
    assert bound.shorten(before, trained(policy), LIMIT) == 0.0
    assert all(torch.equal(a, b) for a, b in zip(before, trained(policy), strict=True))
    before = step(policy, 1e-4)
    full = copies(policy)
    assert bound.shorten(before, trained(policy), math.inf) > 0
    assert all(torch.equal(a, b) for a, b in zip(full, trained(policy), strict=True))


def test_the_share_grows_again(task, states):
    """After one step that was far too long, steps within the limit are taken whole again, 5% more of them each time."""
    policy = nonlinear(task.prior())
    bound = bound_of(task, policy, states)
    bound.shorten(step(policy, 0.3), trained(policy), LIMIT)
    low = bound.share
    assert low < 0.5
    needed = math.ceil(math.log(1 / low) / math.log(GROWTH))
    for taken in range(1, needed + 1):
        bound.shorten(step(policy, 1e-6, seed=taken), trained(policy), LIMIT)
        assert bound.share == pytest.approx(min(1.0, low * GROWTH**taken))
    before = step(policy, 1e-6)
    full = copies(policy)
    bound.shorten(before, trained(policy), LIMIT)
    assert all(torch.equal(a, b) for a, b in zip(full, trained(policy), strict=True))


def test_a_restored_bound_goes_on_as_the_first(task, states):
    """The same share, rows and nats to the last bit; other rows give other nats."""
    found = []
    for kind in ("first", "restored", "other rows"):
        policy = nonlinear(task.prior())
        bound = bound_of(task, policy, states)
        bound.shorten(step(policy, 0.3), trained(policy), LIMIT)
        if kind == "restored":
            kept, bound = bound.state_dict(), StepBound(task.prior(), policy, lambda value: value)
            bound.load_state_dict(kept)
        if kind == "other rows":
            bound.look_at(Trajectories(states), torch.Generator().manual_seed(9))
        bound.begin()
        nats = bound.shorten(step(policy, 0.3, seed=4), trained(policy), LIMIT)
        found.append((nats, bound.share, copies(policy)))
    first, restored, other = found
    assert first[:2] == restored[:2] and all(torch.equal(a, b) for a, b in zip(first[2], restored[2], strict=True))
    assert first[0] != other[0]


def test_several_processes_share_one_length(task, states):
    """What is compared with the limit is the mean over the processes: another one whose nats are ten times ours halves and
    more what we take."""
    shares = []
    for agreed in (lambda value: value, lambda value: 0.5 * (value + 10 * value)):
        policy = nonlinear(task.prior())
        bound = StepBound(task.prior(), policy, agreed)
        bound.look_at(Trajectories(states), torch.Generator().manual_seed(2))
        bound.begin()
        assert bound.shorten(step(policy, 0.3), trained(policy), LIMIT) <= LIMIT
        shares.append(bound.share)
    assert shares[1] < 0.6 * shares[0]
