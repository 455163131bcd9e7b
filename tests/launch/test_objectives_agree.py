"""The whole task, minutes each: run with `pytest -m slow -n 2`."""

import json

import pytest

from tiltune.launch.verbs import two_d

OBJECTIVES = ("rtb", "log_variance", "trust_pcl", "reinforce_kl")
pytestmark = pytest.mark.slow


def certificate_of(tmp_path, **options):
    status = two_d.single(two_d.Options(out=tmp_path / "run", **options))
    return status, json.loads((tmp_path / "run" / "certificate.json").read_text())


@pytest.mark.parametrize("chain", ["ddpm", "brownian"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_reaches_the_target(tmp_path, chain, objective):
    status, certificate = certificate_of(tmp_path, objective=objective, chain=chain)
    assert status == 0, certificate["reasons"]
    assert certificate["energy_calls"] <= 100_000
    if chain == "ddpm":
        # On brownian one heavy weight of 40000 has been seen to take it to .7; it scatters, and the verdict leaves it out.
        assert certificate["ess"] / certificate["ess_reference"] >= 0.9


@pytest.mark.parametrize("seed", range(1, 10))
def test_every_seed_passes(tmp_path, seed):
    status, certificate = certificate_of(tmp_path, seed=seed)
    assert status == 0, certificate["reasons"]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_objective_does_the_work_without_a_warm_start(tmp_path, objective):
    _, certificate = certificate_of(tmp_path, objective=objective, warm_start="none")
    assert certificate["w2_ratio"] <= 1.2
    assert certificate["mode_tv"] <= 0.06
    assert certificate["energy_calls"] <= 250_000


def test_compare_finds_the_published_mistake(tmp_path):
    assert two_d.compare(two_d.Options(compare=True, out=tmp_path / "run")) == 0
