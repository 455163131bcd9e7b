"""Prior paths as functions of their noise: the map is the rollout's own, and moves leave the prior's law as it is."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerAncestralDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from tiltune.samplers.chain import Chain
from tiltune.samplers.condition import ConditionTable
from tiltune.samplers.moves import PARTS, Moves
from tiltune.samplers.noise_paths import NoisePaths, crank_nicolson, follow, noise_of
from tiltune.samplers.prior import Prior
from tiltune.samplers.rollout import rollout
from tiltune.samplers.schedulers.brownian import brownian_chain
from tiltune.samplers.schedulers.dispatch import chain_from_scheduler
from tiltune.samplers.trained_steps import with_trained_steps

CHAINS: dict[str, Callable[[], Chain]] = {
    "ddpm, clipped": lambda: chain_from_scheduler(DDPMScheduler(), 9),
    "ddpm, fixed_large": lambda: chain_from_scheduler(DDPMScheduler(variance_type="fixed_large", clip_sample=False), 9),
    "ddim eta=.5, clipped": lambda: chain_from_scheduler(DDIMScheduler(), 10, eta=0.5),
    "euler ancestral": lambda: chain_from_scheduler(EulerAncestralDiscreteScheduler(), 9),
    "flow": lambda: chain_from_scheduler(FlowMatchEulerDiscreteScheduler(), 9, noise="memoryless"),
    "brownian, a fixed start": lambda: brownian_chain(7),
    "a window of trained steps": lambda: with_trained_steps(chain_from_scheduler(DDPMScheduler(), 9), 2, 5),
    "three steps": lambda: chain_from_scheduler(DDPMScheduler(), 3),
}


def crooked(state: Tensor, timestep: Tensor, condition: object = None) -> Tensor:
    """No denoiser of anything: the moves ask for none."""
    return 0.6 * torch.tanh(1.3 * state.roll(1, 1)) + 0.1 * state


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw_paths(prior: Prior, count: int, generator: torch.Generator) -> NoisePaths:
    return noise_of(prior, rollout(prior, None, count, generator))


@pytest.fixture(params=CHAINS)
def prior(request: pytest.FixtureRequest) -> Prior:
    return Prior(crooked, CHAINS[request.param](), (2,))


def test_the_noise_of_a_rollout_leads_to_the_same_states(prior: Prior) -> None:
    drawn = rollout(prior, None, 50, generator(0))
    paths = noise_of(prior, drawn)
    again = follow(prior, paths, 0)
    torch.testing.assert_close(again.states, drawn.states, rtol=1e-4, atol=1e-4)
    quiet = [k for k in range(prior.chain.num_steps) if prior.chain.noiseless(k)]
    assert all(paths.noise[k + 1].eq(0).all() for k in quiet) and (paths.noise[1].abs() > 0).all()


def test_a_proposal_keeps_what_lies_before_it(prior: Prior) -> None:
    paths = draw_paths(prior, 20, generator(0))
    for first in (0, 1, prior.chain.num_steps - 1):
        proposed = crank_nicolson(prior, paths, first, 0.4, generator(1))
        kept = slice(0, first + 1) if first else slice(0, 0)
        assert torch.equal(proposed.states[kept], paths.states[kept]) and torch.equal(proposed.noise[kept], paths.noise[kept])
        torch.testing.assert_close(follow(prior, proposed, 0).states, proposed.states, rtol=1e-4, atol=1e-4)
        if not prior.chain.noiseless(prior.chain.num_steps - 1):
            assert (proposed.states[-1] != paths.states[-1]).all()
    small = crank_nicolson(prior, paths, 0, 1e-3, generator(1))
    assert (small.noise - paths.noise).abs().max() < 0.01
    picked = paths.replaced(torch.arange(20) < 5, small)
    assert torch.equal(picked.states[:, :5], small.states[:, :5]) and torch.equal(picked.noise[:, 5:], paths.noise[:, 5:])


@pytest.mark.parametrize("size", [0.3, 0.6])
def test_moves_without_a_reward_leave_the_priors_law(prior: Prior, size: float) -> None:
    """Two sweeps of one size, all accepted: the noise of every step that draws some is N(0, 1) still, by mean, variance and
    fourth moment within 5 standard errors (p < 1e-4 together), and so are the samples' mean and square beside fresh ones. The
    controls: proposals whose old part is kept whole, or is kept by 1 - b, are not."""
    count = 4000
    paths, moves, noise = draw_paths(prior, count, generator(3)), Moves(), generator(4)
    start = paths
    moves.size.fill_(size)
    for _ in range(2):
        paths, _ = moves.sweep(prior, paths, torch.zeros(count), lambda some: torch.zeros(len(some)), noise, adapt=False)
    assert moves.accepted.eq(1).all() and (moves.size == size).all()
    drawn = [row for row in range(len(paths.noise)) if paths.noise[row].any()]
    assert normal(paths.noise[drawn]) and (paths.noise[drawn] != start.noise[drawn]).float().mean() > 0.9
    fresh, moved = rollout(prior, None, count, generator(2)).terminal.double(), paths.states[-1].double()
    for power in (1, 2):
        apart = (moved**power).mean(0) - (fresh**power).mean(0)
        error = (((moved**power).var(0) + (fresh**power).var(0)) / count).sqrt()
        assert (apart.abs() < 5 * error).all()
    fresh_noise = torch.randn(start.noise[drawn].shape, generator=noise)
    for kept in (1.0, 1 - size):
        assert not normal(kept * start.noise[drawn] + size * fresh_noise)


def normal(noise: Tensor) -> bool:
    """Whether numbers [rows, n, ...] have the first, second and fourth moment of N(0, 1): each row within 5 standard errors."""
    flat = noise.double().flatten(1)
    n = flat.shape[1]
    return all(
        bool(((flat**power).mean(1) - moment).abs().max() < 5 * math.sqrt(variance / n))
        for power, moment, variance in ((1, 0.0, 1.0), (2, 1.0, 2.0), (4, 3.0, 96.0))
    )


def test_a_forbidden_proposal_is_never_taken_and_a_forbidden_path_is_left() -> None:
    prior = Prior(crooked, CHAINS["ddpm, clipped"](), (2,))
    paths = draw_paths(prior, 400, generator(0))

    def half(some: Tensor) -> Tensor:
        return torch.where(some[:, 0] > 0, 0.0, -math.inf)

    value = half(paths.states[-1])
    forbidden = [int(value.isinf().sum())]
    moves, noise = Moves(), generator(5)
    for _ in range(6):
        paths, value = moves.sweep(prior, paths, value, lambda some: half(some.terminal), noise)
        forbidden.append(int(value.isinf().sum()))
        assert torch.equal(value, half(paths.states[-1]))
    assert forbidden == sorted(forbidden, reverse=True) and forbidden[-1] < forbidden[0] / 8


def test_no_move_begins_where_no_noise_follows() -> None:
    """The last step of this chain draws none: every proposal is another sample, also on a chain with a step for each part."""
    prior = Prior(crooked, chain_from_scheduler(DDPMScheduler(clip_sample=False), 8), (2,))
    assert prior.chain.noiseless(7)
    paths, noise = draw_paths(prior, 50, generator(0)), generator(1)
    moves = Moves()
    for part in range(PARTS):
        for _ in range(5):
            first = moves._step(prior, part, noise)
            assert (crank_nicolson(prior, paths, first, 0.5, noise).states[-1] != paths.states[-1]).any(1).all()


def test_sizes_follow_what_is_accepted_and_stay_when_they_should() -> None:
    prior = Prior(crooked, CHAINS["ddpm, clipped"](), (2,))
    paths, moves, noise = draw_paths(prior, 600, generator(0)), Moves(), generator(1)

    def steep(some: Tensor) -> Tensor:
        return -40 * (some - 0.3).square().sum(1)

    value = steep(paths.states[-1])
    for _ in range(12):
        paths, value = moves.sweep(prior, paths, value, lambda some: steep(some.terminal), noise)
    assert moves.size[0] < 0.4 and 0.15 < moves.accepted[0] < 0.5
    before = moves.size.clone()
    moves.sweep(prior, paths, value, lambda some: steep(some.terminal), noise, adapt=False)
    assert torch.equal(moves.size, before) and len(before) == PARTS


def test_conditions_stay_with_their_paths() -> None:
    table = ConditionTable(("a", "b"), {"shift": torch.tensor([0.0, 5.0])})

    def shifted(state: Tensor, timestep: Tensor, condition: object = None) -> Tensor:
        return crooked(state, timestep) + 0.01 * condition.network_inputs()["shift"][:, None]  # pyright: ignore

    prior = Prior(shifted, CHAINS["ddpm, clipped"](), (2,), condition_table=table)
    drawn = rollout(prior, None, 6, generator(0))
    torch.testing.assert_close(follow(prior, noise_of(prior, drawn), 0).states, drawn.states, rtol=1e-4, atol=1e-4)
    assert noise_of(prior, drawn.select(torch.tensor([1, 3]))).condition.group.tolist() == [1, 1]  # pyright: ignore
