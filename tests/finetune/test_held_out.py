"""Held-out paths against enumeration and closed forms, and that no run ends worse than its prior."""

import math
from dataclasses import replace

import pytest
import torch
from diffusers import DDPMScheduler
from torch.distributions import Normal

from tiltune.finetune.config.train import TrainConfig
from tiltune.finetune.estimators import weighted_mean
from tiltune.finetune.learning import updates
from tiltune.finetune.learning.improvement import Improvement
from tiltune.finetune.learning.kept import Kept
from tiltune.finetune.learning.monitor import JUDGED
from tiltune.finetune.learning.step_bound import StepBound
from tiltune.finetune.learning.trainer import Trainer
from tiltune.finetune.learning.value_drift import ValueDrift
from tiltune.finetune.populations.held_out import DRAWN, HeldOut
from tiltune.finetune.populations.population import Population
from tiltune.samplers.denoiser import ResidualDenoiser
from tiltune.samplers.log_ratio import step_log_ratio
from tiltune.samplers.mlp import MLPDenoiser
from tiltune.samplers.rollout import rollout
from tiltune.samplers.schedulers.dispatch import chain_from_scheduler
from tiltune.samplers.streams import OFFSETS
from toys.linear_gaussian import LinearDenoiser, LinearGaussian

VP = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction", "clip_sample": False}


@pytest.fixture(scope="module")
def task():
    chain = chain_from_scheduler(DDPMScheduler(variance_type="fixed_large", **VP), 6)
    return LinearGaussian(chain, torch.zeros(2, dtype=torch.float64), torch.tensor([1.0, -0.5], dtype=torch.float64))


def paths_of(task, count, seed=0):
    drawn = rollout(task.prior(), None, count, torch.Generator().manual_seed(seed))
    return drawn.with_(energy=task.energy(drawn.terminal))


def moved(task, factor):
    """The optimal policy's shift times ``factor``; and its KL(tilted || prior) - KL(tilted || policy) over the kernels, in closed
    form: Σ_k (factor - ½ factor²) |delta_k|²."""
    slope, offset = task.output
    best = task.policy()
    policy = LinearDenoiser(task.chain, slope, offset + factor * (best.offset - offset))
    kernels = task.chain.num_kernels
    size = (task.chain.sigma[:, None] * task.soft_value[0][1:])[:kernels].square().sum().item()
    return policy, (factor - 0.5 * factor**2) * size


def likelihood(task, denoiser, states):
    """log of the density of whole paths [N], float64, from the columns of the chain and torch's Normal."""
    chain, total = task.chain, 0.0
    for k in range(chain.num_kernels):
        state = states[k].double()
        output = denoiser(state, chain.timestep(torch.full((len(state),), k), state))
        clean = chain.p[k] * state + chain.q[k] * output
        mean = chain.c[k] * state + chain.d[k] * clean + chain.e[k] * output
        total = total + Normal(mean, chain.sigma[k]).log_prob(states[k + 1].double()).sum(1)
    return total


@pytest.mark.parametrize("factor", [1.0, 0.5, -0.5])
def test_the_gain_is_what_the_eubo_falls_by(task, factor):
    """EUBO = Σ w (-E/alpha - log policy + log prior) over all paths with w = exp(-E/alpha)/Σ, to 1e-4; a policy moved the wrong
    way gains less than nothing."""
    paths = paths_of(task, 500)
    reward = -paths.energy.double() / task.alpha
    weight = reward.exp() / reward.exp().sum()
    policy, closed = moved(task, factor)
    prior = likelihood(task, task.prior().denoiser, paths.states)
    eubo = (weight * (reward - likelihood(task, policy, paths.states) + prior)).sum().item()
    held_out = HeldOut(task.prior(), paths, weight, task.alpha)
    gain = held_out.look(policy).gain
    assert held_out.eubo == pytest.approx((weight * reward).sum().item(), abs=1e-6)
    assert held_out.eubo - gain == pytest.approx(eubo, abs=1e-4)
    assert math.copysign(1.0, gain) == math.copysign(1.0, closed) and abs(closed) > 0.2


