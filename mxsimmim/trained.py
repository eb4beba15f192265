"""What a run has trained, ready to be used."""
from pathlib import Path
from typing import NamedTuple, Tuple, Union

from . import checkpoint
from .config import Config
from .interop import official
from .models import Classifier, SimMIM, build_classifier, build_simmim
from .run import read_config


class Trained(NamedTuple):
    """A run's network with its weights, on cpu(0)."""
    config: Config
    net: Union[SimMIM, Classifier]
    classes: Tuple[str, ...]  # their names in the order of the logits; empty after pre-training
    step: int


def load_run(run: Path) -> Trained:
    """The network of a run folder: of its best checkpoint where it kept one, else of its newest.

    The averaged weights are taken where the run averages them.

    Raises:
        ValueError: no run there, no whole checkpoint, or weights that do not fit the configuration.
    """
    config = read_config(str(run))
    saved = checkpoint.newest(run / 'best', print) or checkpoint.newest(run / 'checkpoints', print)
    if saved is None:
        raise ValueError(f'{run} has no checkpoint yet: train it first')
    classes = tuple(saved.state.get('classes', ()))
    net = build_classifier(config.model, len(classes), None) if classes else build_simmim(config.model, None)
    official.assign(net, saved.arrays.get('ema', saved.arrays['weights']))
    return Trained(config, net, classes, saved.step)
