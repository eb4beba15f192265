"""`parallel=auto`: what it chooses for jobs that are not there, and in a job of one process."""
import numpy as np
import pytest
from support.machine import need_native
from support.running import BASE
from support.tiny import TINY

from mxsimmim.config import ConfigError, configfile
from mxsimmim.parallel.control import ControlPlane
from mxsimmim.parallel.strategies import strategy_of
from mxsimmim.planner import automatic
from mxsimmim.planner.automatic import Machine
from mxsimmim.planner.costs import Layout
from mxsimmim.runtime.process import ALONE, ProcessInfo

CPU = Machine('a', 'cpu', 1, 32e9, 4, 1e9)
GPU = Machine('a', 'gpu', 1, 40e9, 4, 1e9)


def configured(recipe='vit_base', **changes):
    return configfile.load(f'conf/{recipe}.yaml', ['parallel=auto', *(f'{key}={value}' for key, value in
                                                                      changes.items())])


def job(size, transport='horovod', servers=0):
    return ProcessInfo(size=size, transport=transport if size > 1 else None, servers=servers)


def chosen(config, process, machines, native=True):
    """(pipeline, tensor, micro-batches, recompute), and the line."""
    keys, why = automatic.keys_for(config, process, machines, native)
    found = automatic.with_keys(config, keys)
    assert why.startswith('parallel=auto: ') and not found.parallel.auto and found.parallel.split == ()
    strategy_of(found, process, machines[0].devices)  # the job takes it
    return (found.parallel.pipeline, found.parallel.tensor, found.parallel.micro_batches, found.model.recompute), why


def on(machine, *hosts, bandwidth=1e9):
    """As many workers on each host, with so many bytes/s between two of them."""
    machines = [machine._replace(host=str(host)) for host, count in enumerate(hosts) for _ in range(count)]
    return [each._replace(bandwidth=bandwidth) if place and each.host != machines[place - 1].host else each
            for place, each in enumerate(machines)]


def test_what_fits_is_data_parallelism():
    for batch, process, machines in ((64, job(2), on(CPU, 2)), (64, job(4, 'ps', 2), on(CPU, 2, 2)),
                                     (64, ALONE, on(CPU, 1)), (512, job(8), on(GPU, 8))):
        config = configured(**{'train.batch_size': batch})
        found, why = chosen(config, process, machines)
        assert found == (1, 1, 8, False)
        assert why.startswith(f'parallel=auto: data {process.size}, pipeline 1, tensor 1, 1 micro-batches, ')
        assert 'GB a device; bottleneck: ' in why and 'a whole model' not in why


def test_memory_makes_a_pipeline():
    config = configured('vit_large', **{'train.batch_size': 16})
    machines = on(CPU._replace(memory=10e9), 2)  # whole models need 6.5 GB each and more
    (stages, tensor, micro_batches, _), why = chosen(config, job(2), machines)
    assert (stages, tensor) == (2, 1) and micro_batches >= 4
    assert 'a whole model on each device needs ' in why and why.endswith('and there are 4.50')


def test_a_slow_network_makes_a_pipeline():
    config = configured('vit_large', **{'train.batch_size': 16})
    fast, _ = chosen(config, job(2), on(CPU, 1, 1, bandwidth=10e9))
    slow, why = chosen(config, job(2), on(CPU, 1, 1, bandwidth=10e6))  # 80 Mb/s: 120 s of gradients
    assert (fast[0], slow[0]) == (1, 2) and 'next: data 2, pipeline 1' in why


def test_one_device_has_recomputation_alone():
    need_native()
    config = configured(**{'train.batch_size': 64})
    machine = CPU._replace(memory=6e9)
    assert chosen(config, ALONE, [machine])[0] == (1, 1, 8, True)
    with pytest.raises(ValueError, match='^parallel=auto: no layout fits: a device has 5.4 GB, and the least that any '
                                         r'needs is 8.\d GB .* raise train.accumulate=1$'):
        chosen(config, ALONE, [machine], native=False)
    with pytest.raises(ValueError, match='^parallel=auto: no layout fits'):
        chosen(config, ALONE, [machine._replace(memory=1e9)])


