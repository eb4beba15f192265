"""A whole model's arrays, on their way to and from the workers that hold its parts."""
import threading
import time
import weakref
from pathlib import Path

import mxnet as mx
import numpy as np
import pytest
from support.runs import stored
from support.workers import each

from mxsimmim.config import Config, DataConfig, ModelConfig
from mxsimmim.inference.trained import find_run
from mxsimmim.models import build_classifier, build_simmim, named_parameters, parameter_specs
from mxsimmim.models.shards import part_of
from mxsimmim.ops import REFERENCE
from mxsimmim.parallel.channels import WAITING, pipeline_channels
from mxsimmim.parallel.mesh import Mesh
from mxsimmim.parallel.parts import ModelParts, mesh_table
from mxsimmim.runtime.process import ProcessInfo
from mxsimmim.tasks.registry import TASKS
from mxsimmim.training.build import build_network
from mxsimmim.training.checkpoint import Stored
from mxsimmim.training.pretrained import load_encoder
from mxsimmim.training.run_logger import Quiet

STAGES = Mesh(3)
SLICES = [slice(0, 2), slice(2, 3), slice(3, 5)]
MODEL = ModelConfig(img_size=16, patch_size=4, embed_dim=32, depth=8, num_heads=4)
# What each stage holds; all of them the table.
HELD = [{'a': np.arange(6, dtype='float32').reshape(2, 3), 'table': np.ones(4, 'float32')},
        {'b': np.arange(4, dtype='float32') / 3, 'table': np.ones(4, 'float32')},
        {'c': np.zeros((1, 2), 'int64'), 'table': np.ones(4, 'float32'), 'd': np.full((), 7, 'float32')}]


def workers(work, mesh=STAGES, slices=SLICES):
    """What `work(parts)` returns in each of three stages, or on this mesh."""
    def one(control):
        parts = ModelParts(slices, control, mx.cpu())
        try:
            found = work(parts)
            control.barrier('end')
            return found
        finally:
            parts.close()
    return each(mesh.size, one, mesh=mesh)


def test_rank_0_gathers_the_whole_model():
    def work(parts):
        own = HELD[parts.own]
        moments = {f'mean.{name}': np.asarray(-value) for name, value in own.items()}
        gathered = parts.gather({'weights': own, 'moments': moments})
        return {group: (found.kinds, list(found.values), found.nbytes) for group, found in gathered.items()}
    first, *others = workers(work)
    kinds, values, size = first['weights']
    assert list(kinds.items()) == [('a', ('float32', (2, 3))), ('table', ('float32', (4,))), ('b', ('float32', (4,))),
                                   ('c', ('int64', (1, 2))), ('d', ('float32', ()))]
    assert size == 4 * 6 + 4 * 4 + 4 * 4 + 8 * 2 + 4
    whole = {**HELD[2], **HELD[1], **HELD[0]}
    for name, value in zip(kinds, values):
        np.testing.assert_array_equal(value, whole[name])
    np.testing.assert_array_equal(first['moments'][1][2], -HELD[1]['b'])
    assert others == [{'weights': ({}, [], 0), 'moments': ({}, [], 0)}] * 2


def test_rank_0_hands_out_what_each_stage_wants():
    whole = {**HELD[2], **HELD[1], **HELD[0]}
    found = workers(lambda parts: dict(parts.hand_out(list(HELD[parts.own]), None if parts.own else whole)))
    for own, expected in zip(found, HELD):
        assert list(own) == list(expected)
        for name, value in expected.items():
            np.testing.assert_array_equal(own[name], value)