def test_the_drawn_paths_stand_for_all(task):
    """The systematic draw has the gain of all weighted paths within 4 of its standard errors, and weights that sum to 1."""
    paths = paths_of(task, 1000)
    whole = HeldOut(task.prior(), paths, Population(paths).log_weight(task.alpha).double().softmax(0), task.alpha)
    drawn = HeldOut.draw(task.prior(), Population(paths), task.alpha, 1.0, torch.Generator().manual_seed(1))
    assert len(drawn.paths) <= DRAWN and drawn.weight.sum().item() == pytest.approx(1.0)
    policy, _ = moved(task, 1.0)
    _, gain, error, _ = drawn.look(policy)
    assert gain == pytest.approx(whole.look(policy).gain, abs=4 * error)
    even = HeldOut(task.prior(), paths, torch.full((1000,), 1e-3, dtype=torch.float64), task.alpha)
    assert even.look(policy).gain < gain - 5 * error  # the control: the prior's paths, not the tilted law's


def test_the_standard_error_is_the_spread_over_independent_sets(task):
    """Over 40 sets of 400 paths: the spread within a factor 1.4 of the mean standard error (40 leave 11%), the mean within 4 of
    its own of the closed form (p < 1e-4)."""
    policy, closed = moved(task, 0.7)
    gains, errors = [], []
    for seed in range(40):
        generator = torch.Generator().manual_seed(100 + seed)
        drawn = HeldOut.draw(task.prior(), Population(paths_of(task, 400, seed)), task.alpha, 1.0, generator)
        _, gain, error, _ = drawn.look(policy)
        gains.append(gain)
        errors.append(error)
    spread, claimed = torch.tensor(gains).std().item(), sum(errors) / 40
    assert 1 / 1.4 < spread / claimed < 1.4
    assert sum(gains) / 40 == pytest.approx(closed, abs=4 * spread / math.sqrt(40))
    assert closed > 10 * spread / math.sqrt(40)


def test_two_policies_are_compared_path_by_path(task):
    """Over 40 sets of 400 paths, two policies that differ by a tenth: the spread of what one gains more is within a factor 1.4 of
    the claimed error (40 leave 11%), and a third of what either gain's own error would say."""
    (first, _), (second, _) = moved(task, 0.7), moved(task, 0.8)
    apart, paired, unpaired = [], [], []
    for seed in range(40):
        generator = torch.Generator().manual_seed(100 + seed)
        drawn = HeldOut.draw(task.prior(), Population(paths_of(task, 400, seed)), task.alpha, 1.0, generator)
        one, two = drawn.look(first), drawn.look(second)
        apart.append(two.gain - one.gain)
        paired.append(drawn.error(two.by_path - one.by_path))
        unpaired.append(math.hypot(one.error, two.error))
    spread = torch.tensor(apart).std().item()
    assert 1 / 1.4 < spread / (sum(paired) / 40) < 1.4
    assert spread < sum(unpaired) / 40 / 3


@pytest.mark.parametrize(("later", "kept"), [(0.65, True), (0.5, False)])
def test_the_last_weights_are_kept_unless_earlier_ones_are_clearly_better(task, later, kept):
    """The share of the optimal shift that gains most on these paths, then a smaller one: kept where the paths do not tell the two
    apart. The error of a gain alone would keep both (the control)."""
    trainer = Trainer(
        task.prior(), task.energy, replace(SMALL, warm_start="value_drift"), policy=policy_of(task.prior()), progress=False
    )
    monitor, weights = trainer.state.monitor, trainer.state.optimization.weights
    paths = Population(paths_of(task, 400))
    held_out = HeldOut.draw(task.prior(), paths, task.alpha, 1.0, torch.Generator().manual_seed(1))
    gains, error = list[float](), 0.0
    for number, factor in enumerate((0.75, later), 1):
        monitor.policy, _ = moved(task, factor)
        weights[0].data.fill_(number)
        found = monitor.watch(held_out)
        gains.append(found["gain"])
        error = found["eubo_se"]
    assert gains[1] < gains[0] < gains[1] + error and monitor.watched.nats == gains[0]
    assert monitor.watched.weights[0].unique().tolist() == [2.0 if kept else 1.0]


def test_where_another_process_holds_more_paths_as_many_are_looked_at_and_the_rest_count_nothing(task):
    """A policy in shards is then evaluated equally often everywhere."""
    paths, policy = Population(paths_of(task, 300)), moved(task, 1.0)[0]
    own, padded = (
        HeldOut.draw(task.prior(), paths, task.alpha, 1.0, torch.Generator().manual_seed(1), most)
        for most in (int, lambda number: number + 7)
    )
    assert len(padded.paths) == len(own.paths) + 7 and padded.eubo == pytest.approx(own.eubo, abs=1e-9)
    one, two = own.look(policy), padded.look(policy)
    assert two[:3] == pytest.approx(one[:3], abs=1e-6)
    assert padded.error(two.by_path - one.by_path[0]) == pytest.approx(own.error(one.by_path - one.by_path[0]), abs=1e-6)


