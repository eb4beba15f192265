"""Trained networks and their runs, without training."""
import numpy as np

from mxsimmim.config import Config, DataConfig, configfile
from mxsimmim.inference.trained import Trained
from mxsimmim.interop import official
from mxsimmim.training import checkpoint

DATA = DataConfig(threads=1)


def awake(net, seed=0):
    """With weights large enough for every block to matter."""
    rng = np.random.default_rng(seed)
    official.load_weights(net, {name: value + 0.2 * rng.standard_normal(value.shape)
                          for name, value in official.export_weights(net).items()})
    return net


def trained(net, step=7):
    task = 'pretrain' if hasattr(net, 'decoder') else 'classify'
    config = Config(name='tiny', task=task, model=net.config, mask={'patch_size': 8}, data=DATA)
    return Trained(config, net, {} if task == 'pretrain' else {'classes': ['a', 'b', 'c']}, step)


def stored(folder, net, step=7):
    """A run as training leaves it."""
    done = trained(net, step)
    (folder / 'run').mkdir(exist_ok=True)
    (folder / 'run' / 'config.yaml').write_text(configfile.to_yaml(done.config))
    checkpoint.save(folder / 'run' / 'checkpoints', step, {'weights': official.export_weights(net)},
                    {'config': configfile.to_dict(done.config), **done.state}, keep=1)
    return folder / 'run'
