"""What every task offers to the loop, to evaluations and to commands that use a run; and how workers compare theirs."""
import hashlib
import os
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Any,
    Callable,
    Dict,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Protocol,
    Sequence,
    Tuple,
    Type,
)

import numpy as np

from ..config import Config, DataConfig, ModelConfig, configfile
from ..data.sources import Source
from ..data.transforms import Fields, Transform

if TYPE_CHECKING:
    from ..models import Network
    from ..models.shards import Shard
    from ..ops import OpBackend
    from ..parallel.control import ControlPlane
    from ..parallel.placement import Placement


class Metric(NamedTuple):
    """The value of an evaluation by which the best weights are known."""
    name: str
    higher_is_better: bool

    def score(self, values: Mapping[str, float]) -> float:
        """Returns its value in those of an evaluation, the sign turned where lower is better."""
        return values[self.name] if self.higher_is_better else -values[self.name]


class Evaluator(Protocol):
    """Measures a network on the held-out images. Every worker takes its part of them."""
    images: int
    metric: Metric
    drawn: str  # what `picture` shows, in a word

    def evaluate(self, placement: 'Placement') -> Dict[str, float]:
        """Returns the values of all workers together; called by all at the same time."""

    def picture(self, placement: 'Placement') -> Optional[np.ndarray]:
        """Draws what the network makes of some images, uint8 (H, W, 3); None where nothing is to be drawn.

        Called by rank 0, and by those who hold its replica of the network with it.
        """

    def report(self, placement: 'Placement', folder: Path) -> str:
        """Evaluates and says it in words; called by all workers, of which rank 0 writes files to `folder`."""

    def conclude(self, rows: Sequence[Mapping[str, Any]], last_step: int, placement: 'Placement', folder: Path) -> str:
        """Says what is to be read at the end of a run, on rank 0; called by all workers.

        Args:
            rows: the records of the run's evaluations, with their steps.
            last_step: the run's last.
            placement: the network at the end.
            folder: of the run.
        """


class Predictor(Protocol):
    """Answers about images with a trained network; needs nothing of the data that the network was trained on."""
    command: str  # of mxsimmim, and path of the service, that shows the answers
    kind: str  # what the run is and cannot do, with an article
    advice: str  # what to type instead of another command
    summary: str  # what the run is, in two words
    classes: Tuple[str, ...]  # names of what the network tells apart, in the order of its answer
    inputs: Dict[str, Tuple[int, ...]]  # the fields that `call` takes, float32: name -> shape of one image's
    output: str  # what `call` returns, in a word
    onnx: str  # why the network has no form in ONNX, and what to do instead; '': it has one

    def __init__(self, config: Config, net: 'Network', state: Mapping[str, Any]):
        """Takes the network; `state` is what the run's checkpoint records."""

    @staticmethod
    def build_network(model: ModelConfig, state: Mapping[str, Any], backend: 'OpBackend', data: DataConfig
                      ) -> 'Network':
        """Builds the network of a checkpoint that records `state`, with zeros for weights.

        It computes with `backend`, and normalises uint8 images as `data` says.
        """

    @staticmethod
    def state_of_weights(arrays: Mapping[str, np.ndarray], file: Path, classes: str) -> Dict[str, Any]:
        """Returns what a checkpoint is to record of another program's weights, read from `file`.

        Args:
            arrays: by the reference's names.
            file: what messages call them.
            classes: file of class names, one a line; '': none.

        Raises:
            ValueError: the names do not match the weights.
        """

    def transform(self, data: DataConfig) -> Transform:
        """Returns what is done to an image that an answer is asked about."""

    @property
    def call(self) -> Callable[..., Any]:
        """Runs the network on `inputs`, arrays or symbols with the batch in front; images are normalised."""

    @property
    def answer(self) -> Callable[..., np.ndarray]:
        """Returns what is shown of `call` on arrays, a row an image."""

    def random_inputs(self, rng: np.random.Generator, images: int) -> List[np.ndarray]:
        """Returns inputs as `call` may get them."""

    def line(self, fields: Fields, answer: np.ndarray, top: int) -> str:
        """Says an image's answer in a line, the `top` main parts of it; `fields` are those of its transform.

        This, `record` and `drawing` are of answers to `mxsimmim predict` alone.
        """

    def record(self, fields: Fields, answer: np.ndarray) -> Dict[str, Any]:
        """Returns an image's answer, JSON-ready."""

    def drawing(self, image: np.ndarray, fields: Fields, answer: np.ndarray) -> Optional[np.ndarray]:
        """Draws the answer about image, uint8 (H, W, 3), to look at, uint8; None where there is nothing to draw."""

    def body(self, fields: Fields, answer: np.ndarray, accepted: str) -> Tuple[str, bytes]:
        """Returns media type and content of an image's answer over HTTP; `accepted` is what the caller accepts."""


