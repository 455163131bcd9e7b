"""What the shipped tasks share."""

import torch

from tiltune.finetune.energies.cache import CachedEnergy
from tiltune.finetune.energies.weighted_sum import WeightedSum
from tiltune.finetune.energies.workers.pool import EnergyPool
from tiltune.tasks.classifier import ClassEnergy
from tiltune.tasks.task import energy_terms


def ink(x):
    return x.sum(1)


class Stranger:
    """An energy of somebody's own, with attributes that mean something else."""

    energy, terms = "kinetic", 12

    def __call__(self, x):
        return torch.zeros(len(x))


def test_terms_are_found_in_sums_behind_a_memory_or_not_and_nowhere_else():
    stranger = Stranger()
    total = WeightedSum({"ink": (2.0, ink), "own": (1.0, stranger)})
    for energy, terms in ((total, [ink, stranger]), (ink, [ink]), (stranger, [stranger])):
        assert energy_terms(energy) == terms
        assert energy_terms(CachedEnergy(energy)) == terms
        assert energy_terms(EnergyPool(energy, 2)) == terms
        assert energy_terms(CachedEnergy(EnergyPool(energy, 2))) == terms


def test_terms_of_the_tasks_own_module_are_found_behind_worker_processes(tmp_path):
    """No worker is started, and the code of others is not loaded here."""
    other = tmp_path / "other.py"
    other.write_text("raise AssertionError('loaded')")
    pool = EnergyPool(("0.5*classes(3)", f"{other}:energy"), 2, search="tiltune.tasks.digits")
    for energy in (pool, CachedEnergy(pool)):
        [term] = energy_terms(energy)
        assert isinstance(term, ClassEnergy) and term.wanted == (3,)
    assert energy_terms(EnergyPool((f"{other}:energy",), 2, search="tiltune.tasks.digits")) == []
