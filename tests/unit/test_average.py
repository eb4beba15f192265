"""Averaged weights in closed form, on one device and on several."""
import mxnet as mx
import numpy as np
import pytest
from mxnet.gluon import Parameter
from support.specs import specs_of

from mxsimmim.config import ModelConfig
from mxsimmim.interop import official
from mxsimmim.models import build_classifier, named_parameters, parameter_specs
from mxsimmim.parallel.average import WeightAverage

SEED = 12
CONTEXTS = [[mx.cpu(0)], [mx.cpu(0), mx.cpu(1), mx.cpu(2)]]


def parameters(contexts, **values):
    made = {}
    for name, value in values.items():
        made[name] = Parameter(name, shape=np.shape(value))
        made[name].initialize(ctx=contexts)
        made[name].set_data(mx.nd.array(value))
    return made


def held(p):
    """What the devices hold, once it is known that it is the same."""
    first, *others = [copy.asnumpy() for copy in p.list_data()]
    assert all(np.array_equal(first, other) for other in others)
    return first


@pytest.mark.parametrize('contexts', CONTEXTS, ids=len)
def test_the_formula(contexts):
    """a <- d a + (1 - d) w with d = min(decay, (1 + k) / (10 + k)), in float64."""
    print('seed', SEED)
    rng = np.random.default_rng(SEED)
    made = parameters(contexts, a=rng.standard_normal((3, 2)), b=rng.standard_normal(5))
    average = WeightAverage(specs_of(made), 0.6)
    expected = {name: held(p).astype('float64') for name, p in made.items()}
    for k in range(1, 31):
        for name, p in made.items():
            p.set_data(mx.nd.array(rng.standard_normal(p.shape)))
            decay = min(0.6, (1 + k) / (10 + k))
            expected[name] = decay * expected[name] + (1 - decay) * held(p)
        average.update(k)
    for name, value in average.arrays().items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-5, atol=1e-6)
    own = {name: held(p) for name, p in made.items()}
    with average.applied():
        for name, p in made.items():
            np.testing.assert_array_equal(held(p), average.arrays()[name])
            assert not np.array_equal(held(p), own[name])
    assert all(np.array_equal(held(p), own[name]) for name, p in made.items())


def test_a_constant_decay_in_closed_form():
    """From 1 towards weights of 0, late in a run: decay to the power of the updates."""
    made = parameters([mx.cpu()], w=np.ones(3))
    average = WeightAverage(specs_of(made), 0.99)
    made['w'].set_data(mx.nd.zeros(3))
    for k in range(10_000, 10_100):
        average.update(k)
    np.testing.assert_allclose(average.arrays()['w'], 0.99 ** 100, rtol=1e-5)


def test_initial_weights_are_soon_forgotten():
    """With d = (1 + k) / (10 + k) they count prod_k d_k = 10! / ((n + 2) … (n + 10)) after n updates."""
    made = parameters([mx.cpu()], w=np.ones(1))
    average = WeightAverage(specs_of(made), 0.9999)
    made['w'].set_data(mx.nd.zeros(1))
    for k in range(1, 21):
        average.update(k)
    expected = np.prod([(1 + k) / (10 + k) for k in range(1, 21)])
    assert expected == pytest.approx(3628800 / np.prod(np.arange(22, 31, dtype=float)), rel=1e-12)
    np.testing.assert_allclose(average.arrays()['w'], expected, rtol=1e-5)


@pytest.mark.parametrize('contexts', CONTEXTS, ids=len)
def test_own_weights_come_back_after_an_error(contexts):
    made = parameters(contexts, w=np.zeros(2))
    average = WeightAverage(specs_of(made), 0.5)
    average.set('w', np.ones(2, 'float32'))
    with pytest.raises(KeyError, match='what went wrong'):
        with average.applied():
            assert held(made['w']).tolist() == [1, 1]
            raise KeyError('what went wrong')
    assert held(made['w']).tolist() == [0, 0]


def test_what_is_saved_is_taken_up_again_bit_by_bit():
    """In the reference's layouts, of which the patch embedding's is another than ours."""
    config = ModelConfig(img_size=16, patch_size=4, embed_dim=8, depth=1, num_heads=2)
    net = build_classifier(config, 3, seed=SEED)
    average = WeightAverage(parameter_specs(net), 0.9)
    for p in named_parameters(net).values():
        p.set_data(p.data() + 1)
    average.update(1)
    saved = average.arrays()
    assert {name: value.shape for name, value in saved.items()} == {
        name: value.shape for name, value in official.export_weights(net).items()}
    assert saved['patch_embed.proj.weight'].shape == (8, 3, 4, 4)
    again = WeightAverage(parameter_specs(net), 0.9)
    for name in again.names():
        again.set(name, saved[name])
    for both in (average, again):
        both.update(2)
    assert all(np.array_equal(again.arrays()[name], value) for name, value in average.arrays().items())
    with again.applied():
        assert all(np.array_equal(value, again.arrays()[name]) for name, value in official.export_weights(net).items())