def test_a_restored_set_is_the_same(task):
    held_out = HeldOut.draw(task.prior(), Population(paths_of(task, 300)), task.alpha, 1.0, torch.Generator().manual_seed(1))
    policy, _ = moved(task, 1.0)
    held_out.best = held_out.look(policy).by_path
    again = HeldOut.from_state_dict(task.prior(), held_out.state_dict())
    assert again.look(policy)[:3] == held_out.look(policy)[:3] and again.eubo == held_out.eubo
    assert torch.equal(again.best, held_out.best) and again.best.any()


def at(value):
    return [torch.full((2,), float(value)), torch.full((1,), -float(value))]


def test_the_best_is_kept_and_falls_are_counted():
    kept = Kept(at(0))
    history = []
    for number, nats in enumerate([-0.1, 0.4, 0.35, 0.1, 0.2, 0.5, math.nan, -math.inf, 0.45], 1):
        weights = at(number)
        kept.offer(nats, weights, slack=0.1)
        weights[0].fill_(99.0)  # what is kept is a copy
        history.append((kept.nats, kept.weights[0][0].item(), kept.falls))
    assert history == [
        (0.0, 0.0, 0),  # within the slack of where it began
        (0.4, 2.0, 0),
        (0.4, 2.0, 0),  # below the best, within the slack
        (0.4, 2.0, 1),
        (0.4, 2.0, 2),
        (0.5, 6.0, 0),
        (0.5, 6.0, 1),
        (0.5, 6.0, 2),
        (0.5, 6.0, 0),
    ]
    assert not kept.offer(0.2, at(10), alike=0.3) and kept.offer(0.25, at(11), alike=0.3) and kept.nats == 0.5
    assert not kept.offer(0.1, at(12), alike=0.3), "by steps that are small each, none goes far"
    kept.nats = 0.1
    assert not kept.offer(-0.01, at(12), alike=0.3), "nothing is alike to the prior"
    kept.load_state_dict({"weights": at(6), "nats": 0.5, "falls": 0})
    other = Kept(at(7))
    other.load_state_dict(kept.state_dict())
    assert (other.nats, other.weights[0][0].item(), other.weights[1].item(), other.falls) == (0.5, 6.0, -6.0, 0)


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_the_gain_is_continued_from_a_milder_temperature(task, factor):
    """Paths at twice the target's: the closed form at the target's own within 4 standard errors (p < 1e-4), log h being linear.
    The control: as if they were of the target, the optimal policy is seen to gain nothing, its half to gain most."""
    policy, closed = moved(task, factor)
    paths = Population(paths_of(task, 3000))
    weight = paths.log_weight(2 * task.alpha).double().softmax(0)
    look = HeldOut(task.prior(), paths.trajectories, weight, 2 * task.alpha, 2.0).look(policy)
    assert look.gain == pytest.approx(closed, abs=4 * look.error)
    plain = HeldOut(task.prior(), paths.trajectories, weight, 2 * task.alpha).look(policy)
    assert plain.eubo == look.eubo
    assert plain.gain < look.gain - 5 * plain.error


@pytest.mark.parametrize(
    ("nats", "se", "reached", "said"),
    [
        (0.5, 0.1, "the updates", "closer to the target than the prior by 0.50 ± 0.10 nats"),
        (0.15, 0.1, "the warm start", "not shown to be better than the prior: +0.15 ± 0.10 nats"),
        (-0.3, 0.1, "prior", "NOT BETTER THAN THE PRIOR: the best that was tried has a gap +0.30 ± 0.10 nats"),
        (0.0, 0.0, "prior", "NOT BETTER THAN THE PRIOR: nothing that was tried came closer"),
    ],
)
def test_the_sentence_says_which_of_three_it_is(nats, se, reached, said):
    improvement = Improvement(nats, se, 1.65, reached)
    assert improvement.sentence.startswith(said) and "own gap to the target is 1.65 nats" in improvement.sentence
    assert improvement.sentence.endswith(", and 1.15 are left.") == said.startswith("closer")
    assert improvement.to_dict() == {
        "nats": nats,
        "se": se,
        "gap_prior": 1.65,
        "reached": reached,
        "reach": 1.0,
        "sentence": improvement.sentence,
    }


