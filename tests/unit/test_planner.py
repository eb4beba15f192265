"""The cost model against closed forms, and against what networks and operators really have."""
import itertools
import json
import math
from types import SimpleNamespace

import mxnet as mx
import numpy as np
import pytest
from support.machine import need_native
from support.running import rounds
from support.tiny import SWIN, VIT

from mxsimmim import cli
from mxsimmim.config import ConfigError, MaskConfig, ModelConfig, configfile
from mxsimmim.models import build_simmim, named_parameters
from mxsimmim.models.cost import segment_costs
from mxsimmim.ops import OpBackend
from mxsimmim.parallel import schedules
from mxsimmim.planner import calibrate, cluster as cl, command, costs, model, search
from mxsimmim.planner.cluster import Cluster
from mxsimmim.planner.costs import Layout

NATIVE, REFERENCE = model.Form(), model.Form(native=False)
ONE_MASK = MaskConfig(patch_size=4)
GPUS = Cluster(4, 8, 40e9, bandwidth=12.5e9)


def configured(**changes):
    return configfile.load('conf/vit_base.yaml', [f'{key}={value}' for key, value in changes.items()])


@pytest.mark.parametrize('option, text, value', [
    ('memory', '40GB', 40e9), ('memory', '16GiB', 2 ** 34), ('memory', '1.5 TB', 1.5e12),
    ('bandwidth', '100Gb', 12.5e9), ('bandwidth', '12.5GB', 12.5e9), ('bandwidth', '800Mbit/s', 1e8),
    ('latency', '20us', 2e-5), ('latency', '1 ms', 1e-3), ('latency', '2µs', 2e-6), ('speed', '100TFLOPs', 1e14),
    ('speed', '1.5e3GFLOP/s', 1.5e12)])
def test_quantities(option, text, value):
    assert cl.quantity(option, text) == pytest.approx(value)


@pytest.mark.parametrize('option, text, answer', [
    ('memory', '40', "--memory '40': its unit is missing: write for instance --memory 40GB"),
    ('memory', '40Gb', "--memory '40Gb': 'Gb' is no unit of it: write for instance --memory 40GB"),
    ('bandwidth', 'fast', "--bandwidth 'fast' is not a number with a unit: write for instance --bandwidth 100Gb "
     '(bits a second) or 12GB (bytes)'),
    ('latency', '0us', "--latency '0us' must be more than nothing: write for instance --latency 20us"),
    ('speed', '-1TFLOPs', "--speed '-1TFLOPs' is not a number with a unit: write for instance --speed 100TFLOPs")])
def test_wrong_quantities(option, text, answer):
    with pytest.raises(ConfigError) as error:
        cl.quantity(option, text)
    assert str(error.value) == answer


def test_sums_in_closed_form():
    assert cl.ring(8e9, 4, 1e9, 0) == pytest.approx(2 * 3 / 4 * 8)  # 2 (n - 1) / n of the bytes
    assert cl.ring(0, 4, 1e9, 1e-3) == pytest.approx(6e-3)
    assert cl.tree(8e9, 8, 1e9, 1e-3) == pytest.approx(2 * 8 + 6e-3)
    assert cl.ring(8e9, 1, 1e9, 1) == cl.tree(8e9, 1, 1e9, 1) == 0
    assert cl.all_reduce(1e3, 1024, 1e9, 1e-5) == cl.tree(1e3, 1024, 1e9, 1e-5) < cl.ring(1e3, 1024, 1e9, 1e-5)
    # As many servers as hosts with a worker each: a ring's bytes. One server: all of them come to its host.
    assert cl.server_bytes(8e9, 4, 4, 4, 1) == pytest.approx(2 * 3 / 4 * 8e9)
    assert cl.server_bytes(8e9, 4, 1, 4, 1) == pytest.approx(3 / 4 * (8e9 + 32e9))
    assert cl.server_bytes(8e9, 2, 1, 1, 2) == 0


@pytest.mark.parametrize('backward, messages, late', [
    ([3, 3], [1, 1], 1), ([3, 3], [4, 4], 5), ([3, 3], [5, 0], 2), ([0, 6], [5, 1], 1), ([], [], 0)])
