"""Which worker updates which parameter, where the optimiser is divided among them."""
import mxnet as mx
import numpy as np
import pytest
from mxnet.gluon import Parameter
from support.specs import specs_of

from mxsimmim.config import ModelConfig
from mxsimmim.models import build_simmim, parameter_specs
from mxsimmim.parallel.owners import clear, deal, owners_of, updated_by


@pytest.mark.parametrize('sizes, workers, owners', [
    ([], 2, []),
    ([5], 1, [0]),
    ([5], 3, [0]),
    ([3, 3, 3, 3], 2, [0, 1, 0, 1]),
    ([1, 2, 3, 4], 2, [0, 1, 1, 0]),
    ([8, 1, 1, 1, 1, 4], 2, [0, 1, 1, 1, 1, 1]),
    ([4, 4, 4, 1, 1], 3, [0, 1, 2, 0, 1]),
    ([7, 5, 5, 3], 3, [0, 1, 2, 1]),
])
def test_deal(sizes, workers, owners):
    assert deal(sizes, workers) == owners


@pytest.mark.parametrize('workers', [2, 3, 4, 8])
def test_parameters_of_a_network_are_dealt_evenly(workers):
    specs = parameter_specs(build_simmim(ModelConfig(img_size=32, embed_dim=96, depth=6, num_heads=3)))
    sizes = {spec.key: int(np.prod(spec.parameter.shape)) for spec in specs}
    dealt = [updated_by(worker, specs, workers) for worker in range(workers)]
    assert sorted(spec.key for part in dealt for spec in part) == sorted(sizes)  # each is somebody's, once
    loads = [sum(sizes[spec.key] for spec in part) for part in dealt]
    assert max(loads) < 1.05 * sum(loads) / workers
    assert max(loads) - min(loads) <= max(sizes.values())


def test_what_other_workers_hold_too_is_everybodys():
    made = {name: Parameter(name, shape=(2, 3)) for name in 'abc'}
    for parameter in made.values():
        parameter.initialize()
    specs = specs_of(made, dict.fromkeys('abc', 0.1))
    specs[1] = specs[1]._replace(axes=('pipeline', 'data'))
    assert owners_of(specs, 2) == {'a': 0, 'c': 1}
    assert [[spec.key for spec in updated_by(worker, specs, 2)] for worker in (0, 1)] == [['a', 'b'], ['b', 'c']]


def test_what_is_cleared_leaves_all_bits_of_a_sum():
    """Also those of -0.0, to which 0.0 would do something."""
    values = np.array([0.0, -0.0, 1e-45, -1e-45, 3.4e38, np.inf, -np.inf, 0.1, -7], 'float32')
    empty = mx.nd.array(values[::-1])
    clear(empty)
    assert (mx.nd.array(values) + empty).asnumpy().tobytes() == values.tobytes()
    assert (empty + mx.nd.array(values)).asnumpy().tobytes() == values.tobytes()