class Task(Protocol):
    """What is trained: data, network, parameter groups, evaluator. Opens the data that the configuration names."""
    config: Config
    source: Source
    held_out: Optional[Source]
    takes_encoder: bool  # whether model.pretrained is for it
    keeps_best: bool  # whether the weights of the best evaluation are kept
    predictor: Type[Predictor]

    def __init__(self, config: Config):
        """Open the data.

        Raises:
            ValueError: the data are not there, or not what the task needs.
        """

    def build_network(self, initial: bool, backend: 'OpBackend', parts: Sequence[slice] = (), own: int = 0,
                      shard: 'Shard' = ...) -> 'Network':
        """Builds the network, computing with `backend`; with random initial weights if they are used, else zeros.

        Of `parts` of its segments, number `own` alone is held here, and of that the `shard`: see
        `models.initial.begin`.
        """

    def shapes(self) -> Dict[str, Tuple[int, ...]]:
        """Returns the shapes of the network's parameters by name, at no cost in memory."""

    def multiply_adds(self) -> int:
        """Counts the multiply-adds of one image's forward pass in training."""

    def parameter_groups(self, net: 'Network') -> Dict[str, Tuple[float, float]]:
        """Returns (lr_scale, weight_decay) of each parameter by name."""

    def transform(self) -> Transform:
        """Returns what is done to a training image."""

    def evaluator(self, control: 'ControlPlane') -> Optional[Evaluator]:
        """Returns the evaluator of the held-out images; None where there are none."""

    def facts(self) -> List[str]:
        """Says what is special about the data, in a few words each."""

    def state(self) -> Dict[str, Any]:
        """Returns what a checkpoint records of the data, JSON-ready."""

    def check_state(self, state: Mapping[str, Any], where: str, remedy: str) -> None:
        """Compare what a checkpoint or another worker records with the data here.

        Raises:
            ValueError: the state, of `where`, is of other data than these; ends with `remedy`.
        """

    def annotations(self) -> List[int]:
        """Returns checksums of what is known about the images besides their pixels."""

    def check_annotations(self, theirs: Sequence[int], rank: int) -> None:
        """Compare checksums of `annotations`.

        Raises:
            ValueError: `theirs`, of rank 0, are not those of this worker, which is `rank`.
        """


def check_same_job(config: Config, task: Task, control: 'ControlPlane') -> None:
    """Compares configuration, images, what is known about them, and the number of held-out images of all workers.

    Raises:
        ValueError: in the workers that differ from rank 0, naming what.
    """
    source, held_out = task.source, len(task.held_out or ())
    some = '\n'.join(os.path.basename(source.name(i * len(source) // 1000)) for i in range(1000))
    names = hashlib.sha256(some.encode('utf-8', 'surrogatepass')).hexdigest()  # rank 0 sends it to every worker
    own = {'config': configfile.to_dict(config), 'samples': len(source), 'names': names, 'state': task.state(),
           'annotations': task.annotations(), 'held_out': held_out}
    first = control.broadcast_object('comparison of configurations and images', lambda: own)
    changed = configfile.differences(configfile.from_dict(first['config'], 'rank 0'), config,
                                     configfile.FREE_BETWEEN_WORKERS)
    if changed:
        raise ValueError(f'rank {control.rank} is configured differently from rank 0: '
                         + ', '.join(f'{key} (rank 0 {old}, here {new})' for key, old, new in changed)
                         + ': give all workers the same files and the same command')
    if (first['samples'], first['names']) != (len(source), names):
        raise ValueError(f'data.path={config.data.path}: rank {control.rank} finds {len(source):,} images here, rank 0 '
                         f'{first["samples"]:,}, or others: all workers need the same images')
    if first['held_out'] != held_out:
        raise ValueError(f'data.val_path={config.data.val_path}: rank {control.rank} finds {held_out:,} images here, '
                         f'rank 0 {first["held_out"]:,}: all workers need the same images')
    task.check_state(first['state'], 'rank 0', 'all workers need the same')
    task.check_annotations(first['annotations'], control.rank)
