"""Adjoint Matching against closed forms and autograd, in float64."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from tiltune.finetune.learning.adjoint_matching import backward_adjoint_matching, lean_adjoint
from tiltune.samplers.chain import Chain
from tiltune.samplers.denoiser import evaluate
from tiltune.samplers.policy import Policy
from tiltune.samplers.prior import Prior
from tiltune.samplers.rollout import draw_start, rollout
from tiltune.samplers.schedulers.brownian import brownian_chain
from tiltune.samplers.schedulers.dispatch import chain_from_scheduler
from tiltune.samplers.trajectory import Trajectories
from toys.linear_gaussian import LinearGaussian
from toys.moved_policy import moved_policy


def vp() -> Chain:
    return chain_from_scheduler(DDPMScheduler(variance_type="fixed_large", prediction_type="v_prediction", clip_sample=False), 5)


CHAINS = {"brownian": lambda: brownian_chain(5), "prior last": vp}


def drawn_by(prior: Prior, policy: Policy | None, count: int) -> Trajectories:
    generator = torch.Generator().manual_seed(1)
    start = draw_start(prior, count, generator, torch.float64)
    return rollout(prior, policy, count, generator, start=start, keep_outputs=True)


@pytest.mark.parametrize("name", CHAINS)
def test_the_optimal_policy_of_the_linear_task_has_no_loss(name: str) -> None:
    """V is linear there, so that its gradient is the lean adjoint, whatever the trajectory."""
    task = LinearGaussian(
        CHAINS[name](), torch.full((2,), 0.5, dtype=torch.float64), torch.tensor([1.2, -0.4], dtype=torch.float64), 1.5, 0.7
    )
    prior, optimal = task.prior(), task.policy()
    drawn = drawn_by(prior, optimal, 6)
    adjoint = lean_adjoint(prior, drawn, task.energy, task.alpha)
    assert adjoint.shape == (prior.chain.num_kernels, 6, 2)
    for alpha, optimum in ((task.alpha, True), (2 * task.alpha, False)):  # another temperature has another optimum
        carried = lean_adjoint(prior, drawn, task.energy, alpha)
        shift = [
            prior.chain.kernel.shift(
                drawn.states[k],
                k,
                evaluate(optimal, prior.chain, drawn.states[k], k, None),
                evaluate(prior.denoiser, prior.chain, drawn.states[k], k, None),
            )
            + prior.chain.kernel.std(k, drawn.states[k]) * carried[row]
            for row, k in enumerate(prior.chain.trained)
        ]
        assert (torch.stack(shift).abs().max() < 1e-10) == optimum


@pytest.mark.parametrize("name", CHAINS)
def test_on_the_priors_own_paths_it_is_the_gradient_of_the_final_energy(name: str) -> None:
    prior, _ = moved_policy(CHAINS[name](), torch.Generator().manual_seed(0))
    chain, drawn = prior.chain, drawn_by(prior, None, 4)
    noise = [
        torch.zeros_like(drawn.states[k])
        if chain.noiseless(k)
        else chain.kernel.standardize(
            drawn.states[k + 1], drawn.states[k], k, evaluate(prior.denoiser, chain, drawn.states[k], k, None)
        )
        for k in range(chain.num_steps)
    ]

    def energy(x: Tensor) -> Tensor:
        return x.pow(4).sum(1)

    adjoint = lean_adjoint(prior, drawn, energy, 0.5)
    for row, k in enumerate(chain.trained):
        state = drawn.states[k + 1].detach().clone().requires_grad_(True)
        following = state
        for j in range(k + 1, chain.num_steps):
            output = evaluate(prior.denoiser, chain, following, j, None)
            mean = chain.kernel.mean(following, j, output)
            following = mean if chain.noiseless(j) else chain.kernel.sample(following, j, output, noise[j])
        (expected,) = torch.autograd.grad(energy(prior.to_data(following)).sum() / 0.5, state)
        assert torch.allclose(adjoint[row], expected, rtol=1e-8, atol=1e-10)


def test_its_gradient_is_that_of_the_loss_written_out() -> None:
    prior, network = moved_policy(vp(), torch.Generator().manual_seed(0))
    policy = network if isinstance(network, Policy) else Policy(prior, network)
    chain, drawn = prior.chain, drawn_by(prior, policy, 4)
    adjoint = lean_adjoint(prior, drawn, lambda x: x.square().sum(1), 1.0)
    policy.zero_grad()
    loss = backward_adjoint_matching(policy, prior, drawn, adjoint, 3)
    found = [weight.grad.clone() for weight in policy.parameters() if weight.grad is not None]
    policy.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    for row, k in enumerate(chain.trained):
        state = drawn.states[k]
        prior_output = evaluate(prior.denoiser, chain, state, k, None).detach()
        shift = chain.kernel.shift(state, k, evaluate(policy, chain, state, k, None), prior_output)
        total = total + 0.5 * (shift + chain.kernel.std(k, state) * adjoint[row]).square().sum() / 4
    total.backward()
    assert loss.item() == pytest.approx(total.item(), rel=1e-6)
    expected = [weight.grad for weight in policy.parameters() if weight.grad is not None]
    assert expected and all(torch.allclose(a, b, rtol=1e-8, atol=1e-10) for a, b in zip(found, expected, strict=True))


def test_a_black_box_is_refused() -> None:
    prior, _ = moved_policy(vp(), torch.Generator().manual_seed(0))
    drawn = drawn_by(prior, None, 2)
    with pytest.raises(ValueError, match="black box"):
        lean_adjoint(prior, drawn, lambda x: x.detach().square().sum(1), 1.0)
