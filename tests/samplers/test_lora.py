"""LoRA on one shared base: the policy starts at the prior, trains beside it, and never moves it. And gradient checkpointing."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, DiTTransformer2DModel, UNet2DModel
from torch import Tensor, nn

from tiltune.samplers.condition import Condition, ConditionTable
from tiltune.samplers.denoiser import DiffusersDenoiser, evaluate
from tiltune.samplers.lora import LoraDenoiser, without_adapters
from tiltune.samplers.make_policy import make_policy, trainable_copy
from tiltune.samplers.mlp import MLPDenoiser
from tiltune.samplers.policy import Policy
from tiltune.samplers.prior import Prior
from tiltune.samplers.rollout import rollout
from tiltune.samplers.schedulers.dispatch import chain_from_scheduler

KINDS: tuple[Any, ...] = ("full", "lora", "residual")
CHAIN = chain_from_scheduler(DDPMScheduler(clip_sample=False), 4)


@pytest.fixture(autouse=True)
def _seeded_weights() -> Iterator[None]:
    """Networks are built from torch's global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def unet(widths: tuple[int, ...] = (8, 16)) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return UNet2DModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            layers_per_block=1,
            block_out_channels=widths,
            norm_num_groups=4,
            attention_head_dim=8,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        )


def prior_of(network: Any = None, **options: Any) -> Prior:
    return Prior(DiffusersDenoiser(network or unet(), **options), CHAIN, (1, 8, 8))


def move_(policy: nn.Module, scale: float = 0.1) -> None:
    """Stands for training: every trainable weight elsewhere."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def outputs(denoiser: Any, count: int = 3) -> Tensor:
    state = torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return evaluate(denoiser, CHAIN, state, 1, None)


@pytest.mark.parametrize("precision", [None, torch.bfloat16, torch.float16], ids=["float32", "bf16", "fp16"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_policy_starts_at_its_prior_bit_for_bit_and_can_leave_it(kind: Any, precision: torch.dtype | None) -> None:
    prior = prior_of(autocast=precision)
    before = outputs(prior.denoiser)
    policy = make_policy(prior, kind, rank=2)
    assert torch.equal(outputs(policy), before)
    assert torch.equal(outputs(prior.denoiser), before)
    drawn = rollout(prior, policy, 3, torch.Generator().manual_seed(0))
    assert drawn.step_log_ratio is not None
    assert (drawn.step_log_ratio == 0).all()
    assert torch.equal(policy.sample(3, seed=0), rollout(prior, None, 3, torch.Generator().manual_seed(0)).terminal)
    move_(policy)
    assert not torch.equal(outputs(policy), before)
    assert torch.equal(outputs(prior.denoiser), before)
    drawn = rollout(prior, policy, 3, torch.Generator().manual_seed(0))
    assert torch.equal(policy.sample(3, seed=0), drawn.terminal)
    assert drawn.step_log_ratio is not None
    assert drawn.step_log_ratio.dtype == torch.float32


def test_samples_come_in_batches_and_are_data() -> None:
    prior = Prior(unet(), CHAIN, (1, 8, 8), to_data=lambda state: 3 * state)
    policy, done = make_policy(prior), []
    samples = policy.sample(5, seed=2, batch=2, on_progress=done.append)
    assert done == [2, 2, 1]
    generator = torch.Generator().manual_seed(2)
    expected = torch.cat([rollout(prior, policy, count, generator).terminal for count in done])
    assert torch.equal(samples, 3 * expected)


class Silent(nn.Module):
    def forward(self, state: Tensor, timestep: Tensor, condition: Condition | None = None) -> Tensor:
        return 0 * state


def test_batches_follow_the_size_of_the_states() -> None:
    done: list[int] = []
    for shape, expected in (((1, 256, 128), [2, 1]), ((2,), [3])):
        prior = Prior(Silent(), CHAIN, shape)
        policy = Policy(prior, Silent())
        done.clear()
        assert policy.sample(3, on_progress=done.append).shape == (3, *shape)
        assert done == expected


def test_making_a_policy_repeats_and_leaves_the_global_generator_alone() -> None:
    with torch.random.fork_rng(devices=[]):
        for kind in KINDS:
            torch.manual_seed(3)
            expected = torch.rand(4)
            states = []
            for seed in (3, 4):
                torch.manual_seed(seed)
                states.append(make_policy(prior_of(), kind, rank=2).state_dict())
                if seed == 3:
                    assert torch.equal(torch.rand(4), expected)
            assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_training_an_adapter_changes_the_policy_and_not_the_prior() -> None:
    prior = prior_of()
    policy = make_policy(prior, "lora", rank=2)
    base = {name: value.clone() for name, value in prior.denoiser.state_dict().items() if "lora" not in name}
    before = outputs(prior.denoiser)
    optimizer = torch.optim.Adam([parameter for parameter in policy.parameters() if parameter.requires_grad], 1e-2)
    for _ in range(3):
        state = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))
        evaluate(policy, CHAIN, state, torch.tensor([0, 1, 2, 1]), None).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (outputs(policy) - before).abs().max() > 1e-2
    assert torch.equal(outputs(prior.denoiser), before)
    after = prior.denoiser.state_dict()
    assert all(torch.equal(after[name], value) for name, value in base.items())
    assert all(("lora_" in name) == parameter.requires_grad for name, parameter in policy.named_parameters())


def storage_bytes(*modules: nn.Module) -> int:
    """Bytes of all weights, each storage once."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for module in modules
        for tensor in (*module.parameters(), *module.buffers())
    }
    return sum(storages.values())


