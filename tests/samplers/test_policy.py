"""Denoisers, the frozen prior, the trainable policy, and the rollouts they make."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DModel
from torch import Tensor, nn
from torch.distributions import Normal

from tiltune.samplers.bridge import noise_back
from tiltune.samplers.chain import Chain
from tiltune.samplers.condition import Condition, ConditionTable
from tiltune.samplers.denoiser import ResidualDenoiser, as_denoiser, evaluate, evaluate_in_parts, zero_output_layer_
from tiltune.samplers.inflated import inflated_rollout
from tiltune.samplers.log_ratio import rows_of, step_log_ratio
from tiltune.samplers.make_policy import trainable_copy
from tiltune.samplers.mlp import LinearPath, MLPDenoiser, precondition_for_
from tiltune.samplers.prior import Prior
from tiltune.samplers.rollout import draw_start, prior_last_states, rollout
from tiltune.samplers.schedulers.brownian import brownian_chain
from tiltune.samplers.schedulers.dispatch import chain_from_scheduler


def prior_last_chain(num_steps: int = 6) -> Chain:
    return chain_from_scheduler(DDPMScheduler(clip_sample=False, variance_type="fixed_large"), num_steps)


def noisy_prior_last_chain(num_steps: int = 6) -> Chain:
    return chain_from_scheduler(FlowMatchEulerDiscreteScheduler(), num_steps)


def randomize_(network: nn.Module, seed: int = 0) -> Any:
    """Random weights everywhere, output layer included: nothing starts at zero by accident."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return network


def mlp(seed: int = 0) -> MLPDenoiser:
    return randomize_(MLPDenoiser(dim=2, width=16, depth=2, fourier_features=8), seed)


def unet(seed: int = 0) -> UNet2DModel:
    network = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    return randomize_(network, seed)


NETWORKS = {"mlp": (mlp, (2,)), "unet": (unet, (1, 8, 8))}


def states(shape: tuple[int, ...], count: int = 5) -> Tensor:
    return torch.randn((count, *shape), generator=torch.Generator().manual_seed(9))


def test_mlp_is_saved_and_loaded_as_a_diffusers_model(tmp_path: Path) -> None:
    network = mlp()
    precondition_for_(network, chain_from_scheduler(DDPMScheduler(clip_sample=False), 1000), data_std=2.0)
    network.save_pretrained(tmp_path, safe_serialization=True)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}
    loaded = MLPDenoiser.from_pretrained(tmp_path, use_safetensors=True, local_files_only=True)
    assert dict(loaded.config)["width"] == 16
    state, timestep = states((2,)), torch.tensor([0.0, 3.0, 500.5, 999.0, 1000.0])
    assert torch.equal(loaded(state, timestep)[0], network(state, timestep)[0])
    for name, value in network.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


def test_mlp_sees_each_samples_own_timestep() -> None:
    network, state = mlp(), states((2,))
    timestep = torch.tensor([10.0, 10.0, 400.0, 10.0, 999.0])
    together = network(state, timestep)[0]
    for n, t in enumerate(timestep):
        torch.testing.assert_close(together[n], network(state[n : n + 1], t)[0][0], rtol=1e-5, atol=1e-6)


def test_mlp_is_unconditional() -> None:
    with pytest.raises(ValueError, match="unconditional"):
        mlp()(states((2,)), 3.0, class_labels=torch.zeros(5, dtype=torch.long))


