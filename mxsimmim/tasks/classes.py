"""What tasks with classes, of images, pixels or objects, have in common; classes are in the order of the logits."""
import json
from itertools import zip_longest
from pathlib import Path
from typing import Any, Dict, List, Mapping, Sequence, Tuple

import numpy as np

from ..config import Config
from ..data.labels import read_classes
from ..data.transforms import Fields
from ..models import Network
from ..optim import parameter_groups


class WithClasses:
    """The part of a task that is the same for all fine-tuning."""
    takes_encoder = True
    keeps_best = True
    known: str  # what workers must know alike of the images
    config: Config
    classes: Tuple[str, ...]

    def parameter_groups(self, net: Network) -> Dict[str, Tuple[float, float]]:
        """Returns (lr_scale, weight_decay) of each parameter by name, with layer decay."""
        optim = self.config.optim
        return parameter_groups(net, optim.layer_decay, optim.weight_decay, optim.recipe)

    def state(self) -> Dict[str, Any]:
        return {'classes': list(self.classes)}

    def check_state(self, state: Mapping[str, Any], where: str, remedy: str) -> None:
        """Refuses a checkpoint of other classes, or of the same in another order."""
        check_classes(where, state.get('classes', ()), self.classes, remedy)

    def annotations(self) -> List[int]:
        """Returns a checksum of what is known of the training images, and one of the held-out images'."""
        raise NotImplementedError

    def check_annotations(self, theirs: Sequence[int], rank: int) -> None:
        data, own = self.config.data, self.annotations()
        for number, where in enumerate((f'data.labels={data.labels}, data.path={data.path}',
                                        f'data.val_labels={data.val_labels}, data.val_path={data.val_path}')):
            if theirs[number:number + 1] != own[number:number + 1]:
                raise ValueError(f'{where}: some images have other {self.known} for rank {rank} than for rank 0: all '
                                 'workers need the same')


class PredictorOfClasses:
    """The part of a predictor that is the same for all networks that tell classes, of an image and nothing else."""
    command = 'predict'
    advice = '`mxsimmim predict` shows what it has learned'
    onnx = ''
    told: str  # what the summary says it has a number of

    def __init__(self, config: Config, net: Network, state: Mapping[str, Any]):
        self._config, self._net = config, net
        self.classes: Tuple[str, ...] = tuple(state['classes'])
        self.summary = f'{len(self.classes)} {self.told}'
        self.inputs: Dict[str, Tuple[int, ...]] = {'image': (3, *config.model.size)}

    def call(self, image: Any) -> Any:
        """Maps images (B, 3, H, W), normalised, to what the network says of them."""
        return self._net(image)

    def answer(self, image: Any) -> np.ndarray:
        """Returns what `call` does."""
        return self.call(image).asnumpy()

    def random_inputs(self, rng: np.random.Generator, images: int) -> List[np.ndarray]:
        return [rng.standard_normal((images, *self.inputs['image'])).astype('float32')]

    def record(self, fields: Fields, answer: np.ndarray) -> Dict[str, Any]:
        raise NotImplementedError

    def body(self, fields: Fields, answer: np.ndarray, accepted: str) -> Tuple[str, bytes]:
        """Returns `record` in JSON."""
        return 'application/json; charset=utf-8', json.dumps(self.record(fields, answer)).encode()


def names_of_outputs(count: int, file: Path, classes: str) -> List[str]:
    """Return the names in the file `classes` for the outputs of weights read from `file`; without one their numbers.

    Raises:
        ValueError: there are not `count` names.
    """
    if not classes:
        return [str(number) for number in range(count)]
    names = list(read_classes(classes))
    if len(names) != count:
        raise ValueError(f'{classes} names {len(names)} classes, and {file} has {count}: name each, one a line, in '
                         'the order of its outputs')
    return names


def check_classes(where: str, theirs: Sequence[str], ours: Sequence[str], remedy: str) -> None:
    """Compare the classes of two sources.

    Raises:
        ValueError: the classes `theirs`, of `where`, are not `ours`, of the data here, in the same order.
    """
    for number, (old, new) in enumerate(zip_longest(theirs, ours)):
        if old != new:
            old, new = (f"'{name}'" if name is not None else 'missing' for name in (old, new))
            raise ValueError(f'{where} has {len(theirs)} classes, the data here have {len(ours)}, and class {number} '
                             f'is {old} there, {new} here: {remedy}')