@pytest.mark.parametrize('seats', [(), (0, 7, 2, 9, 10, 11, 6, 1, 8, 3, 5, 4)])
def test_parts_of_stages_on_their_way_to_rank_0_and_back(seats):
    """2 stages in 3 parts, of 2 replicas; the first part has a bias more."""
    mesh = Mesh(2, 2, 3, seats=seats)
    rng = np.random.default_rng(4)
    whole = {f'mean.blocks.{stage}.{name}': rng.random(shape, 'float32') for stage in range(2) for name, shape in (
        ('attn.qkv.weight', (18, 2)), ('attn.proj.weight', (2, 6)), ('attn.proj.bias', (2,)), ('norm1.weight', (2,)))}
    table = 'mean.rel_pos_bias.relative_position_bias_table'  # of both stages
    whole[table] = rng.random((5, 3), 'float32')

    def work(parts):
        wanted = [name for name in whole if (f'blocks.{parts.own}' in name or name == table)
                  and not (parts.shard.index and name.endswith('proj.bias'))]
        own = {name: part_of(name, whole[name], parts.shard) for name in wanted}
        gathered = parts.gather({'moments': own})['moments']
        found = gathered.kinds, list(gathered.values)
        return wanted, found, dict(parts.hand_out(wanted, None if parts.rank else whole))
    results = workers(work, mesh, SLICES[:2])
    (kinds, values), *others = (found for _, found, _ in results)
    assert others == [({}, [])] * 11 and set(kinds) == set(whole)
    for (name, (kind, shape)), value in zip(kinds.items(), values):
        assert (kind, shape) == ('float32', whole[name].shape)
        np.testing.assert_array_equal(value, whole[name])
    for rank, (wanted, _, handed) in enumerate(results):
        assert list(handed) == (wanted if mesh._replace(rank=rank).coordinate('data') == 0 else [])
        assert all(np.array_equal(value, whole[name]) for name, value in handed.items())


def test_what_rank_0_does_not_have_is_named():
    whole = {**HELD[1], **HELD[0]}
    first, *_ = workers(lambda parts: dict(parts.hand_out(list(HELD[parts.own]), None if parts.own else whole)))
    assert isinstance(first, ValueError)
    assert str(first).startswith('these weights do not fit the network: missing: c, d: check the model keys')


@pytest.mark.parametrize('mesh', [Mesh(2, 1, 2), Mesh(2, 2, 1)], ids=str)
@pytest.mark.parametrize('start', ['encoder', 'run'])
def test_rank_0_reads_weights_array_by_array(tmp_path, monkeypatch, start, mesh):
    """Of an encoder to fine-tune and of a run to evaluate, of which the first replica gets what it holds."""
    net = build_simmim(MODEL, 3) if start == 'encoder' else build_classifier(MODEL, 10, 3)
    file = stored(tmp_path, net) / 'checkpoints' / 'step-00000007' / 'weights.safetensors'
    config = Config(task='classify', model={**MODEL.model_dump(), 'pretrained': str(tmp_path / 'run')},
                    data=DataConfig(path='digits'), seed=5)
    whole, task = build_classifier(MODEL, 10, 5), TASKS['classify'](config)
    load_encoder(whole, config.model.pretrained)
    held, most, read = set(), [0, 0], Stored.__getitem__

    def counted(arrays, name):
        value = read(arrays, name)
        held.add((id(value), value.nbytes))
        weakref.finalize(value, held.discard, (id(value), value.nbytes))
        most[:] = max(most[0], sum(size for _, size in held)), most[1] + value.nbytes
        return value

    def work(parts):
        if start == 'encoder':
            own = build_network(config, ProcessInfo(rank=parts.rank), task, REFERENCE, None, Quiet(), parts)
        else:
            own = task.build_network(False, REFERENCE, parts.slices, parts.own, parts.shard)
            parts.load(own, find_run(tmp_path / 'run', parts.control).weights)
        return {spec.name: (spec.shard, spec.parameter.data().asnumpy()) for spec in parameter_specs(own)}
    monkeypatch.setattr(Stored, '__getitem__', counted)
    expected = {name: p.data().asnumpy() for name, p in named_parameters(whole).items()}
    for rank, found in enumerate(workers(work, mesh, [slice(0, 5), slice(5, 10)])):
        assert 0.2 < sum(value.size for _, value in found.values()) / sum(map(np.size, expected.values())) < 0.6
        for name, (shard, value) in found.items():
            if mesh._replace(rank=rank).coordinate('data') == 0:
                np.testing.assert_array_equal(value, part_of(name, expected[name], shard), err_msg=name)
    print('bytes of the file, most at once, read', file.stat().st_size, *most)
    assert 0 < most[0] < 0.3 * file.stat().st_size and most[1] <= 2 * file.stat().st_size


