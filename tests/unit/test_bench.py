"""What the benchmarks stand on: PyTorch's side computes the same model, and the table says what was measured."""
import importlib.util
import inspect
import json
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent.parent


def load(name):
    spec = importlib.util.spec_from_file_location(f'bench_{name}', ROOT / 'tools' / 'bench' / f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_ratio_is_the_median_of_the_turns():
    seconds = {'mxsimmim': [1.0, 4.0, 3.0], 'eager': [2.0, 2.0, 2.0], 'compiled': [4.0, 4.0, 1.0]}
    lines = load('train').rows('ViT', 6, seconds, dict.fromkeys(seconds, 1.5), dict.fromkeys(seconds, 'v'))
    assert lines == ['| ViT | mxsimmim (v) | 2.00 | 3.00 |  | 1.5 |',
                     '| ViT | PyTorch (v) | 3.00 | 2.00 | 1.50 of its | 1.5 |',
                     '| ViT | PyTorch, compiled (v) | 1.50 | 4.00 | 1.00 of its | 1.5 |']


def test_efficiency_is_of_twice_one_worker_and_the_medians_are_of_ratios(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / 'tools' / 'bench'))
    seconds = {'horovod': dict(one=[1.0, 2.0, 4.0], step=[1.25, 2.0, 8.0], alone=[1.0, 1.9, 7.5], exchange=[0.5] * 3),
               'ddp': dict(one=[1.0, 1.0, 1.0], step=[1.0, 2.0, 2.0], alone=[1.0, 1.0, 1.0], exchange=[1.0] * 3)}
    lines = load('scale').table(seconds, 6)
    assert lines[2:4] == ['| Horovod | 3.00 | 6.00 | 80.0% | 1.000 |', '| PyTorch DDP, Gloo | 6.00 | 6.00 | 50.0% |  |']
    assert lines[7:] == ['| Horovod | 2.000 | 1.900 | 2.000 | 0.500 | 50% |',
                         '| PyTorch DDP, Gloo | 1.000 | 1.000 | 2.000 | 1.000 | 0% |']


@pytest.mark.parametrize('python, problem', [('/no/such/python', 'No such file'), (None, 'No module named')])
def test_an_interpreter_without_torch_is_named_with_the_remedy(python, problem, tmp_path):
    if python is None:  # this interpreter without its packages
        python = tmp_path / 'python'
        python.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
        python.chmod(0o755)
    with pytest.raises(SystemExit) as error:
        load('train').require_torch(str(python))
    for part in (str(python), problem, "pip install -e '.[bench]'", '--torch-python'):
        assert part in str(error.value)


@pytest.mark.parametrize('kind', ['vit', 'swin'])
def test_torch_side_computes_the_recorded_numbers(kind):
    torch = pytest.importorskip('torch')
    bench = load('torch_simmim')
    file = np.load(ROOT / 'tests' / 'data' / f'simmim_{kind}.npz')
    meta = json.loads(file['meta'].tobytes().decode())
    encoder = {'vit': bench.VisionTransformer, 'swin': bench.SwinTransformer}[kind]
    known = inspect.signature(encoder).parameters
    net = bench.build_simmim(kind, **{key: value for key, value in meta['config'].items() if key in known})

    def recorded(prefix):
        return {name: torch.tensor(file[f'{prefix}/{name}']) for name, _ in net.named_parameters()}

    net.load_state_dict(recorded('param'))
    loss = net(torch.tensor(file['image']), torch.tensor(file['mask']))
    loss.backward()
    assert loss.item() == pytest.approx(float(file['loss']), rel=1e-5)
    gradients = recorded('grad')
    for name, parameter in net.named_parameters():
        assert (parameter.grad - gradients[name]).norm() < 1e-3 * gradients[name].norm(), name
    exempt = {id(parameter) for parameter in bench.parameter_groups(net, 0.05)[0]['params']}
    assert {name for name, parameter in net.named_parameters() if id(parameter) in exempt} == set(meta['no_decay'])