def test_preconditioning_makes_a_zero_network_the_exact_denoiser_of_one_gaussian() -> None:
    """EDM, arXiv 2206.00364, eq. 7: with F = 0 the output is the best linear guess for data N(0, data_std²)."""
    chain, data_std = chain_from_scheduler(DDPMScheduler(clip_sample=False), 1000), 2.0
    network = precondition_for_(MLPDenoiser(dim=2), chain, data_std)
    state = states((2,))
    for k in (0, 300, 700, 990):
        signal, noise = chain.signal[k].item(), chain.noise[k].item()
        output = evaluate(as_denoiser(network), chain, state, k, None)
        expected = signal * data_std**2 / (signal**2 * data_std**2 + noise**2) * state
        torch.testing.assert_close(chain.kernel.clean(state, k, output), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", NETWORKS)
def test_trainable_copy_starts_at_the_prior_and_shares_nothing(kind: str) -> None:
    make, shape = NETWORKS[kind]
    prior = Prior(make(), prior_last_chain(), shape)
    policy = trainable_copy(prior)
    state, t = states(shape), torch.tensor(300.0)
    own = dict(prior.denoiser.named_parameters())
    assert all(torch.equal(parameter, own[name]) for name, parameter in policy.named_parameters())
    # The outputs to rounding: some processors' kernels round by where in memory a tensor lies.
    torch.testing.assert_close(policy(state, t), prior.denoiser(state, t), rtol=0, atol=1e-6)
    assert all(parameter.requires_grad for parameter in policy.parameters())
    drawn = rollout(prior, policy, 5, torch.Generator().manual_seed(0))
    assert drawn.step_log_ratio is not None
    assert (drawn.step_log_ratio.abs() < 1e-4).all()
    before = prior.denoiser(state, t)
    randomize_(policy, seed=1)
    torch.testing.assert_close(prior.denoiser(state, t), before, rtol=0, atol=1e-6)
    assert (policy(state, t) - before).abs().max() > 1e-3


@pytest.mark.parametrize("kind", NETWORKS)
def test_residual_denoiser_starts_exactly_at_the_prior_and_can_leave_it(kind: str) -> None:
    make, shape = NETWORKS[kind]
    prior = Prior(make(), prior_last_chain(), shape)
    policy = ResidualDenoiser(prior.denoiser, make(seed=1))
    state, t = states(shape), torch.tensor(300.0)
    assert torch.equal(policy(state, t), prior.denoiser(state, t))
    policy(state, t).square().sum().backward()
    moved = [name for name, parameter in policy.named_parameters() if parameter.grad is not None and parameter.grad.any()]
    # At the start only the zeroed layer has a gradient, and it has one: nothing is stuck.
    assert sorted(name.rsplit(".", 1)[1] for name in moved) == ["bias", "weight"]
    assert {name.rsplit(".", 2)[1] for name in moved} == {{"mlp": "outward", "unet": "conv_out"}[kind]}


@pytest.mark.parametrize(("kind", "layer"), [("mlp", "outward"), ("unet", "conv_out")])
def test_zero_output_layer_hits_the_output_layer_and_no_other(kind: str, layer: str) -> None:
    make, shape = NETWORKS[kind]
    network, untouched = make(), make()
    assert network(states(shape), 300.0, return_dict=False)[0].abs().max() > 0
    zero_output_layer_(network)
    assert (network(states(shape), 300.0, return_dict=False)[0] == 0).all()
    for name, parameter in network.named_parameters():
        if name.startswith(layer + "."):
            assert not parameter.any()
        else:
            assert torch.equal(parameter, untouched.get_parameter(name))


def test_a_network_without_an_output_layer_is_refused() -> None:
    with pytest.raises(ValueError, match="no linear or convolutional layer"):
        ResidualDenoiser(lambda state, timestep, condition=None: state, nn.SiLU())


@pytest.mark.parametrize("kind", NETWORKS)
def test_the_prior_never_gets_gradients(kind: str) -> None:
    make, shape = NETWORKS[kind]
    network = make()
    prior = Prior(network, prior_last_chain(), shape)
    for policy in (trainable_copy(prior), ResidualDenoiser(prior.denoiser, make(seed=1))):
        output = evaluate(policy, prior.chain, states(shape), 2, None)
        output.square().sum().backward()
        assert any(parameter.grad is not None for parameter in policy.parameters())
    for parameter in network.parameters():
        assert not parameter.requires_grad
        assert parameter.grad is None
    assert not network.training


def test_a_residual_policy_holds_no_weight_of_the_prior() -> None:
    prior = Prior(mlp(), prior_last_chain(), (2,))
    policy = ResidualDenoiser(prior.denoiser, mlp(seed=1))
    held = {id(parameter) for parameter in policy.parameters()}
    assert isinstance(prior.denoiser, nn.Module)
    assert not held & {id(parameter) for parameter in prior.denoiser.parameters()}
    assert all(name.startswith("residual.") for name in policy.state_dict())
    policy.train()
    assert not prior.denoiser.training


def test_a_closed_form_has_nothing_to_copy() -> None:
    prior = Prior(lambda state, timestep, condition=None: state, prior_last_chain(), (2,))
    with pytest.raises(ValueError, match="ResidualDenoiser"):
        trainable_copy(prior)


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("how", ["prior", "policy", "noise back"])
def test_trajectories_follow_their_generator_and_nothing_else(kind: str, how: str) -> None:
    make, shape = NETWORKS[kind]
    prior = Prior(make(), noisy_prior_last_chain(), shape)

    def draw(seed: int, global_seed: int) -> Tensor:
        torch.manual_seed(global_seed)
        generator = torch.Generator().manual_seed(seed)
        if how == "noise back":
            return noise_back(prior, states(shape), generator).states
        return rollout(prior, None if how == "prior" else make_policy(), 3, generator).states

    def make_policy() -> nn.Module:
        return randomize_(trainable_copy(prior), seed=1)

    with torch.random.fork_rng(devices=[]):
        first, again = draw(5, 0), draw(5, 1)
        assert torch.equal(first, again)
        assert not torch.equal(first, draw(6, 0))
        torch.manual_seed(3)
        expected = torch.rand(4)
        torch.manual_seed(3)
        generator = torch.Generator().manual_seed(5)
        rollout(prior, None, 3, generator)
        noise_back(prior, states(shape), generator)
        assert torch.equal(torch.rand(4), expected)  # the global generator was not touched


@pytest.mark.parametrize("chain", [brownian_chain(8), prior_last_chain()], ids=["brownian", "ddpm"])
@pytest.mark.parametrize("trained", [False, True], ids=["prior", "policy"])
@pytest.mark.parametrize("scale", [1.0, 1.6, 0.7])
def test_log_behavior_is_the_behaviors_density_ratio(chain: Chain, trained: bool, scale: float) -> None:
    """log π_b - log π_prior of the whole trajectory by torch.distributions: every kernel's sigma times ``scale``."""
    prior = Prior(mlp().double(), chain, (2,))
    policy = randomize_(trainable_copy(prior), seed=1) if trained else None
    mover = policy if policy is not None else prior.denoiser
    generator = torch.Generator().manual_seed(0)
    start = draw_start(prior, 16, generator, torch.float64)
    if scale == 1.0:
        drawn = rollout(prior, policy, 16, generator, start=start)
    else:
        drawn = inflated_rollout(prior, mover, 16, generator, scale, start=start)
    expected = torch.zeros(16, dtype=torch.float64)
    with torch.no_grad():
        for k in range(chain.num_kernels):
            state, following, sigma = drawn.states[k], drawn.states[k + 1], chain.sigma[k]
            means = [
                chain.kernel.mean(state, k, evaluate(denoiser, chain, state, k, None)) for denoiser in (mover, prior.denoiser)
            ]
            behavior = Normal(means[0], scale * sigma).log_prob(following)
            expected += (behavior - Normal(means[1], sigma).log_prob(following)).sum(1)
    assert drawn.log_behavior is not None
    torch.testing.assert_close(drawn.log_behavior, expected, rtol=1e-9, atol=1e-9)
    if policy is not None:
        assert drawn.step_log_ratio is not None
        torch.testing.assert_close(drawn.step_log_ratio, step_log_ratio(chain, prior.denoiser, policy, drawn))


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_chain_whose_last_step_is_the_priors_ends_where_it_leads(kind: str) -> None:
    """Whoever drew it: policy rollouts and noised samples alike, and never at the given sample."""
    make, shape = NETWORKS[kind]
    prior = Prior(make(), prior_last_chain(), shape)
    assert prior.chain.prior_last_steps
    policy = randomize_(trainable_copy(prior), seed=1)
    generator = torch.Generator().manual_seed(0)
    samples = states(shape)
    for drawn in (rollout(prior, policy, 4, generator), noise_back(prior, samples, generator)):
        assert len(drawn.states) == prior.chain.num_steps + 1
        assert torch.equal(drawn.terminal, prior_last_states(prior, drawn.states[prior.chain.num_kernels], generator)[-1])
    assert not torch.equal(drawn.terminal, samples)


def test_a_chain_whose_last_step_is_trained_ends_at_the_given_samples() -> None:
    prior, samples = Prior(mlp(), brownian_chain(8), (2,)), states((2,))
    drawn = noise_back(prior, samples, torch.Generator().manual_seed(0))
    torch.testing.assert_close(drawn.terminal, samples, rtol=0, atol=1e-6)
    assert not drawn.states[0].any()
    assert drawn.log_behavior is None
    assert drawn.step_log_ratio is None


@pytest.mark.parametrize(
    "chain", [brownian_chain(8), prior_last_chain(), noisy_prior_last_chain()], ids=["none", "quiet", "noisy"]
)
def test_keeping_only_the_sample_changes_nothing_else(chain: Chain) -> None:
    prior = Prior(mlp(), chain, (2,))
    policy = randomize_(trainable_copy(prior), seed=1)
    whole, last = (rollout(prior, policy, 4, torch.Generator().manual_seed(0), keep=keep) for keep in (True, False))
    assert last.states.shape == (1, 4, 2)
    assert torch.equal(whole.terminal, last.terminal)
    assert whole.step_log_ratio is not None
    assert last.step_log_ratio is not None
    assert torch.equal(whole.step_log_ratio, last.step_log_ratio)


def test_given_starts_are_kept() -> None:
    prior, start = Prior(mlp(), prior_last_chain(), (2,)), states((2,))
    drawn = rollout(prior, None, 5, torch.Generator().manual_seed(0), start=start)
    assert torch.equal(drawn.states[0], start)


def test_to_data_is_what_an_energy_sees() -> None:
    prior = Prior(mlp(), prior_last_chain(), (2,), to_data=lambda state: 3 * state)
    assert torch.equal(prior.to_data(states((2,))), 3 * states((2,)))
    assert torch.equal(Prior(mlp(), prior_last_chain(), (2,)).to_data(states((2,))), states((2,)))


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_few_tlm_steps_move_the_policy_toward_its_data(kind: str) -> None:
    """The forward KL of noised samples falls: log-ratio, chunks and both kinds of network fit together."""
    make, shape = NETWORKS[kind]
    prior = Prior(make(), prior_last_chain(), shape)
    policy = ResidualDenoiser(prior.denoiser, make(seed=1))
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    drawn = noise_back(prior, torch.ones(32, *shape), generator)
    state, following, step, _ = rows_of(drawn, prior.chain, slice(None))
    chain = prior.chain
    prior_output = evaluate(prior.denoiser, chain, state, step, None)
    z = chain.kernel.standardize(following, state, step, prior_output)
    likelihood = []
    for _ in range(15):
        output = evaluate(policy, chain, state, step, None)
        ratio = chain.kernel.log_ratio_from_states(z, chain.kernel.shift(state, step, output, prior_output))
        likelihood.append(ratio.sum().item() / 32)
        optimizer.zero_grad()
        (-ratio.mean()).backward()
        optimizer.step()
    assert likelihood[0] == 0
    assert likelihood[-1] > 1


def test_the_linear_part_is_linear_in_state_and_estimate() -> None:
    """W_2 diag(g(t)) (W_1 x + b), another matrix at each timestep; zero as it is built."""
    torch.manual_seed(0)
    path = LinearPath(4, 3, 2)
    embedded, x = torch.randn(2, 13), torch.randn(5, 4)
    which = torch.tensor([0, 1, 1, 0, 1])
    assert torch.equal(path(x, embedded, which), torch.zeros(5, 2))
    torch.nn.init.normal_(path.outward.weight)
    gate = path.gate(embedded)
    for row, own in enumerate(which.tolist()):
        matrix = path.outward.weight @ torch.diag(gate[own])
        expected = matrix @ (path.inward.weight @ x[row] + path.inward.bias)
        torch.testing.assert_close(path(x, embedded, which)[row], expected)
    network = MLPDenoiser(2, width=8, depth=1, fourier_features=2, sees_prior=True)
    assert network.linear is not None and MLPDenoiser(2, width=8, depth=1, fourier_features=2).linear is None


def test_a_large_network_is_evaluated_a_few_states_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same outputs, each with its own condition, and never more than three states in a call."""
    sizes: list[int] = []
    table = ConditionTable(("a", "b"), {"class_labels": torch.tensor([3, 5])})

    def network(state: Tensor, timestep: Tensor, condition: Condition | None = None) -> Tensor:
        assert condition is not None
        sizes.append(len(state))
        return state * condition.network_inputs()["class_labels"][:, None] + timestep

    chain = brownian_chain(4)
    state, condition = torch.randn(8, 2, generator=torch.Generator().manual_seed(0)), table.in_turn(8, torch.device("cpu"))
    whole = evaluate(network, chain, state, 2, condition)
    monkeypatch.setattr("tiltune.samplers.denoiser.rows_at_once", lambda shape, device: 3)
    assert torch.equal(evaluate_in_parts(network, chain, state, 2, condition), whole)
    assert sizes == [8, 3, 3, 2]