def test_what_a_backward_pass_does_not_hide(backward, messages, late):
    assert costs.exposed(backward, messages) == late


@pytest.mark.parametrize('stages, micro_batches', [(1, 1), (2, 8), (4, 8), (8, 1)])
def test_bubble_in_closed_form(stages, micro_batches):
    stage = costs.Stage(1, 2, 0, ((2, 0, 10),), 10, 0, 0, 0, 1, 0, 0)
    parts = costs._passes(GPUS, Layout(1, stages, 1, micro_batches), [stage] * stages, 1)
    turns = micro_batches + stages - 1
    assert parts[costs.COMPUTE] == 3 * micro_batches
    assert parts[costs.BUBBLE] / (3 * turns) == pytest.approx((stages - 1) / turns)


@pytest.mark.parametrize('stages, micro_batches, turns', [(2, 2, 3), (4, 4, 8), (4, 1, 4), (8, 4, 16), (2, 8, 9)])
def test_stages_that_wait_leave_their_cores_to_others(stages, micro_batches, turns):
    """On two cores: of four stages each has half of one; `turns` are those of a stage that has a core alone."""
    share = min(1, 2 / stages)
    stage = costs.Stage(1 / share, 2 / share, 0, ((2 / share, 0, 10),), 10, 0, 0, 0, 1, 0, 0)
    cpus = Cluster(1, stages, kind='cpu', share=share)
    parts = costs._passes(cpus, Layout(1, stages, 1, micro_batches), [stage] * stages, 1)
    assert parts[costs.COMPUTE] + parts[costs.BUBBLE] == pytest.approx(3 * turns)


@pytest.mark.parametrize('members, expected', [(1, 0), (2, 1 / math.pi ** 0.5), (3, 1.5 / math.pi ** 0.5), (8, 1.4236)])
def test_the_slowest_of_several(members, expected):
    assert cl.slowest(members) == pytest.approx(expected, rel=0.06)


def test_a_tensor_group_waits_for_the_slowest():
    """Of 2 + 4 seconds, four sums of 1,000 numbers; contexts of one process do not wait for each other."""
    stage = costs.Stage(2, 4, 0, ((4, 0, 10),), 10, 0, 0, 0, 1, 1000, 0)
    cpus = Cluster(1, 2, kind='cpu', spread=0.1, stream=1e4, local_latency=0.01, local_bandwidth=1e5)
    parts = costs._passes(cpus, Layout(1, 1, 2, store='horovod'), [stage], 1)
    assert parts[costs.COMPUTE] == 6
    assert parts[costs.TENSOR] == pytest.approx(4 * (6 * 4000 / 1e4 + 0.01) + 6 * 0.1 * cl.slowest(2))
    parts = costs._passes(cpus, Layout(1, 1, 2, contexts=2), [stage], 1)
    assert parts[costs.TENSOR] == pytest.approx(4 * cl.all_reduce(4000, 2, 1e5, 0.01))
    assert costs._passes(cpus, Layout(2, store='horovod'), [stage], 1)[costs.TENSOR] == 0


def test_spread_of_a_measurement(monkeypatch):
    """That of a normal distribution, which few that took long do not change."""
    rng = np.random.default_rng(5)
    seconds = iter([9.0, *rng.normal(0.2, 0.02, 4000), 50.0])
    monkeypatch.setattr(calibrate, 'undisturbed', lambda function: next(seconds))
    now = itertools.count()
    monkeypatch.setattr(calibrate.time, 'perf_counter', lambda: next(now) / 4000)
    median, spread = calibrate.typical(lambda: None)
    assert median == pytest.approx(0.2, rel=0.01) and spread == pytest.approx(0.1, rel=0.05)


def test_activations_in_flight_are_those_of_the_schedule():
    for name, stages, micro_batches in itertools.product(schedules.SCHEDULES, range(2, 6), range(1, 8)):
        layout = Layout(1, stages, 1, micro_batches)
        assert [costs.in_flight(layout, stage, name) for stage in range(stages)] == [
            schedules.in_flight(passes) for passes in schedules.SCHEDULES[name](stages, micro_batches)]