def test_devices_of_workers_hold_whole_models():
    """With servers a pipeline lies inside of each worker, and with Horovod too, where it has several devices."""
    config = configured('vit_large', **{'train.batch_size': 64, 'train.accumulate': 2})
    little = GPU._replace(devices=4, memory=12e9)
    for process in (job(2), job(2, 'ps', 2), ALONE):
        found, why = chosen(config, process, on(little, *[1] * process.size))
        assert 1 < found[0] * found[1] <= 4 and 4 % (found[0] * found[1]) == 0, why
    for stages in (2, 4):
        assert automatic.keys_of(config, Layout(4, stages, 1, 16))['parallel']['micro_batches'] == 8  # x 2 parts


def test_modes_without_common_weights_are_data_parallelism():
    for changes, process in (({'train.aggregation': 'local_sgd'}, job(2)),
                             ({'train.store': 'dist_async', 'optim.clip_grad': 'null'}, job(2, 'ps', 1))):
        found, why = chosen(configured(**changes), process, on(CPU, 1, 1))
        assert found[:2] == (1, 1) and 'every worker has a model of its own' in why


def test_weights_of_workers_are_kept():
    """As many as replicas: with two there is no pipeline of two."""
    config = configured('vit_large', **{'train.batch_size': 16, 'data.worker_weights': '[1,2]'})
    assert chosen(config, job(2), on(CPU, 1, 1, bandwidth=10e6))[0][0] == 1


@pytest.mark.parametrize('machines, cluster', [
    (on(CPU, 2, 2), (2, 2, 0.9 * 16e9)), (on(CPU, 3, 1), (4, 1, 0.9 * 32e9 / 3)),
    ([CPU, CPU._replace(memory=8e9, host='b')], (2, 1, 0.9 * 8e9)),
    (on(GPU._replace(devices=4), 1, 1), (2, 4, 0.9 * 40e9)),
    (on(CPU._replace(devices=2), 1), (1, 2, 0.9 * 16e9))])
def test_what_the_job_runs_on(machines, cluster):
    assert automatic.cluster_of(machines)[:3] == (*cluster[:2], pytest.approx(cluster[2]))


def test_the_slowest_link_counts():
    machines = [CPU, CPU, CPU._replace(host='b', bandwidth=3e8), CPU._replace(host='b', bandwidth=7e8)]
    found = automatic.cluster_of(machines)
    assert (found.bandwidth, found.local_bandwidth, found.speed) == (3e8, 7e8, 4e11)


def test_unlike_workers_are_refused():
    with pytest.raises(ValueError, match=r'^parallel=auto: rank 1 has 2 devices \(cpu\), and rank 0 1 \(cpu\): '):
        automatic.cluster_of([CPU, CPU._replace(devices=2)])


def test_in_the_configuration(tmp_path):
    file = tmp_path / 'a.yaml'
    file.write_text(f'base: {BASE}\nparallel: auto\n')
    assert configfile.load(file).parallel.auto
    again = tmp_path / 'again.yaml'
    again.write_text(configfile.to_yaml(configfile.load(file)))
    assert configfile.load(again) == configfile.load(file)
    assert configfile.load(file, ['parallel.auto=false', 'parallel.pipeline=2']).parallel.pipeline == 2
    with pytest.raises(ConfigError, match='auto=true chooses what pipeline=2, tensor=1 and split='):
        configfile.load(file, ['parallel.pipeline=2'])
    with pytest.raises(ConfigError, match="key 'parallel': input should be a valid dictionary"):
        configfile.load(file, ['parallel=best'])


def test_alone_nothing_is_measured_and_everything_else_stays():
    import mxnet as mx
    config = configfile.load(BASE, [*TINY, 'parallel=auto', 'devices=[cpu(0),cpu(1)]'])
    assert automatic.measured_bandwidth(ControlPlane()) == 0
    found, why = automatic.lay_out(config, ALONE, [mx.cpu(0), mx.cpu(1)], True, ControlPlane())
    differs = configfile.differences(config, found, ())
    assert {key for key, *_ in differs} <= {'parallel.auto', 'parallel.pipeline', 'parallel.tensor',
                                            'parallel.micro_batches', 'model.recompute'}
    assert ('parallel.auto', True, False) in differs and why.startswith('parallel=auto: data ')
    assert np.isfinite(automatic.machine_of([mx.cpu(0)], 'here').memory)


def test_what_check_says():
    import mxnet as mx

    from mxsimmim.ops import REFERENCE
    from mxsimmim.training import check
    config = configfile.load(BASE, [*TINY, 'parallel=auto'])
    why, found = check._layout(config, job(2)._replace(local_size=2), [mx.cpu(0)], REFERENCE)
    assert why.startswith('parallel=auto: data 2, ') and not found.parallel.auto
