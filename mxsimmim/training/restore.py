"""What a checkpoint's arrays become in a network, its update rule and its averaged weights, in all workers."""
from pathlib import Path
from typing import Any, Callable, List, Mapping, Optional, Tuple, Union

from ..config import Config
from ..interop import official
from ..models import Network
from ..parallel.asynchronous import AsynchronousUpdate
from ..parallel.average import WeightAverage
from ..parallel.control import ControlPlane
from ..parallel.parts import ModelParts
from ..parallel.updates import SynchronousUpdate
from ..system.arrays import Arrays
from .checkpoint import Checkpoint, newest
from .run_folder import checkpoint_folders
from .step_metrics import LossSpike

ROLLBACKS = 3  # to one checkpoint; a run that needs more of them ends


def in_all_workers(find: Callable[[], Optional[Checkpoint]], control: ControlPlane) -> Optional[Checkpoint]:
    """Return what `find` returns on rank 0, where alone it is called; only there it has arrays."""
    saved = find() if control.rank == 0 else None
    told = control.broadcast_object('checkpoint', lambda: saved and [saved.step, saved.state, str(saved.path)])
    return saved or (Checkpoint(told[0], {}, told[1], Path(told[2])) if told else None)


def load_weights(net: Network, weights: Optional[Arrays], parts: Optional[ModelParts]) -> None:
    """Set the network's weights from those of the whole model, which rank 0 has.

    Where each worker holds a whole model, those of the others follow in `load_state`.

    Raises:
        ValueError: they do not fit the network.
    """
    if parts:
        parts.load(net, weights)
    elif weights is not None:
        official.load_weights(net, weights)


def load_state(rule: Union[SynchronousUpdate, AsynchronousUpdate], average: Optional[WeightAverage],
               parts: Optional[ModelParts], saved: Checkpoint, log: Callable[[str], None]) -> None:
    """Set what goes with the weights: moments, what each worker has of its own, averaged weights."""
    moments: Optional[Arrays] = saved.arrays.get('optimizer')
    if parts:
        assert isinstance(rule, SynchronousUpdate)
        rule.load_one_by_one(parts.hand_out(rule.moment_names(), moments), saved.step)
    else:
        rule.load_state_dict(moments, saved.step)
    own = rule.own_state()
    if own and not own.load(saved.arrays.get('workers')) and saved.step:
        log(f'{saved.path} has no state of each of these workers: all begin with the same weights and moments, '
            'without residuals')
    if average:
        for name, value in parts.hand_out(average.names(), saved.arrays.get('ema')) if parts else ():
            average.set(name, value)
        if not parts and 'ema' in saved.arrays:
            for name in average.names():
                average.set(name, saved.arrays['ema'][name])
        average.share(rule.workers)


def skipped_batches(state: Mapping[str, Any]) -> List[Tuple[int, int]]:
    """Return which batches a run has left out, by a checkpoint's state, as `sampling.data_step` takes them."""
    return [(update, batches) for update, batches in state.get('skipped_batches', [])]  # earlier versions had none


def before_spike(config: Config, found: LossSpike, control: ControlPlane, log: Callable[[str], None]
                 ) -> Tuple[Checkpoint, str]:
    """Return, in all workers, the newest checkpoint of a run, and what there is to say of the spike after it.

    Raises:
        ValueError: there is none, or the run has come back to it `ROLLBACKS` times before.
    """
    (folder, *copies), spike = checkpoint_folders(config), found.spike
    saved = in_all_workers(lambda: newest(folder, log, *copies), control)
    told = (f'step {found.step} has a loss of {spike.spike_loss:.4g}, {spike.deviations:.3g} robust deviations above '
            f'the median {spike.median:.4g} of those before it (train.spike={config.train.spike:g})')
    if not saved:
        raise ValueError(f'{told}, and {folder} has no checkpoint to go back to any more: restore one from a copy')
    assert saved.step < found.step, 'losses are read before anything is saved'
    if sum(step == saved.step for step, _ in skipped_batches(saved.state)) >= ROLLBACKS:
        raise ValueError(f'{told}, after {ROLLBACKS} others since the checkpoint of step {saved.step}: other batches '
                         'do not help. Lower optim.base_lr, raise train.spike, or set train.rollback=false')
    return saved, told