@pytest.mark.parametrize('layout, seconds', [
    (Layout(32, store='horovod'), 2 * 31 * (1e-4 + 0.4 / 32 / 1)),  # a ring of all GPUs, a host's link 1 GB/s
    (Layout(4, 1, 8, store='horovod'), 2 * 3 * (1e-4 + 0.4 / 4 / (1 / 8))),  # eight groups share it
    (Layout(8, 1, 4, store='horovod', compression='fp16'), 2 * 7 * (1e-4 + 0.2 / 8 / (1 / 4))),
    (Layout(1, 4, 8, store='horovod'), 0),
    (Layout(32, store='dist_sync', servers=4, contexts=8), 2 * 7 * (1e-4 + 0.4 / 8 / 10) + 2 * 3 / 4 * 0.4 + 4e-4),
    (Layout(4, 8, store='dist_sync', servers=4, contexts=8), 8 * 2 * 3 / 4 * 0.4 + 4e-4),  # of 8 stages, each as large
    (Layout(8, contexts=8), 2 * 7 * (1e-4 + 0.4 / 8 / 10))])
def test_exchange_in_closed_form(layout, seconds, monkeypatch):
    monkeypatch.setattr(costs, 'FUSED', 1 << 40)
    hosts = 4 if layout.size == 32 else 1
    gpus = Cluster(hosts, 8, bandwidth=1e9, latency=1e-4, local_bandwidth=10e9, local_latency=1e-4)
    assert costs.exchange(gpus, layout, 10 ** 8) == (pytest.approx(seconds), 0)


def test_exchange_on_cpus():
    cpus = Cluster(1, 2, kind='cpu', stream=1e10, local_bandwidth=2e9)
    assert costs.exchange(cpus, Layout(2, store='horovod'), 10 ** 8) == (0, pytest.approx(0.8 / 10))  # read, write
    servers = (2 * (2 * 0.4 + 2 * 0.4) / 2 + 3 * 2 * 0.4 / 10) / 2  # 4 P sent and received on two cores, one sum
    assert costs.exchange(cpus, Layout(2, store='dist_sync', servers=1), 10 ** 8) == (0, pytest.approx(servers))
    assert costs.exchange(cpus, Layout(2, contexts=2), 10 ** 8) == (0, pytest.approx(7 * 0.4 / 20))
    packed = costs.exchange(cpus, Layout(2, store='horovod', compression='2bit'), 10 ** 8)
    assert packed.cores == pytest.approx(0.8 + 0.8 / 10 / 10)  # ten numbers a word


NETWORKS = {'vit': VIT, 'swin': SWIN, 'plain': dict(VIT, init_values=None, use_ape=True, use_shared_rpb=False),
            'tables': dict(VIT, use_rpb=True, use_mean_pooling=True), 'ape': dict(SWIN, use_ape=True, mlp_ratio=2.0),
            'swinv2': dict(SWIN, type='swinv2')}


@pytest.mark.parametrize('name', NETWORKS)
def test_parameters_and_products_are_those_of_the_networks(name):
    config = ModelConfig(**NETWORKS[name])
    counted = model.segments(config, ONE_MASK, REFERENCE)
    sizes = [int(np.prod(p.shape)) for p in named_parameters(build_simmim(config, None)).values()]
    assert model.parameters(counted) == sum(sizes)
    assert [model.multiply_adds(segment) for segment in counted] == segment_costs(config)


@pytest.mark.parametrize('recipe, count', [('vit_base', 86_256_720), ('swin_base_800ep', 89_874_104),
                                           ('swin_large', 199_881_204)])
def test_parameters_of_recipes(recipe, count):  # which their networks have
    config = configfile.load(f'conf/{recipe}.yaml')
    assert model.parameters(model.segments(config.model, config.mask, NATIVE)) == count


