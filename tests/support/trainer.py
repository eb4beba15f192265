"""A trainer of a tiny network, and batches for it that no loader has read."""
import numpy as np

from mxsimmim.config import Config
from mxsimmim.data.loader import Batch
from mxsimmim.interop import official
from mxsimmim.models import parameter_specs
from mxsimmim.ops import REFERENCE
from mxsimmim.runtime.process import ALONE
from mxsimmim.training.build import build_trainer

SECTIONS = {
    'model': dict(img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2),
    'mask': dict(patch_size=8),
    'data': dict(path='digits', val_fraction=0, threads=1),
    'optim': dict(schedule='constant', warmup=0),
    'train': dict(batch_size=8, length=1000),
    'log': dict(every=1000),
}


def tiny_config(rate=1e-3, **sections):
    """What `SECTIONS` say, key by key overridden by `sections`; `rate` is the learning rate of every step."""
    merged = {name: {**SECTIONS.get(name, {}), **keys} if isinstance(keys, dict) else keys
              for name, keys in {**SECTIONS, **sections}.items()}
    merged['optim'] = {'base_lr': rate * 512 / merged['train']['batch_size'], **merged['optim']}
    return Config(**merged)


def build_tiny_trainer(process=ALONE, communicator=None, backend=REFERENCE, **sections):
    """The trainer of `tiny_config(**sections)`; it writes nothing."""
    return build_trainer(tiny_config(**sections), process, communicator=communicator, backend=backend)


def random_batches(model, steps, images, seed):
    """Batches of random images; half of the 8 x 8 cells of each are masked."""
    rng = np.random.default_rng(seed)
    side, scale = model.img_size // 8, 8 // model.patch_size
    for _ in range(steps):
        hidden = np.argsort(rng.random((images, side * side)), 1) < max(1, side * side // 2)
        mask = hidden.reshape(images, side, side).repeat(scale, 1).repeat(scale, 2)
        fields = {'uniform': rng.random((images, 2 * model.blocks), 'float32')} if model.drop_path else {}
        fields['image'] = rng.integers(0, 256, (images, model.img_size, model.img_size, 3), 'uint8')
        yield Batch({**fields, 'mask': mask.astype('uint8')}, 0, np.arange(images))


def take(batch, part):
    """Some images of a batch."""
    return Batch({name: array[part] for name, array in batch.fields.items()}, 0, batch.index[part])


def train_randomly(trainer, steps, seed):
    """Weights, and (loss, norm, applied) of each step on random batches; replicas are the same, bit by bit."""
    rows = []
    for batch in random_batches(trainer.config.model, steps, trainer.config.train.batch_size, seed):
        rows.append(trainer.train_step(batch).asnumpy())
        trainer.check_replicas()
    for spec in parameter_specs(trainer.placement.net):
        first, *others = (copy.asnumpy() for copy in spec.parameter.list_data())
        assert all(np.array_equal(first, copy) for copy in others), spec.key
    return official.export_weights(trainer.placement.net), np.array(rows)


def relative_difference(ours, theirs):
    """In the L2 norm of all arrays together."""
    assert set(ours) == set(theirs)
    ours, theirs = (np.concatenate([arrays[name].ravel() for name in sorted(arrays)]) for arrays in (ours, theirs))
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