def test_a_sender_waits_for_one_who_does_not_receive():
    """No more than what waits at both ends, and what the system's buffers hold, is in memory."""
    array, sent = np.zeros(1 << 20, 'float32'), []  # more than the buffers of a socket

    def work(control):
        before, after = pipeline_channels(control, mx.cpu())
        if after:
            thread = threading.Thread(target=lambda: [(after.send(array), sent.append(1)) for _ in range(40)])
            thread.start()
            time.sleep(1)
            waiting = len(sent)
            control.barrier('begin')
            thread.join(20)
        else:
            control.barrier('begin')
            waiting = sum(before.receive_values().size for _ in range(40)) // array.size
        control.barrier('end')
        (before or after).close()
        return waiting
    waiting, received = each(2, work, axis='pipeline')
    buffers = sum(int(Path(f'/proc/sys/net/ipv4/tcp_{way}mem').read_text().split()[-1]) for way in 'rw')
    assert WAITING <= waiting <= 2 * WAITING + 2 + -(-buffers // array.nbytes) and received == 40 == len(sent)


def test_a_channel_is_closed_with_arrays_that_nobody_took():
    def work(control):
        before, after = pipeline_channels(control, mx.cpu())
        for _ in range(2 * WAITING if after else 0):
            after.send(np.zeros(3))
        control.barrier('sent')
        (before or after).close()
    assert each(2, work, axis='pipeline') == [None, None]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith('channel')]


def test_who_holds_what_is_written():
    """ViT with 5 blocks in 3 stages, two replicas: segments are the embedding, the blocks and the head."""
    parts = [slice(0, 3), slice(3, 5), slice(5, 7)]
    assert mesh_table(Mesh(3, 2, 1), parts, ['a', 'a', 'b', 'b', 'c', 'd']).splitlines() == [
        '3 stages x 2 replicas of the model', '  stage 0: blocks 0 to 1, rank 0 on a, rank 1 on a',
        '  stage 1: blocks 2 to 3, rank 2 on b, rank 3 on b', '  stage 2: block 4, rank 4 on c, rank 5 on d']


def test_who_holds_which_part_is_written():
    assert mesh_table(Mesh(1, 2, 2), [slice(0, 14)], 'aabb').splitlines() == [
        '2 parts x 2 replicas of the model', '  blocks 0 to 11, rank 0 on a (part 1 of 2), rank 1 on a (part 2 of 2), '
        'rank 2 on b (part 1 of 2), rank 3 on b (part 2 of 2)']
    assert mesh_table(Mesh(1, 2, 2, seats=(0, 3, 1, 2)), [slice(0, 14)], 'abbb').splitlines()[1:] == [
        '  blocks 0 to 11, rank 0 on a (part 1 of 2), rank 3 on b (part 2 of 2), rank 1 on b (part 1 of 2), '
        'rank 2 on b (part 2 of 2)',
        '  parts of a block are on several hosts (ranks 0 and 3), and every sum of theirs goes over the network: give '
        'each host slots that are a multiple of 2']
    assert mesh_table(Mesh(2, 1, 2), [slice(0, 3), slice(3, 6)], 'aabb').splitlines() == [
        '2 stages x 2 parts x 1 replica of the model',
        '  stage 0: blocks 0 to 1, rank 0 on a (part 1 of 2), rank 1 on a (part 2 of 2)',
        '  stage 1: blocks 2 to 3, rank 2 on b (part 1 of 2), rank 3 on b (part 2 of 2)']