@pytest.mark.parametrize('precision', ['float32', 'bf16'])
def test_kept_is_what_native_operators_give_beside_their_result(precision):
    need_native()
    try:
        backend = OpBackend('native', precision)
    except ValueError:
        pytest.skip(f'no {precision} on this CPU')
    width, tokens, images, given = 16, 17, 3, []
    parts = model.segments(ModelConfig(**VIT), ONE_MASK, model.Form(True, precision == 'bf16'))[1]

    def keeping(name):
        return lambda *inputs, **attributes: given.append(getattr(mx.nd, name)(*inputs, **attributes)) or given[-1]
    F = SimpleNamespace(**{name: keeping(name) for name in ('mxsimmim_attention', 'mxsimmim_mlp')})
    x, row, wide = mx.nd.ones((images, tokens, width)), mx.nd.ones((width,)), mx.nd.ones((4 * width,))
    square = mx.nd.ones((width, width))
    backend.attention(F, x, (row, row), (mx.nd.ones((3 * width, width)), wide[width:]), (square, row),
                      width=width, heads=2, tokens=tokens, eps=1e-6)
    backend.mlp(F, x, (row, row), (mx.nd.ones((4 * width, width)), wide), (mx.nd.ones((width, 4 * width)), row),
                width=width, hidden=4 * width, eps=1e-6)
    for part, (_, *kept) in zip(parts, given):
        assert sum(4 * array.size for array in kept) == pytest.approx(images * part.shared_kept, abs=4)
        assert part.kept(2) == part.inputs + part.shared_kept / 2
        assert part.kept(recompute=True) == part.inputs == 4 * tokens * width


def test_what_lies_between_the_graphs_of_a_tensor_group():
    """Of each half block and of each of two devices, in tokens x width: its term of the sum, half of the other's copy,
    and the gradient of its own copy."""
    config, cpus, tokens = configured(**{'model.depth': 2}), Cluster(1, 2, kind='cpu', resident=0), 197 * 768 * 4
    one, = costs.stages_for(config, cpus, Layout())
    two, = costs.stages_for(config, cpus, Layout(tensor=2, contexts=2))
    inside = 4 * (4 / 2) * tokens  # of four half blocks
    assert two.kept == pytest.approx(one.kept - inside + 4 * (1 + 1 / 2) * tokens)
    again, = costs.stages_for(config, cpus, Layout(tensor=2, contexts=2, recompute=True))
    assert again.kept == pytest.approx(two.kept - inside)
    largest = max(part.work(2) for segment in model.segments(config.model, config.mask, NATIVE) for part in segment)
    assert two.planned + two.work == pytest.approx(largest + 4 * tokens)


def test_memory_of_weights_gradients_and_moments():
    config, count = configured(), 86_256_720
    def weights(layout):
        one = costs.predict(config, GPUS._replace(resident=0), layout)
        images = math.ceil(2048 / layout.data / layout.micro_batches)
        stages = costs.stages_for(config, GPUS, layout)
        assert len(stages) == layout.pipeline
        first, passing = stages[0], costs.in_flight(layout, 0)
        return one.memory - images * (passing * (first.kept + first.planned) + first.work), stages
    assert weights(Layout(32, store='horovod'))[0] == pytest.approx(16 * count)
    assert weights(Layout(32, store='horovod', shard_optimizer=True))[0] == pytest.approx((8 + 8 / 32) * count)
    assert weights(Layout(32, store='horovod', compression='fp16'))[0] == pytest.approx(18 * count)
    stages = costs.stages_for(config, GPUS, Layout(8, 4))
    table = model.shared_table(config.model)
    assert sum(stage.parameters for stage in stages) == count + 3 * table  # which lies on each stage
    halves = model.segments(config.model, config.mask, REFERENCE)
    divided = sum(part.shared_parameters for segment in halves for part in segment)
    assert model.parameters(halves, 4) == count - divided * 3 // 4


def test_contexts_of_one_cpu_worker_compute_one_after_another():
    config, cpus = configured(), Cluster(1, 2, kind='cpu', speed=1e11, stream=1e10)
    one = costs.predict(config, cpus, Layout(1, 2, 1, 8, contexts=2))
    both = costs.predict(config, cpus, Layout(1, 2, 1, 8, store='horovod'))
    assert one.parts[costs.BUBBLE] == 0 < both.parts[costs.BUBBLE]
    assert one.parts[costs.COMPUTE] == both.parts[costs.COMPUTE]


