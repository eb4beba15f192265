"""A run that goes on: what each way to agree has besides weights comes back, and it ends as if never interrupted."""
import itertools

import mxnet as mx
import numpy as np
import pytest
from support.tiny import DETECTOR, SEGMENTER
from support.together import Meeting, Together, together
from support.trainer import random_batches, take, tiny_config
from support.workers import each

from mxsimmim.config import configfile
from mxsimmim.interop import official
from mxsimmim.models import ParameterSpec
from mxsimmim.parallel import own_state, protocol
from mxsimmim.parallel.asynchronous import WeightServers
from mxsimmim.parallel.control import ControlPlane
from mxsimmim.parallel.mesh import Mesh
from mxsimmim.parallel.server import Server
from mxsimmim.runtime.process import ProcessInfo
from mxsimmim.training.build import build_trainer
from mxsimmim.training.checkpoint import load, newest

SEED, IMAGES, STEPS = 13, 6, 12
# Keys of `train`, which arrays besides weights and moments a checkpoint has, of how many workers.
EMA, TWO_BITS = ({'ema': 0.9}, ('ema',), 2), ({'compression': '2bit', 'threshold': 0.02}, ('workers',), 3)
OWN_MOMENTS = {'aggregation': 'local_sgd', 'local_steps': 3, 'average_moments': False}, ('workers',), 2
ELASTIC = {'aggregation': 'elastic', 'local_steps': 3}, ('workers',), 3
MODES = [({}, (), 2), EMA, ({'compression': 'fp16'}, (), 2), TWO_BITS,
         ({'aggregation': 'local_sgd', 'local_steps': 3}, (), 3), OWN_MOMENTS, ELASTIC]
STAGES, PARTS = dict(parallel=dict(pipeline=2, micro_batches=3)), dict(parallel=dict(tensor=2))
SHARDED = dict(parallel=dict(shard_optimizer=True))


OTHER_TASKS = {'segment': SEGMENTER, 'detect': DETECTOR}


def config(folder, name, train, task='pretrain', **keys):
    if task != 'pretrain':
        return configfile.load('conf/base.yaml', [*OTHER_TASKS[task], 'train.batch_size=4', f'output={folder}',
                                                  f'name={name}', *(f'train.{key}={value}'
                                                                    for key, value in train.items())])
    return tiny_config(output=str(folder), name=name, data=dict(path='digits', val_fraction=0, threads=1,
                                                                worker_weights=keys.pop('worker_weights', 'equal')),
                       train=dict(batch_size=IMAGES, length=STEPS, **train), seed=SEED, **keys)


def steps(trainer, first, last):
    """Updates number `first` up to `last`, on random batches or, of other tasks, on those that are next."""
    if trainer.config.task != 'pretrain':
        return [trainer.train_step(batch).asnumpy()
                for batch in itertools.islice(trainer._batches(), last - first)]
    batches = random_batches(trainer.config.model, last, IMAGES, SEED)
    return [trainer.train_step(take(batch, trainer.split.part)).asnumpy()
            for batch in itertools.islice(batches, first, None)]


def held(trainer):
    """All arrays that this worker has, those of the others and of the job aside."""
    rule = trainer.update_rule
    arrays = official.export_weights(trainer.placement.net)
    arrays.update({name: copies[0].asnumpy() for name, copies in rule.optimizer.moments.items()})
    arrays.update({f'ema.{name}': value for name, value in trainer.average.arrays().items()} if trainer.average else {})
    arrays.update({f'centre.{number}': value.asnumpy() for number, value in enumerate(getattr(rule, '_centre', ()))})
    for exchange in rule._exchanges:
        arrays.update({f'residual.{number}': value.copy()
                       for number, value in enumerate(exchange.transport.residuals)})
    return arrays


