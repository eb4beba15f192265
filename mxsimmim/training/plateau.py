"""The best validation so far, and what follows from validations that do not improve on it."""
from typing import Any, Dict, Optional

from ..config import TrainConfig


class PlateauTracker:
    """Counts validations without a new best; `state` is what an earlier process's `state()` returned.

    Validations are the same numbers in all workers, so all come to the same conclusions.
    """

    def __init__(self, train: TrainConfig, state: Optional[Dict[str, Any]] = None):
        self._train = train
        self._state = state or {'best': None, 'without': 0, 'patient': 0, 'factor': 1.0}

    @property
    def factor(self) -> float:
        """The factor of the schedule's learning rate."""
        return self._state['factor']

    @property
    def ended(self) -> bool:
        """Whether the run has gone long enough without a new best."""
        return 0 < self._train.stop_early <= self._state['without']

    def observe(self, score: float) -> bool:
        """Takes note of a validation, the higher the better; returns whether it is a new best. NaN is none."""
        best, without, patient, factor = (self._state[key] for key in ('best', 'without', 'patient', 'factor'))
        better = score == score if best is None else score > best
        if better:
            best, without, patient = score, 0, 0
        else:
            without, patient = without + 1, patient + 1
            if patient == self._train.patience:
                patient, factor = 0, factor * self._train.lr_on_plateau
        self._state = {'best': best, 'without': without, 'patient': patient, 'factor': factor}
        return better

    def state(self) -> Dict[str, Any]:
        """Returns what a checkpoint records of it, JSON-ready."""
        return dict(self._state)