def test_an_adapter_costs_a_fraction_of_the_base_and_a_copy_all_of_it() -> None:
    widths = (32, 64)
    alone = storage_bytes(unet(widths))
    ratios = {}
    for kind in KINDS:
        prior = prior_of(unet(widths))
        ratios[kind] = storage_bytes(make_policy(prior, kind, rank=4), prior.denoiser) / alone
    assert ratios["lora"] <= 1.15
    assert ratios["full"] == ratios["residual"] == 2


# --- the switch ---------------------------------------------------------------------------------------------------------------


def test_the_adapter_is_off_again_after_an_error_and_gradients_are_never_switched() -> None:
    prior = prior_of()
    policy = make_policy(prior, "lora", rank=2)
    before = outputs(prior.denoiser)
    move_(policy)
    grads = [parameter.requires_grad for parameter in policy.parameters()]

    def broken(module: nn.Module, args: Any) -> None:
        raise RuntimeError("in the middle of the network")

    handle = prior.denoiser.model.mid_block.register_forward_pre_hook(broken)
    with pytest.raises(RuntimeError, match="in the middle"):
        outputs(policy)
    handle.remove()
    assert torch.equal(outputs(prior.denoiser), before)
    assert [parameter.requires_grad for parameter in policy.parameters()] == grads
    assert any(grads)


def test_a_prior_called_inside_the_policys_forward_is_still_the_prior() -> None:
    prior = prior_of()
    policy = make_policy(prior, "lora", rank=2)
    before = outputs(prior.denoiser)
    move_(policy)
    expected, inside = outputs(policy), []

    def ask_the_prior(module: nn.Module, args: Any, result: Tensor) -> None:
        if not inside:
            inside.append(None)  # the prior's own call comes through here too
            inside[0] = outputs(prior.denoiser)

    handle = prior.denoiser.model.mid_block.register_forward_hook(ask_the_prior)
    assert torch.equal(outputs(policy), expected)
    handle.remove()
    assert torch.equal(inside[0], before)
    assert not torch.equal(expected, before)


def test_two_policies_on_one_prior_do_not_meet() -> None:
    prior = prior_of()
    before = outputs(prior.denoiser)
    first = make_policy(prior, "lora", rank=2)
    move_(first)
    moved = outputs(first)
    second = make_policy(prior, "lora", rank=3, targets=("to_q", "conv1"))
    assert torch.equal(outputs(second), before)
    assert sum(parameter.requires_grad for parameter in second.parameters()) == 2 * len(adapted(second))
    move_(second)
    # To rounding: some processors' kernels round by where in memory a tensor lies.
    torch.testing.assert_close(outputs(first), moved, rtol=0, atol=1e-6)
    torch.testing.assert_close(outputs(prior.denoiser), before, rtol=0, atol=1e-6)
    assert not torch.equal(outputs(second), moved)
    outputs(first)
    copied = make_policy(prior, "full")
    # The same weights at other addresses: some processors' kernels round by alignment.
    torch.testing.assert_close(outputs(copied), before, rtol=0, atol=1e-6)
    assert not any("lora" in name for name, _ in copied.named_parameters())


def test_a_copied_policy_switches_its_own_adapter() -> None:
    """What averages weights copies policies."""
    policy = make_policy(prior_of(), "lora", rank=2)
    move_(policy)
    twin = copy.deepcopy(policy)
    assert torch.equal(outputs(twin), outputs(policy))
    assert torch.equal(outputs(twin.prior.denoiser), outputs(policy.prior.denoiser))
    move_(twin)
    assert not torch.equal(outputs(twin), outputs(policy))


