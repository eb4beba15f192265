"""What a run has trained, ready to be used."""
import sys
from pathlib import Path
from typing import List, NamedTuple, Optional, Tuple, Union

import mxnet as mx

from ..training import checkpoint
from ..config import Config, DataConfig
from ..interop import official
from ..models import Classifier, SimMIM, build_classifier, build_simmim
from ..ops import REFERENCE, OpBackend, select_backend
from ..parallel.placement import contexts_of
from ..training.run_folder import read_config


class Trained(NamedTuple):
    """A run's network with its weights."""
    config: Config
    net: Union[SimMIM, Classifier]
    classes: Tuple[str, ...]  # their names in the order of the logits; empty after pre-training
    step: int
    context: mx.Context = mx.cpu()  # where the network is


def load_run(run: Path, backend: OpBackend = REFERENCE, data: Optional[DataConfig] = None) -> Trained:
    """Load the network of a run folder on cpu(0): of its best checkpoint where it kept one, else of its newest.

    The averaged weights are taken where the run averages them. The network computes with `backend`, and normalises
    uint8 images as `data` says, or as in training.

    Raises:
        ValueError: no run there, no whole checkpoint, or weights that do not fit the configuration.
    """
    config = read_config(str(run))
    saved = checkpoint.newest(run / 'best', print) or checkpoint.newest(run / 'checkpoints', print)
    if saved is None:
        raise ValueError(f'{run} has no checkpoint yet: train it first')
    classes = tuple(saved.state.get('classes', ()))
    data = data or config.data
    if classes:
        net = build_classifier(config.model, len(classes), None, backend, data.mean, data.std)
    else:
        net = build_simmim(config.model, None, backend, data.mean, data.std)
    official.load_weights(net, saved.arrays.get('ema', saved.arrays['weights']))
    return Trained(config, net, classes, saved.step)


def load_for_inference(run: Path) -> Trained:
    """Load a run's network as `load_run`, on the first of its devices and with the best operators for these.

    Raises:
        ValueError: as `load_run`.
    """
    contexts, backend = devices_for(read_config(str(run)))
    trained = load_run(run, backend)
    trained.net.collect_params().reset_ctx(contexts[0])
    return trained._replace(context=contexts[0])


def data_in_use(config: Config) -> DataConfig:
    """How a run's network sees what users give it, with a note where that is not upright."""
    if config.data.exif_orientation is False:
        print('mxsimmim: note: EXIF orientation is ignored, as in training: the run has data.exif_orientation=false',
              file=sys.stderr, flush=True)
    return config.data.in_use()


def devices_for(config: Config) -> Tuple[List[mx.Context], OpBackend]:
    """Return the devices of a run's configuration, and the operators for them.

    Where the run was trained in bf16 and this machine has none, float32 serves; where on GPUs that this machine lacks
    or its MXNet cannot use, the CPU does: commands that use a run take no keys to say so.
    """
    try:
        contexts = contexts_of(config.devices)
    except ValueError as error:
        print(f'mxsimmim: the run was trained on other devices than this machine has, cpu(0) computes ({error})',
              file=sys.stderr)
        contexts = contexts_of(['cpu(0)'])
    precision = config.runtime.precision
    return contexts, select_backend('auto' if precision == 'bf16' else precision, contexts)
