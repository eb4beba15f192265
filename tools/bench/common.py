"""What the benchmarks of a training step have in common: the models, the masks, and our side of a step."""
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Dict, List, NamedTuple

if TYPE_CHECKING:
    from mxsimmim.config import Config, ModelConfig
    from mxsimmim.data.loader import Batch
    from mxsimmim.runtime.facts import Facts

MODELS = {
    'vit_base': dict(type='vit', img_size=224, patch_size=16, embed_dim=768, depth=12, num_heads=12, init_values=0.1),
    'swin_base': dict(type='swin', img_size=192, patch_size=4, embed_dim=128, depths=(2, 2, 18, 2),
                      num_heads=(4, 8, 16, 32), window_size=6),
}
TITLES = {'vit_base': 'ViT-B/16, 224', 'swin_base': 'Swin-B, 192', 'tiny': 'tiny'}
SHAPES = {**MODELS, 'tiny': dict(type='vit', img_size=64, patch_size=16, embed_dim=32, depth=2, num_heads=2,
                                 init_values=0.1)}  # for tests
PRECISIONS = ('float32', 'bf16')
RATE, DECAY, CLIP = 1e-4, 0.05, 5.0
CELL, RATIO = 32, 0.6  # side of a masked cell in pixels, share of the cells: the paper's
WARM_UP = 2  # steps before the first measured one
OURS, *THEIRS = SIDES = ('mxsimmim', 'eager', 'compiled')


class Case(NamedTuple):
    """What a step is measured of."""
    model: str
    batch: int
    precision: str

    @property
    def arithmetic(self) -> str:
        """What its products are in; a precision may also be 'reference', see `our_worker`."""
        return 'bf16' if self.precision == 'bf16' else 'float32'

    @property
    def title(self) -> str:
        return f'{TITLES[self.model]}, batch {self.batch}, {self.precision}'


class Measured(NamedTuple):
    """Of one case, by side: seconds a step of each turn; of ours in the same turn over them; peak memory in GB."""
    case: Case
    seconds: Dict[str, List[float]]
    speedups: Dict[str, List[float]]
    peaks: Dict[str, float]
    versions: Dict[str, str]

    @property
    def rival(self) -> str:
        """PyTorch's faster side."""
        return min(THEIRS, key=lambda side: statistics.median(self.seconds[side]))

    def images(self, side: str) -> float:
        """Images a second."""
        return self.case.batch / statistics.median(self.seconds[side])

    def speedup(self, side: str) -> float:
        """Our images/s over this side's: the median of the turns' ratios."""
        return statistics.median(self.speedups[side])


class Worker(NamedTuple):
    """A program's step, how to wait for the end of those begun, its number of parameters and its version."""
    step: Callable[[], None]
    wait: Callable[[], None]
    parameters: int
    version: str


def add_case_options(parser: Any) -> None:
    """--model, --batch, --precision and --threads."""
    parser.add_argument('--model', choices=SHAPES, nargs='+', default=[*MODELS], metavar='MODEL',
                        help=f'of {", ".join(MODELS)} (default: both)')
    parser.add_argument('--batch', type=int, nargs='+', default=[8, 32], help='images a step (default: 8 32)')
    parser.add_argument('--precision', choices=PRECISIONS, nargs='+', default=[*PRECISIONS], metavar='PRECISION',
                        help=f'of {", ".join(PRECISIONS)} (default: both)')
    parser.add_argument('--threads', type=int, default=0, help='of every program (default: one a core)')


def cases(args: Any) -> List[Case]:
    """What the options of `add_case_options` ask for."""
    return [Case(model, batch, precision) for model in args.model for batch in args.batch
            for precision in args.precision]


def model_config(model: str) -> 'ModelConfig':
    from mxsimmim.config import ModelConfig
    return ModelConfig(**SHAPES[model])


def masks(model: str, batch: int) -> List[List[List[int]]]:
    """The batch's masks (B, h, w), 1 for masked: lists, which any interpreter reads."""
    import numpy as np

    from mxsimmim.data.masks import random_mask
    shape, rng = model_config(model), np.random.default_rng(0)
    return [random_mask(rng, shape.side, CELL, RATIO, shape.patch_size).tolist() for _ in range(batch)]


def describe(machine: 'Facts', threads: int) -> str:
    """The machine on one line."""
    return (f'{machine.cpu}, {machine.cores} cores, {threads} threads, {machine.system}; '
            f'OpenBLAS core {machine.mxnet.get("blas") or "unknown"}')


def require_torch(python: str) -> None:
    """Ends the program with the remedy if the interpreter cannot import torch."""
    try:
        found = subprocess.run([python, '-c', 'import torch'], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        problem = found.stdout.decode().strip().rsplit('\n', 1)[-1] if found.returncode else ''
    except OSError as error:
        problem = str(error.strerror)
    if problem:
        sys.exit(f"{python}: cannot import torch ({problem}): pip install -e '.[bench]' (Python 3.10 or newer), or "
                 'name an interpreter that has PyTorch by --torch-python PATH')


def memory(field: str, file: str = '/proc/self/status') -> float:
    """A size from a file of Linux's /proc, such as VmHWM, the largest resident set this process had; GB."""
    found = re.search(rf'{field}:\s*(\d+) kB', Path(file).read_text())
    assert found, field
    return int(found[1]) * 1024 / 1e9


def our_worker(keys: Dict[str, Any], batch: int, hidden: List[List[List[int]]], precision: str, threads: int) -> Worker:
    """The project's own trainer, on random images with these masks.

    precision is float32 or bf16, on the best operators of this machine, or 'reference': float32 on MXNet's own.
    """
    from mxsimmim import config as cfg
    from mxsimmim.runtime import environment
    environment.prepare(cfg.RuntimeConfig(threads=threads))
    import mxnet as mx
    import numpy as np

    from mxsimmim.models import named_parameters
    from mxsimmim.ops import REFERENCE, select_backend
    from mxsimmim.training.build import build_trainer

    backend = REFERENCE if precision == 'reference' else select_backend(precision, [mx.cpu()])
    config = step_config(keys, batch, 'local')
    trainer = build_trainer(config, backend=backend)
    images = random_batch(config.model, np.array(hidden, np.uint8), 0)
    parameters = named_parameters(trainer.placement.net).values()

    def step() -> None:
        trainer.train_step(images)

    return Worker(step, mx.nd.waitall, sum(int(np.prod(p.shape)) for p in parameters), f'MXNet {mx.__version__}')


def step_config(keys: Dict[str, Any], batch: int, store: str) -> 'Config':
    """Configure a trainer whose steps are measured: nothing is logged, and no image is read of the source it names."""
    from mxsimmim.config import Config
    return Config(model=keys, mask={'patch_size': CELL, 'ratio': RATIO}, data={'path': 'digits', 'val_fraction': 0},
                  devices=['cpu(0)'], log={'every': 10 ** 9},
                  optim={'base_lr': RATE * 512 / batch, 'weight_decay': DECAY, 'clip_grad': CLIP, 'warmup': 0,
                         'schedule': 'constant'},
                  train={'batch_size': batch, 'store': store, 'length': 10 ** 9})


def random_batch(model: 'ModelConfig', mask: Any, seed: int) -> 'Batch':
    """Random images for masks (B, h, w)."""
    import numpy as np

    from mxsimmim.data.loader import Batch
    count = len(mask)
    image = np.random.default_rng(seed).integers(0, 256, (count, *model.size, 3), np.uint8)
    return Batch({'image': image, 'mask': mask}, 0, np.arange(count))