@pytest.mark.parametrize("targets", [(), ("to_q", "mid_block.resnets.0.conv1")], ids=["default", "two"])
def test_a_merged_copy_is_the_policy_and_a_plain_copy_the_prior(targets: tuple[str, ...]) -> None:
    prior = prior_of()
    before = outputs(prior.denoiser)
    policy = make_policy(prior, "lora", rank=2, targets=targets)
    move_(policy)
    assert isinstance(policy.denoiser, LoraDenoiser)
    merged, plain = without_adapters(prior.denoiser, policy.denoiser.name), without_adapters(prior.denoiser)
    torch.testing.assert_close(outputs(merged), outputs(policy), rtol=0, atol=1e-5)
    assert (outputs(merged) - before).abs().max() > 1e-2
    assert torch.equal(outputs(plain), before)
    assert set(merged.state_dict()) == set(prior_of().denoiser.state_dict())
    assert torch.equal(outputs(prior.denoiser), before)


# --- what gets an adapter -----------------------------------------------------------------------------------------------------


def adapted(policy: Policy) -> set[str]:
    assert isinstance(policy.denoiser, LoraDenoiser)
    return set(policy.denoiser.layers())


def test_targets_are_names_or_endings_of_names() -> None:
    assert {name.rsplit(".", 1)[1] for name in adapted(make_policy(prior_of(), "lora", rank=2, targets=("to_q", "conv1")))} == {
        "to_q",
        "conv1",
    }
    one = make_policy(prior_of(), "lora", rank=2, targets=("mid_block.resnets.0.conv1",))
    assert adapted(one) == {"mid_block.resnets.0.conv1"}
    assert sum(parameter.requires_grad for parameter in one.parameters()) == 2


