"""Run by a Python that has PyTorch, never imported by a test.

    python torch_files.py record FOLDER      writes kinds.pth and kinds_legacy.pth, in the two formats
    python torch_files.py check FILE NPZ     loads FILE strictly and says where it differs from the arrays in NPZ
    python torch_files.py loss FILE NPZ      loads FILE strictly into the network whose 'config', JSON, is in NPZ, and
                                             prints its loss on 'image' and 'mask'
"""
import argparse
import collections
import json
import sys
import types
from pathlib import Path

import numpy as np
import torch

TYPES = ['float64', 'float32', 'float16', 'bfloat16', 'int64', 'int32', 'int16', 'int8', 'uint8', 'bool']


def checkpoint() -> dict:
    """Tensors of every type, views, a parameter; and the company that checkpoints keep."""
    class CfgNode(dict):
        pass

    CfgNode.__module__, CfgNode.__qualname__ = 'yacs.config', 'CfgNode'
    module = types.ModuleType('yacs.config')
    module.CfgNode = CfgNode
    sys.modules.update({'yacs': types.ModuleType('yacs'), 'yacs.config': module})
    config = CfgNode(MODEL=CfgNode(TYPE='swin'))
    config.__dict__['__immutable__'] = True
    table = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    model = collections.OrderedDict((name, (torch.arange(6) - 2).reshape(2, 3).to(getattr(torch, name)))
                                    for name in TYPES)
    model.update(table=table, transposed=table.t(), column=table[:, 1], corner=table[1:3, 2:5:2], tied=table,
                 parameter=torch.nn.Parameter(torch.arange(3.)), scalar=torch.tensor(2.5), empty=torch.zeros(0, 3))
    model._metadata = {'': {'version': 1}}
    return {'model': model, 'config': config, 'args': argparse.Namespace(lr=0.1, shape=torch.Size([2, 3])),
            'epoch': 7, 'max_accuracy': np.float64(81.5), 'best': np.zeros(2), 'device': torch.device('cpu'),
            'dtype': torch.float16, 'milestones': collections.Counter([3, 5]),
            'optimizer': {'state': {0: {'step': 3, 'exp_avg': torch.ones(3)}}, 'param_groups': [{'params': [0, 1]}]}}


def record(folder: str) -> None:
    torch.save(checkpoint(), Path(folder) / 'kinds.pth')
    torch.save(checkpoint(), Path(folder) / 'kinds_legacy.pth', _use_new_zipfile_serialization=False)


def check(file: str, expected: str) -> None:
    loaded, arrays = torch.load(file, weights_only=True)['model'], np.load(expected)
    assert type(loaded) is collections.OrderedDict and list(loaded) == arrays.files, list(loaded)
    for name in arrays.files:
        assert loaded[name].is_contiguous() and loaded[name].numpy().dtype == arrays[name].dtype, name
        assert np.array_equal(loaded[name].numpy(), arrays[name]) and loaded[name].shape == arrays[name].shape, name
        loaded[name].zero_()  # each has memory of its own that can be written
    mapped = torch.load(file, weights_only=True, mmap=True)['model']
    assert all(np.array_equal(mapped[name].numpy(), arrays[name]) for name in arrays.files)


def loss(file: str, given: str) -> None:
    sys.path.insert(0, str(Path(__file__).parents[2] / 'tools' / 'bench'))
    from torch_simmim import build_simmim
    state, batch = torch.load(file, weights_only=True)['model'], np.load(given)
    net = build_simmim(**json.loads(str(batch['config'])))
    for name in state:  # the reference's networks keep these in their checkpoints, this one does not
        parent, _, leaf = name.rpartition('.')
        if leaf in ('relative_position_index', 'attn_mask'):
            net.get_submodule(parent).register_buffer(leaf, torch.zeros_like(state[name]))
    net.load_state_dict(state, strict=True)
    with torch.no_grad():
        print(net(torch.tensor(batch['image']), torch.tensor(batch['mask'])).item())


if __name__ == '__main__':
    {'record': record, 'check': check, 'loss': loss}[sys.argv[1]](*sys.argv[2:])
