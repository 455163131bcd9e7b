"""What is minimized, and on how many workers."""

from __future__ import annotations

from dataclasses import dataclass

from .refusals import refuse


@dataclass(frozen=True)
class EnergyConfig:
    """What is minimized, at the temperature alpha."""

    terms: tuple[str, ...] = ()
    """FILE.py:NAME or package.module:NAME, summed; 0.5*FILE.py:NAME carries a scale, NAME(3) is called to make the energy.
    A task's own energies need no module."""
    cache: bool = False
    """Remember energies of samples seen before."""
    workers: int = 0
    """Processes beside each training process that load the energy and share the rows of a batch, while the next one is drawn; or
    threads, for a function and for remote scorers. 0: the energy is called where the training runs."""
    timeout: float | None = None
    """Seconds for a batch; then hung workers are killed and it is asked again, twice, before the run stops with a checkpoint.
    None: no limit."""

    def __post_init__(self) -> None:
        refuse(isinstance(self.terms, str), f"terms is {self.terms!r}; it is a tuple of terms: ({self.terms!r},).")
        refuse(not all(term.strip() for term in self.terms), "an energy term is empty; write it as FILE.py:NAME.")
        refuse(self.workers < 0, f"workers is {self.workers}; it must not be negative.")
        refuse(
            self.timeout is not None and not 0 < self.timeout < float("inf"),
            f"timeout is {self.timeout}; give positive seconds, or None.",
        )
        refuse(
            self.timeout is not None and not self.workers,
            "timeout needs workers: an energy that hangs where the training runs cannot be killed without it.",
        )