@pytest.mark.parametrize("rank", [1, 4])
def test_by_default_every_layer_larger_than_its_adapter(rank: int) -> None:
    network = unet()
    layers = {name: module for name, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    policy = make_policy(prior_of(network), "lora", rank=rank)
    sizes = {
        name: sum(part.numel() for key, part in policy.named_parameters() if f".{name}.lora_" in key) for name in adapted(policy)
    }
    assert sizes
    assert all(0 < size < layers[name].weight.numel() for name, size in sizes.items())
    left = {name: layers[name].weight for name in set(layers) - set(sizes)}
    assert all(rank * (weight[0].numel() + len(weight)) >= weight.numel() for weight in left.values())
    kinds = {name.rsplit(".", 1)[-1] for name in sizes}
    assert {"to_q", "to_k", "to_v", "conv1", "conv2"} <= kinds


NETWORKS: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "mlp": (lambda: MLPDenoiser(dim=2, width=16, depth=2, fourier_features=8), (2,)),
    "dit": (
        lambda: DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=4, num_layers=1, sample_size=4, norm_num_groups=2
        ),
        (4, 4, 4),
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_other_networks_take_adapters_too(name: str) -> None:
    make, shape = NETWORKS[name]
    network = make()
    move_(network)
    table = ConditionTable(("label 3",), {"class_labels": torch.tensor([3])}) if name == "dit" else None
    prior = Prior(DiffusersDenoiser(network), CHAIN, shape, condition_table=table)
    policy = make_policy(prior, "lora", rank=2)
    drawn = rollout(prior, policy, 3, torch.Generator().manual_seed(0))
    assert drawn.step_log_ratio is not None
    assert (drawn.step_log_ratio == 0).all()
    move_(policy)
    moved = rollout(prior, policy, 3, torch.Generator().manual_seed(0))
    assert moved.step_log_ratio is not None
    assert (moved.step_log_ratio != 0).any()


REFUSED: dict[str, tuple[Callable[[], Prior], dict[str, Any], str]] = {
    "a target that matches nothing": (
        prior_of,
        {"targets": ("to_query",)},
        r"'to_query' matches no linear or convolutional layer.*to_q",
    ),
    "a layer without weights": (prior_of, {"targets": ("nonlinearity",)}, "'nonlinearity' matches no linear"),
    "half a name": (prior_of, {"targets": ("o_q",)}, r"'o_q' matches no.*to_q"),
    "rank 0": (prior_of, {"rank": 0}, "rank is 0"),
    "a rank above all layers": (prior_of, {"rank": 500}, "at rank 500 an adapter is larger than any layer"),
    "a closed form": (
        lambda: Prior(lambda state, timestep, condition=None: state, CHAIN, (2,)),
        {},
        "LoRA needs a prior whose network is a diffusers model",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_adapters_that_cannot_be_are_refused(name: str) -> None:
    make, options, message = REFUSED[name]
    prior = make()
    with pytest.raises(ValueError, match=message):
        make_policy(prior, "lora", **options)
    assert not any("lora" in key for key in getattr(prior.denoiser, "state_dict", dict)())


def test_policies_that_cannot_be_are_refused() -> None:
    by_hand = Prior(lambda state, timestep, condition=None: state, CHAIN, (1, 8, 8))
    with pytest.raises(ValueError, match="no parameters to copy"):
        make_policy(by_hand, "full")
    with pytest.raises(ValueError, match="no config to build a residual network from"):
        make_policy(by_hand, "residual")
    with pytest.raises(ValueError, match="'half' is unknown; choose one of full, lora, residual"):
        make_policy(prior_of(), "half")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="a 'full' policy has none"):
        make_policy(prior_of(), "full", targets=("to_q",))
    foreign = prior_of()
    make_policy(foreign, "lora", rank=2)
    again = Prior(foreign.denoiser.model, CHAIN, (1, 8, 8))
    with pytest.raises(ValueError, match="peft adapters of its own; merge them"):
        make_policy(again, "lora", rank=2)


def test_without_peft_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"need peft .*pip install 'tiltune\[lora\]'"):
        make_policy(prior_of(), "lora")
    make_policy(prior_of(), "full")  # nothing else needs it


# --- gradient checkpointing ---------------------------------------------------------------------------------------------------


def gradients(policy: nn.Module, prior: Prior | None = None) -> tuple[dict[str, Tensor], Tensor]:
    """(gradients of the policy's weights, gradient of the state) of a sum that also holds the prior, if given."""
    state = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
    total = evaluate(policy, CHAIN, state, torch.tensor([0, 1, 2]), None).square().sum()
    if prior is not None:
        total = total + evaluate(prior.denoiser, CHAIN, state, 1, None).sin().sum()
    total.backward()
    found = {name: parameter.grad.clone() for name, parameter in policy.named_parameters() if parameter.grad is not None}
    for parameter in policy.parameters():
        parameter.grad = None
    assert state.grad is not None
    return found, state.grad


@pytest.fixture
def recomputed() -> Iterator[list[int]]:
    """Counts calls of a middle layer: one a forward pass, one more a recomputation."""
    calls: list[int] = []
    handle = nn.modules.module.register_module_forward_pre_hook(
        lambda module, args: calls.append(1) if getattr(module, "is_middle", False) else None
    )
    yield calls
    handle.remove()


@pytest.mark.parametrize("precision", [None, torch.bfloat16], ids=["float32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_checkpointed_gradients_are_the_same(kind: Any, precision: torch.dtype | None, recomputed: list[int]) -> None:
    found = {}
    for checkpointing in (False, True):
        prior = prior_of(autocast=precision)
        policy = make_policy(prior, kind, rank=2, gradient_checkpointing=checkpointing)
        move_(policy, 0.05)
        network = policy.denoiser.base if kind == "lora" else getattr(policy.denoiser, "residual", policy.denoiser)
        network.model.mid_block.resnets[1].is_middle = True  # pyright: ignore[reportAttributeAccessIssue]
        recomputed.clear()
        found[checkpointing] = gradients(policy, None if kind == "residual" else prior)
        # The full copy's prior is another network; the adapter's is the same, called once more.
        forwards = {"full": 1, "lora": 2, "residual": 1}[kind]
        assert len(recomputed) == forwards * (2 if checkpointing else 1)
    (plain, by_state), (again, by_state_again) = found[False], found[True]
    assert set(plain) == set(again)
    assert all(torch.equal(plain[name], again[name]) for name in plain)
    assert torch.equal(by_state, by_state_again)
    assert any(value.abs().max() > 0 for value in plain.values())


def test_a_recomputation_that_forgets_the_adapter_would_be_seen() -> None:
    """The negative control: diffusers' own function recomputes with whatever is on in the backward pass, which is nothing."""
    prior = prior_of()
    policy = make_policy(prior, "lora", rank=2)
    prior.denoiser.model.enable_gradient_checkpointing()
    with pytest.raises(Exception, match=r"different number of tensors|different metadata"):
        gradients(policy)


def test_a_network_without_checkpointing_is_refused() -> None:
    prior = Prior(MLPDenoiser(dim=2, width=8), CHAIN, (2,))
    with pytest.raises(ValueError, match="MLPDenoiser has no gradient checkpointing"):
        make_policy(prior, "full", gradient_checkpointing=True)


def test_a_copy_of_a_checkpointed_shared_base_does_not_checkpoint() -> None:
    prior = prior_of()
    make_policy(prior, "lora", rank=2, gradient_checkpointing=True)
    assert prior.denoiser.model.is_gradient_checkpointing
    copied = trainable_copy(prior)
    assert not copied.model.is_gradient_checkpointing  # pyright: ignore[reportAttributeAccessIssue]
