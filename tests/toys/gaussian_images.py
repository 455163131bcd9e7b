"""A Gaussian-mixture prior over 16 x 16 images: inpainting whose posterior is known in closed form, 256 dimensions.

Four components, each a stationary random field around its own smooth pattern, with an exponential covariance: neighbors agree,
so that what is measured says something of what is not. The prior is the exact denoiser of this mixture, the policy that prior
plus a residual network, and the truth the mixture tilted by the measurement (`GaussianMixture.tilt_quadratic`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tiltune.samplers.chain import Chain
from tiltune.samplers.condition import Condition
from tiltune.samplers.denoiser import Denoiser
from tiltune.tasks.gaussian_mixture import GaussianMixture, MixtureDenoiser
from tiltune.tasks.inpainting import Inpainting, measure

if TYPE_CHECKING:
    from tiltune.samplers.prior import Prior

SIZE = 16
WEIGHTS = (0.4, 0.3, 0.2, 0.1)
AMPLITUDE = 0.6  # of the patterns
VARIANCE, NUGGET = 0.12, 0.02  # of a pixel around its component's mean; the nugget is the part without neighbors
BLURS = (0.1, 1.0, 2.0, 4.0, 8.0)  # pixels; the first blurs nothing
LENGTHS = (4.0, 8.0, 4.0, 8.0)  # pixels over which a component's correlation falls by e


def _patterns() -> Tensor:
    """[4, 256]: bright left, bright right, a bright disk, horizontal bands."""
    axis = torch.linspace(-1, 1, SIZE, dtype=torch.float64)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    disk = 1.4 * torch.exp(-2 * (x**2 + y**2)) - 0.7
    return AMPLITUDE * torch.stack([-x, x, disk, (math.pi * 2 * y).sin()]).flatten(1)


@cache
def image_mixture() -> GaussianMixture:
    """The prior: weights [4], means [4, 256], covariances [4, 256, 256]."""
    axis = torch.arange(float(SIZE), dtype=torch.float64)
    points = torch.cartesian_prod(axis, axis)
    distance = torch.cdist(points, points)
    fields = [(VARIANCE - NUGGET) * torch.exp(-distance / length) + NUGGET * torch.eye(SIZE**2) for length in LENGTHS]
    return GaussianMixture(torch.tensor(WEIGHTS, dtype=torch.float64), _patterns(), torch.stack(fields))


def build_chain(steps: int = 50) -> Chain:
    """DDPM, cosine, large variance, trailing: it forgets its start, and its last step draws the noise of its first label."""
    from diffusers import DDPMScheduler

    from tiltune.samplers.schedulers.dispatch import chain_from_scheduler

    options = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction", "clip_sample": False}
    return chain_from_scheduler(DDPMScheduler(variance_type="fixed_large", timestep_spacing="trailing", **options), steps)


@dataclass(frozen=True, eq=False)
class GaussianImages:
    """Inpainting under the mixture, seen through a chain whose states are flat images [B, 256].

    alpha: the temperature; the posterior proper is at 1.
    """

    chain: Chain
    energy: Inpainting
    alpha: float = 1.0

    def prior(self) -> Prior:
        """The exact denoiser of the mixture; samples are images [B, 1, 16, 16]."""
        from tiltune.samplers.prior import Prior

        denoiser = MixtureDenoiser(image_mixture(), self.chain)
        return Prior(denoiser, self.chain, (SIZE**2,), lambda state: state.reshape(-1, 1, SIZE, SIZE))

    @cached_property
    def _tilt(self) -> tuple[GaussianMixture, Tensor]:
        measured = self.energy.measured.flatten().double()
        precision = (measured / (self.alpha * self.energy.std**2)).diag()
        center = self.energy.value.flatten().double()
        return image_mixture().tilt_quadratic(precision, center, torch.zeros_like(center))

    @property
    def posterior(self) -> GaussianMixture:
        """p_prior · exp(-E/alpha), normalized, for the ideal prior."""
        return self._tilt[0]

    @property
    def log_z(self) -> float:
        """log of its normalizer, nats."""
        return self._tilt[1].item()

    @cached_property
    def prior_ess(self) -> float:
        """Effective share of ideal prior samples weighted by exp(-E/alpha): Z(E/alpha)² / Z(2 E/alpha)."""
        doubled = GaussianImages(self.chain, self.energy, self.alpha / 2)
        return math.exp(2 * self.log_z - doubled.log_z)

    def policy(self) -> MixtureDenoiser:
        """The exact denoiser of the posterior on the same chain: what a trained policy is measured against."""
        return MixtureDenoiser(self.posterior, self.chain)


class GuidedDenoiser(nn.Module):
    """A trainable policy for inpainting on a frozen prior: x_hat moved by a learned response to what is measured.

        x_hat' = x_hat + sum_j g_j G_j r + sum_i c_i P_i,        r = (value - x_hat) / std on measured pixels, 0 elsewhere

    G_j blur r over different widths, P_i are learned images (between components, a posterior moves by whole patterns), and the
    gains g and c come from a small network of the step and of a few learned readings of x_hat and r. Starts at the prior: the
    gains are zero. A network of the state alone has to find all of this in 256 dimensions: 2.5 nats of gap were left to it
    after 150 updates, where this one had 1.0 after 120.
    """

    def __init__(self, prior: Denoiser, chain: Chain, problem: Inpainting, patterns: int = 12, hidden: int = 64) -> None:
        super().__init__()
        self._frozen = (prior, chain, problem)  # in a tuple: nothing of these is trained or saved
        axis = torch.arange(float(SIZE))
        points = torch.cartesian_prod(axis, axis)
        squared = torch.cdist(points, points).square()
        blurs = [torch.exp(-0.5 * squared / width**2) for width in BLURS]
        self.register_buffer("blurs", torch.stack([blur / blur.sum(1).mean() for blur in blurs]), persistent=False)
        self.readings = nn.Linear(2 * SIZE**2, patterns)
        self.patterns = nn.Parameter(0.05 * torch.randn(patterns, SIZE**2))
        self.hidden = nn.Sequential(nn.Linear(13 + patterns, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU())
        self.gains = nn.Linear(hidden, len(BLURS) + patterns)
        nn.init.zeros_(self.gains.weight)
        nn.init.zeros_(self.gains.bias)

    def forward(self, state: Tensor, timestep: Tensor, condition: Condition | None = None) -> Tensor:
        prior, chain, problem = self._frozen
        with torch.no_grad():
            output = prior(state, timestep, condition)
            step = (timestep.reshape(-1, 1).cpu().double() - chain.timesteps).abs().argmin(-1)
            p, q = (column[step].to(state)[:, None] for column in (chain.p, chain.q))
            clean = p * state + q * output
            residual = torch.zeros_like(clean)
            residual[:, problem.measured.flatten()] = -problem.residual(clean.reshape(-1, 1, SIZE, SIZE))
            blurred = torch.einsum("np,wpq->nwq", residual, self.blurs)
        label = (timestep.reshape(-1, 1).to(state) / 1000).expand(len(state), 1)
        waves = label * math.pi * 2.0 ** torch.arange(6)
        readings = self.readings(torch.cat([clean, residual], 1)) / 4
        gains = self.gains(self.hidden(torch.cat([label, waves.sin(), waves.cos(), readings], 1)))
        response = (gains[:, : len(BLURS), None] * blurred).sum(1) + gains[:, len(BLURS) :] @ self.patterns
        return output + response / q


def draw(mixture: GaussianMixture, count: int, generator: torch.Generator) -> Tensor:
    """Images [count, 1, 16, 16] of a mixture over flat images, float32, one component after the other: in 256 dimensions
    `GaussianMixture.sample` would hold a matrix for each image."""
    component = torch.multinomial(mixture.weights, count, replacement=True, generator=generator)
    noise = torch.randn(count, SIZE**2, generator=generator, dtype=torch.float64)
    images = mixture.means[component]
    for index, factor in enumerate(torch.linalg.cholesky(mixture.covariances)):
        images[component == index] += noise[component == index] @ factor.T
    return images.reshape(-1, 1, SIZE, SIZE).float()


def inpainting(region: str = "upper", std: float = 0.75, every: int = 2, seed: int = 3) -> Inpainting:
    """Measure an image drawn from the mixture itself; ``seed`` draws image and noise.

    The default keeps 1.2% of ideal prior samples effective and leaves two components of the posterior with weight.
    """
    (image,) = draw(image_mixture(), 1, torch.Generator().manual_seed(seed))
    return measure(image, region, std, every=every, seed=seed)
