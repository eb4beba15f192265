"""What a run has trained, ready to be used."""
import sys
from pathlib import Path
from typing import TYPE_CHECKING, List, NamedTuple, Tuple, Union

from ..training import checkpoint
from .. import ops
from ..config import Config, DataConfig
from ..interop import official
from ..models import Classifier, SimMIM, build_classifier, build_simmim
from ..parallel.placement import contexts_of
from ..training.run_folder import read_config

if TYPE_CHECKING:
    import mxnet as mx


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
    official.load_weights(net, saved.arrays.get('ema', saved.arrays['weights']))
    return Trained(config, net, classes, saved.step)


def data_in_use(config: Config) -> DataConfig:
    """How a run's network sees what users give it, with a note where that is not upright."""
    if config.data.exif_orientation is False:
        print('mxsimmim: note: EXIF orientation is ignored, as in training: the run has data.exif_orientation=false',
              file=sys.stderr, flush=True)
    return config.data.in_use()


def contexts_for(config: Config) -> List['mx.Context']:
    """The devices of a run's configuration, and for them the form of the operators, which it chooses.

    Where the run was trained in bf16 and this machine has none, float32 serves; where on GPUs that this machine lacks
    or its MXNet cannot use, the CPU does: commands that use a run take no keys to say so.
    """
    try:
        contexts = contexts_of(config.devices)
    except ValueError as error:
        print(f'mxsimmim: the run was trained on other devices than this machine has, cpu(0) computes ({error})',
              file=sys.stderr)
        contexts = contexts_of(['cpu(0)'])
    ops.choose('auto' if config.runtime.precision == 'bf16' else config.runtime.precision, contexts)
    return contexts
