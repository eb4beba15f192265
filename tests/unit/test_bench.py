"""What the benchmarks stand on: PyTorch's side computes the same model, and the table says what was measured."""
import argparse
import importlib.util
import inspect
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.running import rounds

from mxsimmim.models import cost

pytestmark = pytest.mark.unmeasured

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(autouse=True)
def neighbours(monkeypatch):
    """The benchmarks import each other by bare names, as programs of one folder do."""
    monkeypatch.syspath_prepend(str(ROOT / 'tools' / 'bench'))


def load(name):
    spec = importlib.util.spec_from_file_location(f'bench_{name}', ROOT / 'tools' / 'bench' / f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Turns:
    """A side of train.py whose steps take what is written down."""
    parameters, version, peak = 7, 'v', 1.5

    def __init__(self, name, seconds):
        self.name, self._seconds = name, iter(seconds)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def run(self, steps):
        return next(self._seconds) / steps


@pytest.mark.parametrize('free, ours', [(9.0, [1.0, 4.0, 3.0]), (1.7, [1.0, 4.0, 3.0] * 2)])
def test_ratio_is_the_median_of_the_turns_and_sides_that_do_not_fit_together_go_one_by_one(monkeypatch, free, ours):
    train = load('train')
    seconds = {'mxsimmim': ours, 'eager': [2.0, 2.0, 2.0], 'compiled': [4.0, 4.0, 1.0]}
    started = []
    monkeypatch.setattr(train, 'Side', lambda name, *_: started.append(name) or Turns(name, seconds[name]))
    monkeypatch.setattr(train, 'memory', lambda *_: free)
    case = train.Case('tiny', 6, 'float32')
    found = train.measure(case, argparse.Namespace(rounds=3, steps=1, threads=1, torch_python=''))
    assert started == ['mxsimmim', 'eager', 'compiled'] and found.seconds == seconds
    assert found.rival == 'eager'
    flops = sum(product.flops for product in train.step_products(case))
    assert train.rows(found, flops / 1e9) == [
        '| tiny, batch 6, float32 | mxsimmim (v) | 2.00 | 3.00 |  | 0.33 | 1.5 |',
        '| tiny, batch 6, float32 | PyTorch (v) | 3.00 | 2.00 | **0.67 times as fast** | 0.50 | 1.5 |',
        '| tiny, batch 6, float32 | PyTorch, compiled (v) | 1.50 | 4.00 | 1.00 times as fast | 0.25 | 1.5 |']


def test_chart_is_drawn_of_what_was_measured(tmp_path):
    train, chart, common = load('train'), load('chart'), load('common')
    found = [train.Measured(train.Case(model, batch, precision), dict(mxsimmim=[1.0], eager=[3.0], compiled=[2.0]),
                            dict(eager=[3.0], compiled=[2.0]), {}, {})
             for model in common.MODELS for batch in (8, 32) for precision in ('float32', 'bf16')]
    chart.draw(found[:5], 'mxsimmim', 'a processor', str(tmp_path / 'step.png'))  # a run that is not complete
    chart.draw(found, 'mxsimmim', 'a processor', str(tmp_path / 'step.png'))
    with Image.open(tmp_path / 'step.png') as image:
        assert image.size[0] > 1000 and len(set(image.convert('L').resize((64, 32)).getdata())) > 10


@pytest.mark.parametrize('model, masked', [('vit_base', 120), ('swin_base', 22), ('tiny', 12)])
def test_products_are_those_of_the_model(model, masked):
    product, common = load('product'), load('common')
    config = common.model_config(model)
    assert product.masked_tokens(config) == masked  # of the paper's masks, on the final tokens
    hidden = np.array(common.masks(model, 2))
    side, scale = config.img_size // config.stride, config.stride // config.patch_size
    assert (hidden.reshape(2, side, scale, side, scale).any(axis=(2, 4)).sum(axis=(1, 2)) == masked).all()

    def multiply_adds(count, *phases):
        return sum(p.flops for p in product.products(config, 3, count) if p.phase in phases) / 3 / 2

    every, width = side ** 2, config.embed_dim * 2 ** (config.stages - 1)
    one_token = width * width * 2 * config.mlp_ratio
    cls = one_token if config.type == 'vit' else 0  # never masked: the last MLP leaves it out
    assert multiply_adds(every, 'forward') == cost.multiply_adds(config) - cls
    saved = (every - masked) * (one_token + 3 * config.stride ** 2 * width)
    assert multiply_adds(masked, 'forward') == cost.multiply_adds(config) - cls - saved
    embedding = config.grid ** 2 * 3 * config.patch_size ** 2 * config.embed_dim  # nobody needs the image's gradient
    assert (multiply_adds(masked, 'input gradient', 'weight gradient')
            == 2 * multiply_adds(masked, 'forward') - embedding)


def test_floor_is_the_sum_over_products_and_the_table_tells_the_best_rate():
    product, common = load('product'), load('common')
    case = common.Case('vit_base', 8, 'bf16')
    of = product.step_products(case)
    rates = {p.shape: 100.0 for p in of}
    slow = of[0]
    rates[slow.shape] = 50.0
    flops, extra = sum(p.flops for p in of), sum(p.flops for p in of if p.shape == slow.shape)
    assert product.floor(of, rates) == pytest.approx((flops + extra) / 1e11)
    lines = product.table(case, rates)
    assert lines[1].startswith(f'ViT-B/16, 224, batch 8, bf16: {flops / 1e9:.0f} GFLOP') and '100 GFLOP/s' in lines[1]
    assert len(lines) == 5 + len(of)


def test_breakdown_sums_operators_by_kind_and_holds_them_against_their_floors():
    breakdown = load('breakdown')
    case = breakdown.Case('vit_base', 1, 'bf16')
    operators = {'mxsimmim_mlp': (12, 0.25), '_backward_mxsimmim_mlp': (12, 0.5), 'mxsimmim_adamw': (1, 0.1),
                 'batch_dot': (2, 0.01), '_backward_FullyConnected': (1, 0.03), 'add_n': (4, 0.01)}
    found = breakdown.Profile(0.9, 1.0, operators, 1e9, 10 ** 6)
    floors = breakdown.floors_of(case, found, None)
    assert floors['adamw', 'forward'] == pytest.approx(0.028)  # 7 arrays of 4 MB
    assert floors['layer_norm', 'forward'] == pytest.approx(197 * 768 * 8 / 1e9)
    floors['mlp', 'forward'] = 0.2
    assert breakdown.table(case, found, floors)[5:] == [
        '| mlp | backward | 12 | 500.0 | 50.0% |  |  |',
        '| mlp | forward | 12 | 250.0 | 25.0% | 200.0 | 1.25 |',
        '| adamw | forward | 1 | 100.0 | 10.0% | 28.0 | 3.57 |',
        '| matrix products |  | 3 | 40.0 | 4.0% |  |  |',
        '| the rest |  | 4 | 10.0 | 1.0% |  |  |',
        '| between operators | | | 100.0 | 10.0% | | |',
        '| the step | | 32 | 1000.0 | 100.0% | 228.0 | 4.39 |']
    rates = {p.shape: 100.0 for p in breakdown.step_products(case)}
    whole = breakdown.floors_of(case._replace(precision='reference'), found, rates)['matrix products', '']
    parts = breakdown.floors_of(case, found, rates)
    assert whole == pytest.approx(sum(parts[part, phase] for part in ('attention', 'mlp', 'linear', 'masked_loss')
                                      for phase in ('forward', 'backward')))
    swin = breakdown.floors_of(breakdown.Case('swin_base', 1, 'bf16'), found, None)['layer_norm', 'forward']
    assert swin == pytest.approx(48 * 48 * 128 * (1 + 1 + 1 / 2 + 1 / 4 + 1 / 8) * 8 / 1e9)


def test_breakdown_of_a_real_step_names_what_ran():
    done = subprocess.run([sys.executable, ROOT / 'tools' / 'bench' / 'breakdown.py', '--model', 'tiny', '--batch', '2',
                           '--precision', 'reference', '--steps', '1', '--threads', '1'], stdout=subprocess.PIPE,
                          universal_newlines=True, check=True)
    lines = done.stdout.splitlines()
    for name in ('matrix products', 'AdamW', 'softmax', 'GELU', 'the step'):
        assert sum(line.startswith(f'| {name} |') for line in lines) == 1, done.stdout


@pytest.mark.soak
def test_a_divided_model_is_measured():
    """In one process; in `make soak` in jobs of one and two."""
    def told(*words):
        done = subprocess.run([sys.executable, ROOT / 'tools' / 'bench' / 'parallel.py', '--model', 'tiny', '--batch',
                               '8', '--micro-batches', '2', '--steps', '1', *words], timeout=120,
                              stdout=subprocess.PIPE, universal_newlines=True, check=True)
        return done.stdout.splitlines()[-1]
    found = json.loads(told('--worker', 'ours'))
    assert set(found) == {'step', 'cpu', 'memory'} and all(value > 0 for value in found.values())
    for words in rounds([], [['--rounds', '1', '--sides', 'ours']]):
        one, two, efficiency, *more = [cell.strip(' %') for cell in told(*words).split('|')[2:-1]]
        assert float(efficiency) == pytest.approx(50 * float(two) / float(one), abs=0.1) and len(more) == 6


def test_the_table_of_divided_models_has_medians_of_ratios():
    def turns(steps, cpu, memories):
        return [dict(step=step, cpu=cpu, memory=memory) for step, memory in zip(steps, memories)]

    found = {('ours', 1): turns([2.0, 4.0, 3.0], 3.0, [4.0] * 3),
             ('ours', 2): turns([1.25, 2.0, 2.0], 3.5, [2.0, 2.4, 2.0]),
             ('ours', 0): turns([2.5, 4.0, 4.0], 3.5, [4.0] * 3), ('torch', 0): turns([2.0] * 3, 3.5, [4.0] * 3),
             ('torch', 1): turns([2.0] * 3, 2.0, [5.0] * 3), ('torch', 2): turns([2.5] * 3, 4.0, [5.0] * 3)}
    lines = load('parallel').table(found, 6)
    assert lines[2:4] == ['| mxsimmim | 2.00 | 3.00 | 80.0% | 80.0% | 3.00 | 3.50 | 4.00 | 2.00 | 0.50 |',
                          '| PyTorch | 3.00 | 2.40 | 40.0% | 100.0% | 2.00 | 4.00 | 5.00 | 5.00 | 1.00 |']
    assert lines[-1].endswith('images/s of two processes: 1.25')


def test_efficiency_is_of_twice_one_worker_and_the_medians_are_of_ratios():
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
        load('common').require_torch(str(python))
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


def test_timeline_of_a_pipeline(tmp_path):
    """The head of the last stage is a part of its pass."""
    timeline = load('timeline')
    first = timeline.passes_of([('forward', False, 0, 2), ('forward', False, 2, 4), ('backward', False, 8, 12),
                                ('backward', False, 14, 18)], 0)
    last = timeline.passes_of([('forward', False, 2, 3), ('forward', True, 3, 4), ('backward', False, 4, 8),
                               ('forward', False, 8, 9), ('forward', True, 9, 10), ('backward', False, 10, 14)], 1)
    assert [each[:3] for each in last] == [(1, 'forward', 0), (1, 'backward', 0), (1, 'forward', 1), (1, 'backward', 1)]
    assert last[0][3:] == (2, 4) and timeline.span(first + last) == (0, 18)
    assert timeline.summary(first + last) == '18.000 s, computing 67%, 67%; the ideal is 67%'
    timeline.draw([first + last], str(tmp_path / 'a.png'))
    with Image.open(tmp_path / 'a.png') as image:
        assert image.size[0] > 1000


def test_slow_link_tells_the_medians_and_the_ratio_of_each_turn():
    slow_link = load('slow_link')
    found = {layout: [dict(step=step, sent=2e6, received=1e6, memory=3.0) for step in steps]
             for layout, steps in (('pipeline', [1.0, 2.0, 4.0]), ('data', [2.0, 2.0, 2.0]))}
    lines = slow_link.table(found)
    assert lines[2] == '| pipeline of 2 | 2.00 | 2.0 | 1.0 | 3.00 |'
    assert lines[-1] == 'Data parallelism over the pipeline, seconds: 1.00 (2.00, 1.00, 0.50)'


def test_detection_is_measured_in_turns(monkeypatch):
    """The ratio is the median of the turns': 2, 4 and 1; bf16 is in the table where it is asked for."""
    detect = load('detect')
    seconds = {'torchvision': [4.0, 4.0, 4.0], 'mxsimmim': [2.0, 1.0, 4.0]}
    monkeypatch.setattr(detect, 'Side', lambda name, *_: Turns(name, seconds[name]))
    arguments = argparse.Namespace(side=64, batch=2, threads=1, torch_python='', precision=['float32'], rounds=3)
    assert detect.measure(arguments) == ['| v, float32 | 4.00 | | 1.5 |',
                                         '| mxsimmim (v), float32 | 2.00 | 2.00 times as fast | 1.5 |']
    boxes = np.array(detect.objects(2, 64))
    assert boxes.shape == (2, detect.OBJECTS, 5) and (boxes[..., 2:4] > boxes[..., :2]).all() and boxes.max() < 80
