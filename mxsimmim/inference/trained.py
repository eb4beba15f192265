"""What a run has trained, ready to be used."""
import sys
from pathlib import Path
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Tuple

import mxnet as mx

from ..config import Config, DataConfig, configfile
from ..interop import official
from ..models import Network, parameter_specs
from ..ops import REFERENCE, OpBackend, select_backend
from ..parallel.communicators import Communicator
from ..parallel.placement import contexts_of
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


def load_run(run: Path, backend: OpBackend = REFERENCE, data: Optional[DataConfig] = None,
             workers: Optional[Communicator] = None) -> Trained:
    """Load the network of a run folder on cpu(0): of its best checkpoint where it kept one, else of its newest.

    The averaged weights are taken where the run averages them. The network computes with `backend`, and normalises
    uint8 images as `data` says, or as in training. In a job, all workers call this with what joins them: rank 0 reads,
    and the others get it from there.

    Raises:
        ValueError: no run there, no whole checkpoint, or weights that do not fit the configuration; on rank 0.
    """
    saved = None
    if workers is None or workers.rank == 0:
        config, saved = _read(run)
        told: Dict[str, Any] = {'config': configfile.to_dict(config), 'state': saved.state, 'step': saved.step}
    if workers is not None:
        told = workers.control.broadcast_object('the run', lambda: told)
        config = configfile.from_dict(told['config'], str(run))
    net = _network(config, told['state'], saved, backend, data or config.data)
    if workers is not None:
        arrays = [spec.parameter.list_data() for spec in parameter_specs(net)]
        workers.broadcast(workers.register(arrays))
    return Trained(config, net, told['state'], told['step'])


def load_for_inference(run: Path) -> Trained:
    """Load a run's network as `load_run`, on the first of its devices and with the best operators for these.

    Raises:
        ValueError: as `load_run`.
    """
    config, saved = _read(run)
    contexts, backend = devices_for(config)
    net = _network(config, saved.state, saved, backend, config.data)
    net.collect_params().reset_ctx(contexts[0])
    return Trained(config, net, saved.state, saved.step, contexts[0])


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


def _read(run: Path) -> Tuple[Config, checkpoint.Checkpoint]:
    config = read_config(str(run))
    saved = checkpoint.newest(run / 'best', print) or checkpoint.newest(run / 'checkpoints', print)
    if saved is None:
        raise ValueError(f'{run} has no checkpoint yet: train it first')
    return config, saved


def _network(config: Config, state: Mapping[str, Any], saved: Optional[checkpoint.Checkpoint], backend: OpBackend,
             data: DataConfig) -> Network:
    """The network of a checkpoint that records `state`, with its weights where it was read here."""
    net = TASKS[config.task].predictor.build_network(config.model, state, backend, data)
    if saved:
        official.load_weights(net, saved.arrays.get('ema', saved.arrays['weights']))
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
