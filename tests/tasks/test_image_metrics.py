"""The image tasks' metrics against closed forms and independent computations; each with a sample that it must reject."""

import math

import numpy as np
import pytest
import torch
from scipy import linalg

from tiltune.finetune.certificate.evidence import Evidence
from tiltune.finetune.estimators import even, pairwise_distance
from tiltune.tasks.inpainting import measure, measured_pixels
from tiltune.tasks.metrics.diversity import diversity_metrics
from tiltune.tasks.metrics.images import class_shares, energy_tv, image_metrics, inpainting_metrics, w2_metrics, wanted_metrics
from tiltune.tasks.metrics.moments import moment_metrics, moments
from tiltune.tasks.metrics.principal_components import frechet, frechet_with_error, pixel_basis
from tiltune.tasks.metrics.samples import effective
from toys import gaussian_images
from toys.exact_moments import exact_moments
from toys.gaussian_images import GaussianImages, build_chain, draw, image_mixture


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def evidence_of(samples, energy, prior_samples, prior_energy):
    """Evidence whose log-ratios say nothing: these metrics look at samples and energies."""
    zero, prior_zero = torch.zeros(len(samples)), torch.zeros(len(prior_samples))
    return Evidence(1.0, samples, energy, zero, prior_samples, prior_energy, prior_zero, torch.zeros(1), None, 0)


# --- Fréchet distance and principal components


def test_frechet_of_a_shift_and_of_a_scale():
    x = normal(4000, 3)
    assert frechet(x, x + torch.tensor([1.0, 2.0, 2.0])) == pytest.approx(9.0, rel=1e-9)
    spread = torch.cov(x.T).trace().item()
    assert frechet(x, 2 * (x - x.mean(0)) + x.mean(0)) == pytest.approx(spread, rel=1e-9)
    assert frechet(x, x) == pytest.approx(0.0, abs=1e-9)


def test_frechet_agrees_with_the_matrix_square_root():
    x, y = normal(500, 4) @ normal(4, 4, seed=1), normal(700, 4, seed=2) @ normal(4, 4, seed=3) + 0.3
    cov_x, cov_y = np.cov(x.T), np.cov(y.T)
    cross = linalg.sqrtm(cov_x @ cov_y).real
    expected = (x.mean(0) - y.mean(0)).square().sum().item() + np.trace(cov_x + cov_y - 2 * cross)
    assert frechet(x, y) == pytest.approx(expected, rel=1e-6)


def test_frechet_error_is_that_of_repeated_draws():
    """The jackknife against 30 fresh pairs of 1000: the spread of 30 is known to 13%, the jackknife of 10 groups to 24%."""
    pairs = [(normal(1000, 3, seed=2 * s), 1.5 * normal(1000, 3, seed=2 * s + 1)) for s in range(30)]
    values, errors = zip(*(frechet_with_error(x, y) for x, y in pairs), strict=True)
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.5)


def test_the_basis_is_the_singular_vectors():
    images = (normal(300, 12) * torch.linspace(3, 0.1, 12)).reshape(300, 1, 3, 4)
    basis = pixel_basis(images, 4)
    centered = images.flatten(1) - images.flatten(1).mean(0)
    _, values, vectors = torch.linalg.svd(centered, full_matrices=False)
    assert basis(images).abs().numpy() == pytest.approx((centered @ vectors[:4].T).abs().numpy(), abs=1e-6)
    assert basis.share == pytest.approx((values[:4].square().sum() / values.square().sum()).item())


# --- a tilt with a closed form: N(0, I) by exp(0.7 x_0) is N(0.7 e_0, I)

TILT = 0.7


@pytest.fixture(scope="module")
def tilted():
    """(policy samples of the exact tilted law, prior samples, weights of these); 5 coordinates."""
    prior, exact = normal(20_000, 5), normal(8000, 5, seed=1)
    exact[:, 0] += TILT
    return exact, prior, (TILT * prior[:, 0]).softmax(0)