# --- never worse than the prior -------------------------------------------------------------------------------------------

SMALL = TrainConfig(
    population_size=2000,
    soft_value_updates=30,
    warm_start_updates=40,
    warm_start_rows=256,
    updates=8,
    batch_size=64,
)


def policy_of(prior):
    torch.manual_seed(0)
    return ResidualDenoiser(prior.denoiser, MLPDenoiser(width=16, depth=2, fourier_features=4))


def weights_of(policy):
    return [weight.detach().clone() for weight in policy.parameters() if weight.requires_grad]


def gap_of(task, policy):
    """EUBO - ELBO on 3000 fresh rollouts a side, and its standard error."""
    own = rollout(task.prior(), policy, 3000, torch.Generator().manual_seed(50))
    log_weight = -task.energy(own.terminal).double() / task.alpha - own.step_log_ratio.sum(0).double()
    paths = paths_of(task, 3000, 51)
    reward = -paths.energy.double() / task.alpha
    ratio = step_log_ratio(task.chain, task.prior().denoiser, policy, paths).sum(0).double()
    eubo, error = weighted_mean(reward - ratio, reward.softmax(0))
    return eubo - log_weight.mean().item(), math.hypot(error, log_weight.std().item() / math.sqrt(3000))


def rates(times, **changes):
    return replace(
        SMALL,
        learning_rate=SMALL.learning_rate * times,
        warm_start_learning_rate=SMALL.warm_start_learning_rate * times,
        **changes,
    )


@pytest.mark.parametrize("warm_start", ["tlm", "value_drift"])
@pytest.mark.parametrize("times", [1000.0, 100.0, 0.01])
def test_no_learning_rate_ends_worse_than_the_prior(task, times, warm_start):
    """Within 3 standard errors on fresh paths (p < .002); and what the run says of itself is within 4 of what they show."""
    policy = policy_of(task.prior())
    before = weights_of(policy)
    result = Trainer(task.prior(), task.energy, rates(times, warm_start=warm_start), policy=policy, progress=False).train()
    gap, error = gap_of(task, result.policy)
    gap_prior, error_prior = gap_of(task, task.prior().denoiser)
    assert gap < gap_prior + 3 * math.hypot(error, error_prior)
    said = result.improvement
    assert said.gap_prior == pytest.approx(gap_prior, abs=0.3)
    if said.reached == "prior":
        assert said.sentence.startswith("NOT BETTER THAN THE PRIOR")
        assert all(torch.equal(a, b) for a, b in zip(before, weights_of(result.policy), strict=True))
    else:
        assert said.nats == pytest.approx(gap_prior - gap, abs=4 * math.hypot(said.se, error, error_prior))
        assert said.sentence.startswith("closer" if said.nats >= 2 * said.se else "not shown")
    if times >= 100:
        assert said.reached != "prior" and said.nats > 4 * said.se  # shortened, the steps even help


def test_without_bound_and_kept_weights_the_highest_rate_ends_far_worse(task, monkeypatch):
    """The control for the test above: the warm start `tlm` at 1000 times the rate. How far a run goes that nothing holds is
    chance (18 to 1e30 times the prior's gap, six seeds), so the worst of three counts."""
    monkeypatch.setattr(StepBound, "shorten", lambda self, before, weights, limit: 0.0)
    monkeypatch.setattr(Kept, "offer", lambda self, nats, weights, **rest: self.weights.__setitem__(slice(None), weights))
    configs = [rates(1000.0, seed=seed) for seed in range(3)]
    results = [Trainer(task.prior(), task.energy, one, policy=policy_of(task.prior()), progress=False).train() for one in configs]
    bar = 100 * gap_of(task, task.prior().denoiser)[0]
    assert not all(gap_of(task, result.policy)[0] < bar for result in results)


