"""What a run has trained, ready to be used."""
import sys
from pathlib import Path
from typing import Any, List, Mapping, NamedTuple, Optional, Tuple

import mxnet as mx

from ..config import Config, DataConfig, configfile
from ..interop import official
from ..models import Network
from ..ops import REFERENCE, OpBackend, select_backend
from ..parallel.control import ControlPlane
from ..parallel.placement import contexts_of
from ..system.arrays import Arrays
from ..tasks.registry import TASKS
from ..tasks.task import Predictor
from ..training import checkpoint
from ..training.run_folder import read_config


class Trained(NamedTuple):
    """A run's network with its weights."""
    config: Config
    net: Network
    state: Mapping[str, Any]  # what the checkpoint records besides arrays
    step: int
    context: mx.Context = mx.cpu()  # where the network is

    @property
    def predictor(self) -> Predictor:
        """The predictor that answers with this network."""
        return TASKS[self.config.task].predictor(self.config, self.net, self.state)


class Saved(NamedTuple):
    """What a run has kept."""
    config: Config
    state: Mapping[str, Any]  # what the checkpoint records besides arrays
    step: int
    weights: Arrays  # of its network, read when they are asked for


def load_run(run: Path, backend: OpBackend = REFERENCE, data: Optional[DataConfig] = None) -> Trained:
    """Load the network of a run folder on cpu(0), see `find_run`.

    The network computes with `backend`, and normalises uint8 images as `data` says, or as in training.

    Raises:
        ValueError: no run there, no whole checkpoint, or weights that do not fit the configuration.
    """
    saved = find_run(run)
    return Trained(saved.config, _network(saved, backend, data or saved.config.data), saved.state, saved.step)


def find_run(run: Path, control: Optional[ControlPlane] = None) -> Saved:
    """Find what a run has kept: its best checkpoint if it kept one, else its newest; averages where it averages.

    In a job all workers call this with their control plane: rank 0 alone reads, and has the weights.

    Raises:
        ValueError: no run there or no whole checkpoint; on rank 0.
    """
    saved = None
    if control is None or control.rank == 0:
        config = read_config(str(run))
        found = checkpoint.newest(run / 'best', print) or checkpoint.newest(run / 'checkpoints', print)
        if found is None:
            raise ValueError(f'{run} has no checkpoint yet: train it first')
        saved = Saved(config, found.state, found.step, found.arrays.get('ema', found.arrays['weights']))
    if control is None:
        assert saved
        return saved
    told = control.broadcast_object('the run', lambda: saved and {
        'config': configfile.to_dict(saved.config), 'state': saved.state, 'step': saved.step})
    return saved or Saved(configfile.from_dict(told['config'], str(run)), told['state'], told['step'], {})


def load_for_inference(run: Path) -> Trained:
    """Load a run's network as `load_run`, on the first of its devices and with the best operators for these.

    Raises:
        ValueError: as `load_run`.
    """
    saved = find_run(run)
    contexts, backend = devices_for(saved.config)
    net = _network(saved, backend, saved.config.data)
    net.collect_params().reset_ctx(contexts[0])
    return Trained(saved.config, net, saved.state, saved.step, contexts[0])


def load_run_for(command: str, run: Path) -> Trained:
    """Load a run as `load_for_inference`, for a command that shows answers.

    Raises:
        ValueError: as `load_run`; or another command shows what this run answers.
    """
    trained = load_for_inference(run)
    predictor = trained.predictor
    if predictor.command != command:
        raise ValueError(f'{run} is {predictor.kind}: {predictor.advice}')
    return trained


def _network(saved: Saved, backend: OpBackend, data: DataConfig) -> Network:
    """The network of a run, with its weights."""
    config = saved.config
    net = TASKS[config.task].predictor.build_network(config.model, saved.state, backend, data)
    official.load_weights(net, saved.weights)
    return net


def data_in_use(config: Config) -> DataConfig:
    """Return how a run's network sees what users give it, with a note where that is not upright."""
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