def test_fewer_images_than_pixels_have_the_components_of_the_whole_covariance() -> None:
    images = torch.randn(20, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    basis, flat = pixel_basis(images, 5), images.flatten(1) - images.flatten(1).mean(0)
    values, vectors = torch.linalg.eigh(flat.T @ flat / 19)
    assert basis.share == pytest.approx((values[-5:].sum() / values.sum()).item())
    assert torch.allclose((basis.axes.T @ vectors[:, -5:].flip(1)).abs(), torch.eye(5, dtype=torch.float64), atol=1e-8)


def test_w2_ratio_is_one_for_an_exact_sampler_and_more_for_the_prior(tilted):
    """Within 4 standard errors; sets are no larger than the effective size of an eighth of the prior samples."""
    exact, prior, weight = tilted
    metrics = w2_metrics(exact, prior, weight, torch.Generator().manual_seed(0), most=400)
    assert abs(metrics["w2_ratio"] - 1) < 4 * metrics["w2_ratio_se"] < 0.2
    assert metrics["w2_size"] == 400 < effective(weight) / 8
    wrong = w2_metrics(prior[:8000], prior, weight, torch.Generator().manual_seed(0), most=400)
    assert wrong["w2_ratio"] - 1 > 4 * wrong["w2_ratio_se"]


def test_w2_of_too_few_effective_samples_is_unknown(tilted):
    exact, prior, _ = tilted
    metrics = w2_metrics(exact, prior, (20 * prior[:, 0]).softmax(0), torch.Generator().manual_seed(0))
    assert metrics["w2_size"] < 10 and math.isnan(metrics["w2_ratio"])


def test_energy_tv_accepts_the_exact_law_and_rejects_the_prior(tilted):
    """The null is a 99.7% quantile; the prior's energies are off by the closed form's .27."""
    exact, prior, weight = tilted
    distance, null = energy_tv(-TILT * exact[:, 0], -TILT * prior[:, 0], weight, torch.Generator().manual_seed(0))
    assert distance < null < 0.06
    wrong, _ = energy_tv(-TILT * prior[:, 0], -TILT * prior[:, 0], weight, torch.Generator().manual_seed(0))
    # Between N(0, 1) and N(.7, 1): 2 Phi(.35) - 1 = .274, a little less on ten bins.
    assert 0.25 < wrong < 0.29


def test_class_shares_and_their_errors(tilted):
    """P(x_0 > 1) under the tilt is Phi(-.3) = .3821, in 3 errors; the errors against 40 fresh draws, known to 11%."""
    _, prior, weight = tilted
    share, error = class_shares((prior[:, 0] > 1).long(), weight, 2)
    assert share.sum() == pytest.approx(1.0)
    assert abs(share[1] - 0.38209) < 3 * error[1]
    repeats = []
    for seed in range(40):
        fresh = normal(2000, 1, seed=100 + seed)[:, 0]
        repeats.append(class_shares((fresh > 1).long(), (TILT * fresh).softmax(0), 2))
    spread = torch.stack([share for share, _ in repeats])[:, 1].std()
    assert repeats[0][1][1] == pytest.approx(spread.item(), rel=0.35)


# --- diversity


def test_pairwise_distance_is_the_double_sum():
    x, weight = normal(40, 3), torch.rand(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weight[3] = 0
    top = sum(weight[i] * weight[j] * (x[i] - x[j]).norm() for i in range(40) for j in range(40) if i != j)
    bottom = sum(weight[i] * weight[j] for i in range(40) for j in range(40) if i != j)
    assert pairwise_distance(x, weight, chunk=7)[0] == pytest.approx((top / bottom).item(), rel=1e-5)


def test_pairwise_distance_and_its_error_under_a_tilt():
    """One coordinate: 2 / sqrt(pi), whatever the tilt, within 4 errors; the error against 40 fresh draws, known to 11%."""
    values, errors = [], []
    for seed in range(40):
        x = normal(1000, 1, seed=seed)
        value, error = pairwise_distance(x, (TILT * x[:, 0]).softmax(0))
        values.append(value)
        errors.append(error)
    assert abs(np.mean(values) - 2 / math.sqrt(math.pi)) < 4 * np.std(values) / math.sqrt(40)
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.35)


def test_pairwise_distance_of_one_sample_is_unknown():
    assert math.isnan(pairwise_distance(normal(1, 3), even(1))[0])


def test_diversity_is_one_for_the_exact_law_less_for_a_collapse_and_nan_for_a_lost_class(tilted):
    exact, prior, weight = tilted[0][:4000], tilted[1][:6000], tilted[2][:6000] / tilted[2][:6000].sum()
    labels = [(part[:, 1] > 0).long() for part in (exact, prior)]
    metrics = diversity_metrics(exact, labels[0], prior, labels[1], weight, (0, 1))
    assert abs(metrics["diversity"] - 1) < 4 * metrics["diversity_se"] < 0.1
    center = torch.stack([exact[labels[0] == label].mean(0) for label in (0, 1)])[labels[0]]
    shrunk = diversity_metrics(center + 0.6 * (exact - center), labels[0], prior, labels[1], weight, (0, 1))
    assert shrunk["diversity"] == pytest.approx(0.6, abs=0.02)
    lost = diversity_metrics(exact[labels[0] == 0], labels[0][labels[0] == 0], prior, labels[1], weight, (0, 1))
    assert math.isnan(lost["diversity"])


# --- posterior mean and spread


def test_moments_under_a_tilt():
    """Mean .7 in one coordinate, spreads 1: within the nulls against the closed form; the untilted sample is not."""
    prior = normal(4000, 5)
    truth = exact_moments(TILT * torch.eye(5, dtype=torch.float64)[0], torch.ones(5, dtype=torch.float64))
    everywhere, generator = torch.ones(5, dtype=torch.bool), torch.Generator().manual_seed(0)
    metrics = moment_metrics(moments(prior, (TILT * prior[:, 0]).softmax(0)), truth, everywhere, generator)
    assert metrics["mean_error"] < metrics["mean_error_null"] < 0.06
    assert metrics["spread_error"] < metrics["spread_error_null"] < 0.06
    assert metrics["spread_ratio"] == pytest.approx(1.0, abs=0.03)
    wrong = moment_metrics(moments(prior, even(4000)), truth, everywhere, generator)
    assert wrong["mean_error"] > 5 * wrong["mean_error_null"]


def test_a_policy_that_diverged_has_no_metrics():
    prior = normal(100, 3)
    broken = torch.full((100, 3), torch.nan)
    pixels = torch.ones(3, dtype=torch.bool)
    metrics = moment_metrics(moments(broken, even(100)), moments(prior, even(100)), pixels, torch.Generator())
    assert all(math.isnan(value) for value in metrics.values())


def test_the_nulls_hold_what_repeated_draws_show():
    """60 draws of 500 correlated coordinates each: at most 3 beyond a 99.7% null (p < 1e-4), most above half of it."""
    mixing = normal(4, 12, seed=99)
    truth = exact_moments(torch.zeros(12), mixing.square().sum(0).sqrt())
    generator = torch.Generator().manual_seed(0)
    shares = {"mean_error": [], "spread_error": []}
    for seed in range(60):
        metrics = moment_metrics(moments(normal(500, 4, seed=seed) @ mixing, even(500)), truth, torch.arange(12) >= 0, generator)
        for name in shares:
            shares[name].append(metrics[name] / metrics[f"{name}_null"])
    for name, found in shares.items():
        assert sum(share > 1 for share in found) <= 3, name
        assert np.mean(found) > 0.3, "a null that is far too wide would accept anything"


# --- inpainting with a posterior in closed form


@pytest.fixture(scope="module")
def inpainting():
    problem = GaussianImages(build_chain(10), gaussian_images.inpainting(std=1.0))
    generator = torch.Generator().manual_seed(0)
    return problem, draw(image_mixture(), 6000, generator), draw(problem.posterior, 2000, generator)


def test_what_is_measured():
    assert measured_pixels("upper", 16, 1).sum() == 128 and measured_pixels("upper", 16, 1)[:8].all()
    box = measured_pixels("box", 16, 2)
    assert box.sum() == 16 and box[4, 4] and not box[4, 5] and not box[3].any()
    with pytest.raises(ValueError, match="upper, box"):
        measured_pixels("left", 16, 1)
    with pytest.raises(ValueError, match="every second"):
        measured_pixels("upper", 16, 0)
    with pytest.raises(ValueError, match="noise_std"):
        measure(torch.zeros(1, 16, 16), "upper", 0.0, every=1, seed=0)


def test_the_measurement_energy_is_the_gaussian_likelihood(inpainting):
    problem, prior, _ = inpainting
    energy, (row, column) = problem.energy, problem.energy.measured[0].nonzero(as_tuple=True)
    seen = prior[:7, 0, row, column] - energy.value[0, row, column]
    likelihood = torch.distributions.Normal(0.0, energy.std).log_prob(seen).sum(1)
    constant = torch.distributions.Normal(0.0, energy.std).log_prob(torch.zeros(len(row))).sum()
    assert energy(prior[:7]).numpy() == pytest.approx((constant - likelihood).numpy(), rel=1e-5)
    assert energy.residual(prior[:7]).square().sum(1).numpy() / 2 == pytest.approx(energy(prior[:7]).numpy(), rel=1e-5)


def test_weighted_prior_samples_have_the_closed_form_of_log_z_and_effective_size(inpainting):
    """6000 ideal prior samples; log Z within 4 errors, the effective share within a third of its closed form."""
    problem, prior, _ = inpainting
    log_weight = -problem.energy(prior).double()
    share = effective(log_weight.softmax(0)) / len(prior)
    log_z = log_weight.logsumexp(0).item() - math.log(len(prior))
    assert abs(log_z - problem.log_z) < 4 / math.sqrt(share * len(prior)) < 0.5
    assert share == pytest.approx(problem.prior_ess, rel=0.35)


def test_exact_posterior_samples_match_weighted_prior_samples_and_the_prior_does_not(inpainting):
    problem, prior, exact = inpainting
    generator = torch.Generator().manual_seed(0)
    metrics = inpainting_metrics(
        evidence_of(exact, problem.energy(exact), prior, problem.energy(prior)), problem.energy, generator
    )
    for pixels in ("measured", "unmeasured"):
        assert metrics[f"mean_error_{pixels}"] < metrics[f"mean_error_null_{pixels}"]
        assert metrics[f"spread_error_{pixels}"] < metrics[f"spread_error_null_{pixels}"]
        assert metrics[f"spread_ratio_{pixels}"] == pytest.approx(1.0, abs=0.1)
    error = math.hypot(metrics["residual_se"], metrics["residual_reference_se"])
    assert abs(metrics["residual"] - metrics["residual_reference"]) < 4 * error
    wrong = inpainting_metrics(
        evidence_of(prior[:2000], problem.energy(prior[:2000]), prior, problem.energy(prior)), problem.energy, generator
    )
    assert wrong["mean_error_unmeasured"] > wrong["mean_error_null_unmeasured"]
    assert wrong["residual"] > metrics["residual"] + 0.1


def test_exact_posterior_samples_match_the_closed_form(inpainting):
    problem, _, exact = inpainting
    mean, covariance = problem.posterior.moments()
    truth = exact_moments(mean, covariance.diagonal().sqrt())
    generator = torch.Generator().manual_seed(0)
    found = moment_metrics(moments(exact, even(len(exact))), truth, torch.ones(256, dtype=torch.bool), generator)
    assert found["mean_error"] < found["mean_error_null"] < 0.05
    assert found["spread_error"] < found["spread_error_null"] < 0.05


# --- all metrics together


class Brightness(torch.nn.Module):
    """Class 1 where the middle pixel is bright."""

    def forward(self, images):
        middle = images[:, 0, 8, 8]
        return torch.stack([-middle, middle], 1)


def test_image_figures_see_a_tilt_of_brightness():
    prior = draw(image_mixture(), 4000, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)

    def energy(x):
        return -2.0 * x[:, 0, 8, 8]

    def tilted(count):
        slope = torch.zeros(256, dtype=torch.float64)
        slope[8 * 16 + 8] = -2.0
        law, _ = image_mixture().tilt_quadratic(torch.zeros(256, 256, dtype=torch.float64), torch.zeros(256).double(), slope)
        return draw(law, count, torch.Generator().manual_seed(2))

    exact = tilted(2000)
    evidence = evidence_of(exact, energy(exact), prior, energy(prior))
    metrics = image_metrics(evidence, Brightness(), generator, classes=2) | wanted_metrics(evidence, Brightness(), (1,))
    assert metrics["class_tv"] < metrics["class_tv_null"]
    assert metrics["energy_tv"] < metrics["energy_tv_null"]
    assert abs(metrics["w2_ratio"] - 1) < 4 * metrics["w2_ratio_se"]
    error = math.hypot(metrics["share_se"], metrics["share_reference_se"])
    assert abs(metrics["share"] - metrics["share_reference"]) < 4 * error
    assert metrics["share"] == pytest.approx(metrics["class_shares"][1], abs=1e-4)
    assert abs(metrics["diversity"] - 1) < 4 * metrics["diversity_se"]
    wrong = evidence_of(prior[:2000], energy(prior[:2000]), prior, energy(prior))
    metrics = image_metrics(wrong, Brightness(), generator, classes=2)
    assert metrics["class_tv"] > 2 * metrics["class_tv_null"]
    assert metrics["energy_tv"] > 2 * metrics["energy_tv_null"]