@pytest.mark.parametrize("sabotaged", [True, False])
def test_a_warm_start_away_from_the_target_ends_at_the_prior(task, monkeypatch, sabotaged):
    """The target with its sign turned: bit for bit the prior's weights, after a fraction of the updates, and without a judge who
    might take noise for a gain. With the right sign the same run comes closer."""
    target = ValueDrift.target
    if sabotaged:
        monkeypatch.setattr(ValueDrift, "target", lambda self, *given: -target(self, *given))
    config = replace(SMALL, warm_start="value_drift", updates=0)
    policy = policy_of(task.prior())
    before = weights_of(policy)
    trainer = Trainer(task.prior(), task.energy, config, policy=policy, progress=False)
    result = trainer.train()
    same = all(torch.equal(a, b) for a, b in zip(before, weights_of(result.policy), strict=True))
    said = result.improvement
    paid = result.energy_calls - config.population_size - config.population_size // 4
    assert same == sabotaged and (said.reached == "prior") == sabotaged
    if sabotaged:
        assert said.sentence.startswith("NOT BETTER THAN THE PRIOR: nothing that was tried came closer")
        assert result.history[-1]["update"] < 0.5 * config.warm_start_updates
        assert paid < JUDGED
    else:
        assert said.sentence.startswith("closer to the target") and said.reached == "the warm start"
        assert JUDGED <= paid < 2 * JUDGED


def test_updates_that_ruin_a_policy_end_at_the_warm_start(task, monkeypatch):
    """Gradients of the updates with their sign turned: the policy is the one that the warm start reached, to the last bit."""
    backward = updates.backward_trajectories

    def turned(policy, chain, paths, g, *rest, **more):
        backward(policy, chain, paths, -g, *rest, **more)

    monkeypatch.setattr(updates, "backward_trajectories", turned)
    ends = []
    for count in (0, 8):
        config = replace(SMALL, warm_start="value_drift", learning_rate=0.1, step_nats=2.0, updates=count)
        result = Trainer(task.prior(), task.energy, config, policy=policy_of(task.prior()), progress=False).train()
        ends.append((weights_of(result.policy), result.improvement))
    assert ends[1][1].reached == "the warm start" and ends[0][1] == ends[1][1]
    assert all(torch.equal(a, b) for a, b in zip(ends[0][0], ends[1][0], strict=True))


@pytest.mark.parametrize("seed", range(3))
def test_warm_start_and_updates_are_judged_by_the_same_noise(task, monkeypatch, seed):
    """Updates that change next to nothing are judged alike to .001 nats; rollouts of another noise differ by some .1."""
    judged, offer = [], Kept.offer

    def noted(self, nats, weights, **rest):
        if "slack" not in rest:  # the watch has it
            judged.append(nats)
        return offer(self, nats, weights, **rest)

    monkeypatch.setattr(Kept, "offer", noted)
    config = replace(SMALL, learning_rate=1e-6, seed=seed)
    result = Trainer(task.prior(), task.energy, config, policy=policy_of(task.prior()), progress=False).train()
    assert result.improvement.reached == "the updates", "and they win a tie"
    monkeypatch.setitem(OFFSETS, "judging", OFFSETS["judging"] + 7)
    Trainer(task.prior(), task.energy, replace(config, updates=0), policy=policy_of(task.prior()), progress=False).train()
    before, after, other = judged
    assert before != after and after == pytest.approx(before, abs=1e-3)
    assert abs(other - before) > 5e-3, "the control: the same warm start by other rollouts"


@pytest.mark.parametrize("reached", [True, False])
def test_a_target_beyond_the_paths_is_seen_from_a_milder_one_and_that_is_said(task, monkeypatch, reached):
    """Few of 500 held-out paths are effective. They stand for one where 1 in 40 is, and the sentence says it. What was
    learned there and continued takes more than half of log Z - ELBO. The control may use any share, and says nothing."""
    steep = LinearGaussian(task.chain, torch.zeros(2, dtype=torch.float64), torch.tensor([3.4, -1.7], dtype=torch.float64))
    if reached:
        monkeypatch.setattr("tiltune.finetune.populations.population.ENOUGH", 0.0)
        monkeypatch.setattr("tiltune.finetune.populations.population.FEWEST", 0)
    config = replace(SMALL, warm_start="value_drift", warm_start_updates=120, soft_value_updates=100, updates=0)
    config = replace(config, population="importance")
    trainer = Trainer(steep.prior(), steep.energy, config, policy=policy_of(steep.prior()), progress=False)
    result = trainer.train()
    said = result.improvement
    assert (said.reach == 1) == reached == ("too few prior samples have weight at this alpha" not in said.sentence)
    assert trainer.state.preparation.held_out.alpha == pytest.approx(said.reach * steep.alpha)
    own = rollout(steep.prior(), result.policy, 3000, torch.Generator().manual_seed(50))
    elbo = (-steep.energy(own.terminal).double() / steep.alpha - own.step_log_ratio.sum(0).double()).mean().item()
    assert steep.log_z - elbo < 0.5 * steep.log_z  # of the prior itself ELBO is 0