@pytest.mark.parametrize('layout, reason', [
    (Layout(16), 'data 16 x pipeline 1 x tensor 1 are not the 32 devices'),
    (Layout(2, 16, store='horovod'), '16 stages are more than 12 blocks'),
    (Layout(2, 1, 16, store='horovod'), 'a tensor group of 16 does not fit the 8 devices of a host'),
    (Layout(4, 1, 8, store='horovod'), 'a tensor group of 8 does not divide [12] heads or columns'),
    (Layout(32, 1, 1, 128, store='horovod'), 'train.batch_size=2048 is less than 32 replicas x 128 micro-batches'),
    (Layout(32), 'train.store=device is for one worker'),
    (Layout(2, 4, 4, store='horovod', contexts=8), 'a worker of several devices holds whole models'),
    (Layout(8, 1, 4, store='dist_sync', servers=4, contexts=2), 'with servers each worker holds a whole model'),
    (Layout(16, 2, store='dist_sync', servers=4), 'with servers each worker holds a whole model'),
    (Layout(32, store='dist_sync', contexts=8), 'there is no server'),
    (Layout(32, store='dist_sync', servers=4, contexts=8, compression='fp16'),
     'train.compression=fp16 does not go with train.store=dist_sync'),
    (Layout(32, store='horovod', recompute=True), 'model.recompute needs native operators, on CPUs'),
    (Layout(32, store='dist_sync', servers=4, contexts=8, shard_optimizer=True),
     'parallel.shard_optimizer needs several replicas and Horovod')])
def test_refusals(layout, reason):
    assert search.refusal(configured(), GPUS, layout) == reason


def test_a_sharded_optimiser_sends_weights_after_gradients():
    whole, sharded = (costs.predict(configured(), GPUS, Layout(32, store='horovod', compression='fp16',
                                                               shard_optimizer=shard)) for shard in (False, True))
    stage, = costs.stages_for(configured(), GPUS, Layout(32))
    sent = costs.exchange(GPUS, Layout(32, store='horovod'), stage.parameters)
    assert sharded.parts[costs.GRADIENTS] == pytest.approx(whole.parts[costs.GRADIENTS] + sum(sent))
    assert whole.memory - sharded.memory == pytest.approx(8 * 31 / 32 * stage.parameters)


def test_an_optimiser_without_moments_is_not_sharded():
    layout, config = Layout(32, store='horovod', shard_optimizer=True), configured(**{'optim.type': 'sgd'})
    reason = 'parallel.shard_optimizer divides moments, and optim.type=sgd has none'
    assert search.refusal(config, GPUS, layout) == reason
    assert not [each for each in search.layouts(config, GPUS) if each.shard_optimizer]


def test_what_is_found_can_run_and_is_in_order():
    config = configured()
    found = search.search(config, GPUS)
    assert all(search.refusal(config, GPUS, each.layout) == '' for each in found)
    assert [search.rank(each) for each in found] == sorted(search.rank(each) for each in found)
    keys = [(each.layout.pipeline, each.layout.tensor, each.layout.store, each.layout.compression) for each in found]
    assert len(keys) == len(set(keys))
    for each in found:
        assert each.step == pytest.approx(sum(each.parts.values())) and 0 < each.efficiency <= 1.01
    found = search.search(configured(**{'train.store': 'dist_sync'}), GPUS)
    assert {each.layout.store for each in found} == {'dist_sync'}


@pytest.mark.parametrize('layout, built', [
    (Layout(8, 1, 4, store='dist_sync', servers=4, contexts=8), True), (Layout(1, 2, 4, contexts=8), True),
    (Layout(2, 2, 2, store='horovod'), True), (Layout(4, 2, 2, store='dist_sync', servers=2, contexts=2), False),
    (Layout(8, store='horovod', shard_optimizer=True), True)])
def test_what_this_version_runs(layout, built):
    assert search.is_built(layout) == built
    assert all(search.is_built(found.layout) for found in search.search(configured(), GPUS))