def assert_same(ours, expected):
    assert set(ours) == set(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(ours[name], value, err_msg=name)


@pytest.mark.parametrize('task, train, groups, workers', [('pretrain', *mode) for mode in MODES] + [
    ('segment', *OWN_MOMENTS), ('detect', *EMA)],
    ids=lambda value: ' '.join(map(str, value.values())) or '-' if isinstance(value, dict) else str(value))
def test_workers_go_on(tmp_path, task, train, groups, workers):
    """So many steps, saved, and as many more of new processes: in each worker the bits of all steps in one go."""
    print('seed', SEED)
    transport = 'horovod' if train.get('compression') == 'fp16' else 'ps'
    half = 6 if task == 'pretrain' else 3  # where workers that average have just done so

    def work(build):
        whole = build(config(tmp_path, 'whole', train, task))
        steps(whole, 0, half)
        halfway = held(whole)
        whole.save()  # which changes nothing
        assert_same(held(whole), halfway)
        expected = steps(whole, half, 2 * half)
        ours = build(config(tmp_path, 'whole', train, task), folder=tmp_path / 'whole' / 'checkpoints')
        assert ours.step == half
        assert_same(held(ours), halfway)
        np.testing.assert_array_equal(steps(ours, half, 2 * half), expected)
        assert_same(held(ours), held(whole))
        return held(ours)
    first, *others = together(workers, work, transport)
    saved = newest(tmp_path / 'whole' / 'checkpoints', print)
    assert set(saved.arrays) == {'weights', 'optimizer', *groups}
    if 'workers' in groups:  # which really differ
        different = [name for name, value in first.items() if not np.array_equal(value, others[0][name])]
        assert any(name.startswith('residual' if 'compression' in train else 'mean.') for name in different)


def test_another_number_of_workers_begins_with_what_all_have(tmp_path, capfd):
    """The centre and the mean of the moments."""
    train = {'aggregation': 'elastic', 'local_steps': 3}
    checkpoints = tmp_path / 'run' / 'checkpoints'

    def first(build):
        trainer = build(config(tmp_path, 'run', train, worker_weights=[1, 2, 3]))
        steps(trainer, 0, 6)
        trainer.save()
        return held(trainer)

    def then(build):
        return held(build(config(tmp_path, 'run', train), folder=checkpoints))
    three, two = together(3, first), together(2, then)
    assert 'step-00000006 has no state of each of these workers: all begin with the same' in capfd.readouterr().err
    assert_same(two[0], two[1])
    for name, value in two[0].items():
        if name.startswith('mean.'):
            mean = sum(weight * worker[name] for weight, worker in zip((1 / 6, 2 / 6, 3 / 6), three))
            np.testing.assert_allclose(value, mean, rtol=1e-5, atol=1e-9)
        elif name.startswith('centre.'):
            np.testing.assert_array_equal(value, three[0][name])


@pytest.mark.unmeasured
@pytest.mark.parametrize('mode, keys', [
    (TWO_BITS, {}), (ELASTIC, {}), (TWO_BITS, STAGES), (ELASTIC, STAGES), (EMA, PARTS), (OWN_MOMENTS, PARTS),
    (TWO_BITS, SHARDED)])
def test_devices_of_workers(tmp_path, mode, keys):
    """What workers of two devices each have, by replicas, by stages, by parts of blocks; and divided moments."""
    train = mode[0]

    def work(build):
        made = config(tmp_path, 'run', train, devices=['cpu(0)', 'cpu(1)'], **keys)
        whole = build(made)
        steps(whole, 0, 6)
        whole.save()
        ours = build(made, folder=tmp_path / 'run' / 'checkpoints')
        np.testing.assert_array_equal(steps(ours, 6, 9), steps(whole, 6, 9))
        assert_same(held(ours), held(whole))
    together(2, work, 'horovod' if keys == SHARDED else 'ps')


@pytest.mark.parametrize('seats', [(0, 1, 2, 3), (0, 3, 1, 2)])
@pytest.mark.parametrize('piece', [7, own_state.PIECE])
def test_workers_that_hold_a_model_together(monkeypatch, piece, seats):
    """Each gets its own back, whatever the shapes of the others', and its rank; not where it held other parts."""
    monkeypatch.setattr(own_state, 'PIECE', piece)
    mesh, meeting = Mesh(pipeline=2, data=2), Meeting(4)
    shapes = [{'a': (3, 5), 'b': (2,)}, {'c': (4,)}]  # of the stages

    def work(control):
        def specs_of(shapes):
            specs = []
            for name, shape in shapes.items():
                parameter = mx.gluon.Parameter(name, shape=shape)
                parameter.initialize()
                specs.append(ParameterSpec(name, parameter))
            return specs

        def states(specs):
            gradients = [spec.parameter.list_grad() for spec in specs]
            return own_state.OwnStateOfParts(everybody, handle, specs, {
                kind: own_state.residuals_in(gradients, residuals) for kind, residuals in held.items()})
        place = seats.index(control.rank)
        everybody = Together(ProcessInfo(rank=place, size=4, servers=1, transport='ps'), control, meeting)
        handle = everybody.register([[mx.nd.zeros((piece,))]])
        own, rng = shapes[place // 2], np.random.default_rng(SEED + control.rank)
        held = {kind: [rng.normal(size=int(np.prod(shape))).astype('float32') for shape in own.values()]
                for kind in ('residual', 'other')}
        expected = {kind: [each.copy() for each in arrays] for kind, arrays in held.items()}
        specs = specs_of(own)
        state = states(specs)
        gathered = state.gathered()
        saved = {name: value.copy() for name, value in zip(gathered.kinds, gathered.values)}
        assert [value.shape for value in saved.values()] == [shape for _, shape in gathered.kinds.values()
                                                             ][:len(saved)]
        for arrays in held.values():
            for array in arrays:
                array[:] = 9
        assert state.load(saved if control.rank == 0 else None)
        for kind, arrays in held.items():
            for array, before in zip(arrays, expected[kind]):
                np.testing.assert_array_equal(array, before)
        others = specs_of({name: shape[::-1] for name, shape in own.items()})
        assert not states(others).load(saved if control.rank == 0 else None)
        assert not state.load(None)
        return list(saved)
    first, *rest = each(4, work, mesh=mesh)
    assert first == [f'{rank}.{kind}.{name}' for rank in range(4) for kind in ('residual', 'other')
                     for name in shapes[rank // 2]] and rest == [[]] * 3


KEY = bytes(range(32))


class Servers(WeightServers):
    """A server in this process, and a second worker that pushes whatever this one does."""

    def __init__(self):
        self.rank, self.size, self.servers, self.control = 0, 2, 1, ControlPlane()
        self._arrays, self._sent = {}, 0
        self._server = Server(lambda: self, KEY)
        self.command({})

    def _set_updater(self, updater):
        self._update = updater

    def command(self, content):
        self._sent += 1
        self._server.control(0, protocol.sign(content, self._sent, KEY).encode())

    def init(self, keys, arrays):
        self._arrays.update((key, array.copy()) for key, array in zip(keys, arrays))

    def push(self, key, array):
        for _ in range(1 + (key < self._server._layout.weights and key not in self._server._unset)):
            self._update(key, array.copy(), self._arrays[key])

    def pull(self, key, copies):
        for copy in copies:
            self._arrays[key].copyto(copy)

    def meet(self):
        mx.nd.waitall()


def on_servers(folder, checkpoint=None):
    keys = tiny_config(output=str(folder), name='run', train=dict(batch_size=IMAGES, length=STEPS, store='dist_async'),
                       optim=dict(schedule='cosine', warmup=3, clip_grad=None), seed=SEED)
    process = ProcessInfo(size=2, servers=1, transport='ps')
    servers = Servers()
    return build_trainer(keys, process, communicator=servers, checkpoint=checkpoint), servers


def of_server(servers):
    return {**{key: value.asnumpy() for key, value in servers._arrays.items() if key < servers._server._layout.board},
            'updates': np.array(sorted(servers._server._updates.items()))}


def test_servers_that_update(tmp_path):
    """Weights, moments, counts of updates and predicted weights: 6 steps, and 6 of new servers, are 12 in one go."""
    whole, one = on_servers(tmp_path)
    steps(whole, 0, 6)
    whole.save()
    ours, two = on_servers(tmp_path, load(tmp_path / 'run' / 'checkpoints' / 'step-00000006'))
    ahead, weights = (one._arrays[base].asnumpy() for base in (0, 3 * one._server._layout.stride))
    assert np.abs(ahead - weights).max() > 1e-5  # predictions matter
    np.testing.assert_array_equal(steps(ours, 6, STEPS), steps(whole, 6, STEPS))
    assert_same(of_server(two), of_server(one))


def test_servers_apply_nothing_of_a_push_that_is_not_finite(tmp_path):
    """Also where one parameter's gradient alone is not, or the loss: other keys of the push are of the same step."""
    trainer, servers = on_servers(tmp_path)
    compute, spoil = trainer.placement.forward_backward, {}

    def forward_backward(batch, *others):
        loss = compute(batch, *others)
        if 'gradient' in spoil:
            trainer.update_rule._parameters[3].list_grad()[0][:] = spoil['gradient']
        return loss + spoil.get('loss', 0)
    trainer.placement.forward_backward = forward_backward
    steps(trainer, 0, 2)
    for case in ({'gradient': np.nan}, {'gradient': 1e30}, {'loss': np.inf}):
        before = of_server(servers)
        spoil.update(case)
        assert [applied for *_, applied in steps(trainer, 2, 3)] == [0]
        spoil.clear()
        after = of_server(servers)
        assert (after.pop('updates')[:, 1] == before.pop('updates')[:, 1] + 2).all()
        assert_same(after, before)
        assert [applied for *_, applied in steps(trainer, 2, 3)] == [1]
        assert any(not np.array_equal(after[key], value) for key, value in of_server(servers).items())