def test_large_models_need_more_than_data_parallelism():
    wide = configured(**{'model.embed_dim': 4096, 'model.num_heads': 32, 'model.depth': 32})
    layout, why = search.choose(wide, GPUS)
    assert layout.pipeline * layout.tensor > 1 and layout.compression == 'none'
    assert why.startswith(search.describe(layout)) and 'GB a device; bottleneck: ' in why
    assert search.choose(configured(), Cluster(memory=40e9))[0]._replace(micro_batches=1) == Layout()


@pytest.mark.parametrize('changes, cluster, answer', [
    ({}, GPUS._replace(memory=1.2e9), 'no layout fits: a device has 1.2 GB, and the least that any needs is '),
    ({'train.batch_size': 1}, Cluster(1, 64, 40e9), 'no layout gives all of 64 devices something to do with '
     'train.batch_size=1, 12 blocks and train.store=auto: take fewer devices, or raise train.batch_size'),
    ({'train.store': 'dist_async'}, GPUS, 'train.store=dist_async with train.aggregation=auto is not synchronous')])
def test_nothing_to_choose(changes, cluster, answer):
    with pytest.raises(ValueError) as error:
        search.search(configured(**changes), cluster)
    assert str(error.value).startswith(answer)
    if 'fits' in answer:
        assert 'GB (data ' in str(error.value) and str(error.value).endswith(
            'take devices with more memory or more of them, or a smaller model')


@pytest.mark.parametrize('cluster, layout, line', [
    (GPUS, Layout(8, 2, 2, 16, 'horovod', shard_optimizer=True),
     'tools/launch.py -n 32 --horovod -H hosts --devices gpu -- mxsimmim pretrain a.yaml seed=1 parallel.pipeline=2 '
     'parallel.micro_batches=16 train.accumulate=1 parallel.tensor=2 parallel.shard_optimizer=true'),
    (GPUS, Layout(16, 2, 1, 4, 'dist_sync', 4, '2bit', contexts=8),
     'tools/launch.py -n 4 -s 4 -H hosts --devices gpu -- mxsimmim pretrain a.yaml seed=1 parallel.pipeline=2 '
     'parallel.micro_batches=4 train.accumulate=1 train.compression=2bit'),
    (Cluster(1, 2, kind='cpu'), Layout(2, micro_batches=4, store='dist_sync', servers=1, recompute=True),
     'tools/launch.py -n 2 -s 1 -- mxsimmim pretrain a.yaml seed=1 train.accumulate=4 model.recompute=true'),
    (Cluster(1, 4), Layout(2, 2, 1, 8, contexts=4),
     'mxsimmim pretrain a.yaml seed=1 parallel.pipeline=2 parallel.micro_batches=8 train.accumulate=1')])
def test_command_lines(cluster, layout, line):
    assert command.command_line(['a.yaml', 'seed=1'], cluster, layout) == line


def run(capsys, *words):
    status = cli.main(['plan', *words])
    out, err = capsys.readouterr()
    return status, out, err


def test_the_command(capsys):
    words = ['conf/vit_small.yaml', '--hosts', '4', '--devices', '8', '--memory', '16GB', '--bandwidth', '25Gb']
    status, out, _ = run(capsys, *words, '--speed', '20TFLOPs', '--best', '2')
    assert status == 0
    lines = out.splitlines()
    assert lines[0] == ('4 x 8 GPU devices, 16.0 GB and 20 TFLOP/s each; between hosts 25 Gb/s, 20 us; within one '
                        '12 GB/s (assumed: latency, local-bandwidth)')
    assert lines[1] == 'vit of 21.9 million parameters, 12 blocks, 512 images a step'
    assert lines[3].split()[:4] == ['data', 'pipeline', 'tensor', 'micro-batches'] and lines[4].startswith('1:  32 ')
    assert lines[7].startswith('1: tools/launch.py -n ') and len(lines) == 11
    status, out, _ = run(capsys, *words, '--json', 'train.batch_size=4096')
    first, *_ = plans = json.loads(out)['plans']
    assert status == 0 and len(plans) == 5 and 'train.batch_size=4096' in first['command']
    assert first['images_per_second'] == pytest.approx(4096 / first['step_seconds'])
    assert set(first['parts_seconds']) == set(costs.PARTS)


@pytest.mark.parametrize('words, answer', [
    ([], "--memory is missing, a device's: add --memory 40GB, or --calibrate on such a machine"),
    (['--memory', '40GB', '--hosts', '2'], '--bandwidth is missing, of the network between 2 hosts: add --bandwidth '
     '100Gb'),
    (['--memory', '40XB'], "--memory '40XB': 'XB' is no unit of it: write for instance --memory 40GB"),
    (['--memory', '40GB', '--devices', '0'], '--devices 0 must be at least 1'),
    (['model.depht=3'], "command line: unknown key 'model.depht' (did you mean 'model.depth'?)")])
def test_errors_of_the_command(words, answer, capsys):
    assert run(capsys, 'conf/vit_small.yaml', *words) == (2, '', f'mxsimmim: error: {answer}\n')


def test_a_model_that_fits_nowhere(capsys):
    status, out, err = run(capsys, 'conf/vit_small.yaml', '--memory', '1MB')
    assert (status, out) == (1, '')
    assert err.startswith('mxsimmim: error: no layout fits: a device has 0.0 GB, and the least that any needs is ')


@pytest.mark.soak
def test_calibration_of_this_machine(capsys):
    """A second for each half block: of Swin's two widths in `make soak`, here of a ViT's."""
    need_native()
    network, widths = rounds((VIT, (16,)), (SWIN, (8, 16)))
    tiny = [f'model.{key}={json.dumps(value)}' for key, value in network.items()]
    status, out, err = run(capsys, 'conf/digits.yaml', *tiny, 'mask.patch_size=8', '--calibrate', '--devices', '2',
                           '--json')
    assert status == 0, err
    cluster = json.loads(out)['cluster']
    assert cluster['kind'] == 'cpu' and cluster['devices'] == 2 and 1e8 < cluster['memory'] < 1e13
    rates = {tuple(key): rate for *key, rate in cluster['rates']}
    assert set(rates) == {('attention', width, 1) for width in widths} | {
        ('mlp', width, shard) for width in widths for shard in (1, 2, 4, 8)}
    assert all(1e6 < rate < 1e13 for rate in rates.values())
    assert cluster['images'] is None  # the digits are no files
    assert 1e7 < cluster['local_bandwidth'] < 1e12 and 1e-7 < cluster['local_latency'] < 1e-2
    assert 1e8 < cluster['stream'] < 1e13 and 1e-7 < cluster['call'] < 1e-2
    assert 0.15e9 < cluster['resident'] < 0.6e9 and 0 < cluster['spread'] < 2 and cluster['share'] <= 1


@pytest.mark.parametrize('devices, share', [(1, 1), (2, 1), (4, 0.5)])
def test_devices_that_share_cores(devices, share, monkeypatch):
    """Each was counted the seconds of the CPU that it had: of four on two cores, half of those that pass."""
    monkeypatch.setattr(calibrate, 'loopback', lambda: (1e9, 1e-5))
    own = {'stream': 1e10, 'call': 1e-6, 'resident': 3e8, 'images': 100.0, 'spread': 0.1,
           'rates': [['mlp', 8, 1, 1e11]]}
    machine = calibrate.machine([own] * devices, cores=2)
    assert machine.rates == ((('mlp', 8, 1), share * 1e11),) and machine.speed == share * 1e11
    assert (machine.stream, machine.call, machine.resident) == (share * 1e10, 1e-6 / share, 3e8)
    assert machine.images == share * 100 * devices and machine.size == devices
    assert (machine.share, machine.spread) == (share, 0.1)


def test_reading_images():
    config, layout = configured(), Layout(32, store='horovod')
    fast = costs.predict(config, GPUS, layout)
    slow = costs.predict(config, GPUS._replace(images=512 / (2 * fast.step)), layout)  # a quarter of 2,048 on each host
    assert slow.step == pytest.approx(2 * fast.step) and slow.bottleneck == costs.INPUT
    cpus = Cluster(1, 2, kind='cpu', speed=1e11, stream=1e10)
    one, other = (costs.predict(config, cpus._replace(images=images), Layout(2, store='horovod')).step
                  for images in (math.inf, 1000))
    assert other - one == pytest.approx(2.048)  # whose cores compute, too
