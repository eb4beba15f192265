"""Patchify and the loss on masked cells, native and in plain MXNet, against NumPy in float64."""
import itertools

import mxnet as mx
import numpy as np
import pytest
from support import machine

from mxsimmim.config import DataConfig
from mxsimmim.ops import REFERENCE, OpBackend
from mxsimmim.ops.pixels import from_cells

MEAN, STD = DataConfig().mean, DataConfig().std
LIMITS = {'float32': 1e-5, 'bf16': 1e-2}
MODES = ['imperative', 'hybridized', 'exported']


@pytest.fixture
def backend(request):
    return OpBackend(*request.param)


@pytest.fixture
def native():
    machine.need_native()
    return OpBackend('native')


forms = pytest.mark.parametrize('backend', machine.ABLE, ids='-'.join, indirect=True)


def distance(found, expected):
    """Relative in norm; 0 where both vanish."""
    found, expected = np.asarray(found, 'float64'), np.asarray(expected, 'float64')
    size = np.linalg.norm(expected)
    return np.linalg.norm(found - expected) / size if size else float(np.abs(found).max())


class Loss(mx.gluon.HybridBlock):
    """The operator alone."""

    def __init__(self, backend, keys):
        super().__init__()
        self.backend, self._keys = backend, keys

    def hybrid_forward(self, F, tokens, weight, bias, target, mask):
        return self.backend.masked_loss(F, tokens, (weight, bias), target, mask, **self._keys)


class Cells(mx.gluon.HybridBlock):
    """The operator alone."""

    def __init__(self, backend, side, cell):
        super().__init__()
        self.backend, self._sizes = backend, ((side, side), cell)

    def hybrid_forward(self, F, image):
        return self.backend.patchify(F, image, *self._sizes, MEAN, STD)


def running(block, mode, names):
    """A function that computes what the block does: as it is, as a graph, or as a graph that went through JSON."""
    if mode == 'hybridized':
        block.hybridize(static_alloc=True, static_shape=True)
    if mode != 'exported':
        return block
    symbol = mx.sym.load_json(block(*map(mx.sym.var, names)).tojson())
    return mx.gluon.SymbolBlock(symbol, [mx.sym.var(name) for name in names])


def cells_of(image, cell):
    """(B, 3, H, W) to (B, cells, 3 * cell^2)."""
    images, down, across = len(image), image.shape[2] // cell, image.shape[3] // cell
    parts = image.reshape(images, 3, down, cell, across, cell).transpose(0, 2, 4, 1, 3, 5)
    return parts.reshape(images, down * across, 3 * cell * cell)


def masked_pixels(mask, n, cell):
    """(B, h, w) to (B, n^2, 3 * cell^2)."""
    patch = n * cell // mask.shape[1]
    pixels = mask.repeat(patch, 1).repeat(patch, 2).astype('float64')
    return cells_of(np.stack([pixels] * 3, 1), cell)


def expected_loss(tokens, weight, bias, target, mask, cell, prefix, kind, head):
    """Loss, and its gradients by tokens, weight and bias times `head`, in float64."""
    tokens, weight, bias, target = (x.astype('float64') for x in (tokens, weight, bias, target))
    hidden = masked_pixels(mask, int(round(target.shape[1] ** 0.5)), cell)
    d = tokens[:, prefix:] @ weight.T + bias - target
    divisor = (hidden.sum() / 3 + 1e-5) * 3
    loss = ((np.abs(d) if kind == 'l1' else d * d) * hidden).sum() / divisor
    slope = (np.sign(d) if kind == 'l1' else 2 * d) * hidden * head / divisor
    dtokens = np.zeros_like(tokens)
    dtokens[:, prefix:] = slope @ weight
    return loss, dtokens, np.einsum('blp,blc->pc', slope, tokens[:, prefix:]), slope.sum((0, 1))


def loss_case(seed, images, n, cell, patches, width, prefix, masked, dtype='uint8'):
    """Random inputs of the loss; masked: the share of patches, or 'one' patch, or 'uneven' between images."""
    print('seed', seed)
    rng = np.random.default_rng(seed)
    side = n * patches
    if masked == 'one':
        mask = np.zeros((images, side, side))
        mask[-1, side // 2, 0] = 1
    else:
        share = np.linspace(0, 1, images)[:, None, None] if masked == 'uneven' else masked
        mask = rng.random((images, side, side)) < share
    pixels = 3 * cell ** 2
    draw = [rng.standard_normal(shape).astype('float32') for shape in
            ((images, prefix + n * n, width), (pixels, width), (pixels,), (images, n * n, pixels))]
    draw[1] /= width ** 0.5
    # Errors well away from 0, where rounding could change the sign of l1's slope.
    decoded = draw[0][:, prefix:] @ draw[1].T + draw[2]
    draw[3] = (decoded + np.sign(draw[3]) * (0.2 + np.abs(draw[3]))).astype('float32')
    return draw + [mask.astype(dtype)]


def run_loss(block, arrays, head=None):
    """Loss, and the gradients of tokens, weight and bias where `head` is given."""
    inputs = [mx.nd.array(x, dtype=x.dtype) for x in arrays]
    for x in inputs[:3]:
        x.attach_grad()
        x.grad[:] = 7  # must be overwritten, also where nothing was masked
    with mx.autograd.record(head is not None):
        loss = block(*inputs)
    if head is None:
        return loss.asnumpy()
    loss.backward(mx.nd.array([head]))
    return [loss.asscalar()] + [x.grad.asnumpy() for x in inputs[:3]]


LOSS_CASES = [  # images, n, cell, patches, width, prefix, masked
    (3, 5, 4, 1, 33, 1, 0.6),
    (2, 3, 8, 4, 47, 0, 0.6),
    (2, 3, 6, 3, 1, 2, 0.1),
    (1, 1, 3, 1, 17, 0, 1.0),
    (4, 2, 5, 1, 64, 1, 'uneven'),
    (3, 2, 4, 2, 19, 0, 'uneven'),
    (2, 4, 16, 1, 96, 1, 'one'),
    (2, 2, 6, 2, 9, 1, 'one'),
]


@forms
@pytest.mark.parametrize('kind', ['l1', 'mse'])
@pytest.mark.parametrize('case', LOSS_CASES, ids=str)
def test_loss_and_gradients(backend, kind, case):
    cell, patches, prefix = case[2], case[3], case[5]
    for mode, dtype in zip(MODES, ('uint8', 'float32', 'int32')):
        arrays = loss_case(sum(case[:6]), *case, dtype=dtype)
        expected = expected_loss(*arrays, cell, prefix, kind, 0.7)
        block = Loss(backend, dict(cell=cell, patch=cell // patches, prefix=prefix, kind=kind))
        found = run_loss(running(block, mode, ['tokens', 'weight', 'bias', 'target', 'mask']), arrays, 0.7)
        for name, ours, theirs in zip(('loss', 'tokens', 'weight', 'bias'), found, expected):
            assert distance(ours, theirs) < LIMITS[backend.precision], (mode, name)


@forms
def test_another_batch_and_another_mask_through_the_same_graph(backend):
    keys = dict(cell=4, patch=4, prefix=1, kind='l1')
    block = running(Loss(backend, keys), 'hybridized', [])
    for seed, (images, masked) in enumerate([(3, 0.6), (3, 0.2), (1, 'uneven'), (3, 1.0), (2, 0.5)]):
        arrays = loss_case(seed, images, 3, 4, 1, 24, 1, masked)
        expected = expected_loss(*arrays, 4, 1, 'l1', 1.0)
        for ours, theirs in zip(run_loss(block, arrays, 1.0), expected):
            assert distance(ours, theirs) < LIMITS[backend.precision]
        assert distance(run_loss(block, arrays), expected[0]) < LIMITS[backend.precision]  # without gradients


@forms
@pytest.mark.parametrize('mode', MODES)
def test_nothing_masked(backend, mode):
    arrays = loss_case(1, 2, 3, 4, 2, 10, 1, 0.0)
    block = Loss(backend, dict(cell=4, patch=2, prefix=1, kind='l1'))
    found = run_loss(running(block, mode, ['tokens', 'weight', 'bias', 'target', 'mask']), arrays, 3.0)
    assert found[0] == 0 and not any(x.any() for x in found[1:])


@forms
@pytest.mark.parametrize('dtype', ['uint8', 'int8', 'int32', 'int64', 'float32', 'float64', 'bool'])
def test_a_mask_of_any_type(backend, dtype):
    arrays = loss_case(2, 2, 3, 4, 2, 10, 1, 0.5)
    block = Loss(backend, dict(cell=4, patch=2, prefix=1, kind='l1'))
    expected = run_loss(block, arrays, 1.0)
    for ours, theirs in zip(run_loss(block, arrays[:4] + [arrays[4].astype(dtype)], 1.0), expected):
        assert np.array_equal(ours, theirs)


@forms
def test_no_slope_where_there_is_no_error(backend):
    arrays = loss_case(3, 2, 2, 2, 1, 8, 0, 1.0)
    arrays[0][:] = 0
    arrays[3][:] = arrays[2]  # decoded is the bias
    found = run_loss(Loss(backend, dict(cell=2, patch=2, prefix=0, kind='l1')), arrays, 1.0)
    assert found[0] == 0 and not any(x.any() for x in found[1:])


@pytest.mark.parametrize('backend', machine.ABLE[1:], ids=['-'.join(able) for able in machine.ABLE[1:]],
                         indirect=True)  # MXNet's: no bias's without the weight's
def test_only_the_gradients_that_are_wanted(backend):
    arrays = loss_case(4, 2, 3, 4, 1, 24, 1, 0.6)
    expected = expected_loss(*arrays, 4, 1, 'l1', 1.0)[1:]
    for wanted in itertools.product((False, True), repeat=3):
        if not any(wanted):
            continue
        inputs = [mx.nd.array(x, dtype=x.dtype) for x in arrays]
        for x, want in zip(inputs, wanted):
            if want:
                x.attach_grad()
        with mx.autograd.record():
            loss = Loss(backend, dict(cell=4, patch=4, prefix=1, kind='l1'))(*inputs)
        loss.backward()
        for x, want, theirs in zip(inputs, wanted, expected):
            assert not want or distance(x.grad.asnumpy(), theirs) < LIMITS[backend.precision]


def test_the_target_has_no_gradient(native):
    arrays = [mx.nd.array(x, dtype=x.dtype) for x in loss_case(5, 2, 3, 4, 1, 24, 1, 0.6)]
    for backend in (REFERENCE, native):
        for x in arrays[:4]:
            x.attach_grad()
        with mx.autograd.record():
            loss = Loss(backend, dict(cell=4, patch=4, prefix=1, kind='l1'))(*arrays)
        loss.backward()
        assert arrays[0].grad.asnumpy().any() and not arrays[3].grad.asnumpy().any()


@pytest.mark.parametrize('kind', ['l1', 'mse'])
def test_the_same_bits_each_time(native, kind):
    arrays = loss_case(6, 3, 5, 8, 2, 50, 1, 0.5)
    runs = [run_loss(Loss(native, dict(cell=8, patch=4, prefix=1, kind=kind)), arrays, 1.0) for _ in range(3)]
    for run in runs[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(run, runs[0]))


@pytest.mark.parametrize('change, shapes', [
    (dict(weight=(48, 9)), ['(48, 9)', '(48, 10)']),
    (dict(bias=(47,)), ['(47,)', '(48,)']),
    (dict(target=(2, 8, 48)), ['(2, 10, 10)', '(2, 8, 48)']),
    (dict(target=(1, 9, 48)), ['(2, 10, 10)', '(1, 9, 48)']),
    (dict(target=(2, 9, 47)), ['(2, 9, 47)']),
    (dict(mask=(2, 4, 4)), ['(2, 4, 4)', '(2, 9, 48)']),
    (dict(mask=(2, 6, 3)), ['(2, 6, 3)', '(2, 9, 48)']),
    (dict(mask=(2, 9, 9)), ['(2, 9, 9)', '(2, 9, 48)']),
    (dict(mask=(3, 3, 3)), ['(3, 3, 3)', '(2, 9, 48)']),
    (dict(tokens=(2, 10)), ['(2, 10)', '(2, 9, 48)']),
], ids=str)
def test_shapes_that_do_not_fit(native, change, shapes):
    sizes = dict(tokens=(2, 10, 10), weight=(48, 10), bias=(48,), target=(2, 9, 48), mask=(2, 3, 3))
    sizes.update(change)
    block = Loss(native, dict(cell=4, patch=4, prefix=1, kind='l1'))
    with pytest.raises(mx.MXNetError) as caught:
        block(*(mx.nd.zeros(shape) for shape in sizes.values())).asnumpy()
    assert all(shape in str(caught.value) for shape in shapes), caught.value


def test_types_that_do_not_fit(native):
    block = Loss(native, dict(cell=4, patch=4, prefix=1, kind='l1'))
    shapes = (2, 10, 10), (48, 10), (48,), (2, 9, 48), (2, 3, 3)
    for wrong, dtype in ((0, 'float64'), (1, 'float16'), (3, 'uint8'), (4, 'float16')):
        with pytest.raises(mx.MXNetError, match="MXNet's type number"):
            block(*(mx.nd.zeros(shape, dtype=dtype if i == wrong else 'float32')
                    for i, shape in enumerate(shapes))).asnumpy()


IMAGE_CASES = [(2, 3, 1, 'S = 3'), (1, 4, 4, 'one cell'), (3, 15, 5, 'odd'), (2, 24, 4, '4'), (2, 32, 16, '16'),
               (1, 64, 32, '32'), (2, 14, 7, '7')]


@forms
@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('images, side, cell', [case[:3] for case in IMAGE_CASES])
def test_float_images_to_cells_and_back(backend, mode, images, side, cell):
    rng = np.random.default_rng(side)
    image = mx.nd.array(rng.standard_normal((images, 3, side, side)))
    image.attach_grad()
    block = running(Cells(backend, side, cell), mode, ['image'])
    with mx.autograd.record():
        cells = block(image)
    assert np.array_equal(cells.asnumpy(), cells_of(image.asnumpy(), cell))
    head = mx.nd.array(rng.standard_normal(cells.shape))
    cells.backward(head)
    assert np.array_equal(image.grad.asnumpy(), from_cells(mx.nd, head, side, cell).asnumpy())


@forms
@pytest.mark.parametrize('images, side, cell', [case[:3] for case in IMAGE_CASES])
def test_bytes_are_normalised_to_the_same_bits(backend, images, side, cell):
    rng = np.random.default_rng(side)
    image = rng.integers(0, 256, (images, side, side, 3), 'uint8')
    exact = (image / 255 - np.array(MEAN)) / np.array(STD)
    modes = MODES if backend.is_native else MODES[:1]  # plain MXNet's graphs take float images only
    for mode in modes:
        cells = running(Cells(backend, side, cell), mode, ['image'])(mx.nd.array(image, dtype='uint8'))
        assert cells.dtype == np.float32
        np.testing.assert_allclose(cells.asnumpy(), cells_of(exact.transpose(0, 3, 1, 2), cell), rtol=1e-5, atol=1e-6)
        plain = REFERENCE.patchify(mx.nd, mx.nd.array(image, dtype='uint8'), (side, side), cell, MEAN, STD)
        assert np.array_equal(cells.asnumpy(), plain.asnumpy())


@forms
@pytest.mark.parametrize('height, width, cell', [(8, 20, 4), (48, 16, 16), (3, 6, 3), (6, 3, 1)])
def test_height_and_width_apart(backend, height, width, cell):
    """Bytes too; also where both the second and the last side are 3, so that the shape alone does not tell which."""
    rng = np.random.default_rng(height)
    image = mx.nd.array(rng.integers(0, 256, (2, height, width, 3)), dtype='uint8')
    planes = mx.nd.array(rng.standard_normal((2, 3, height, width)))
    planes.attach_grad()
    with mx.autograd.record():
        cells = backend.patchify(mx.nd, planes, (height, width), cell, MEAN, STD)
    assert np.array_equal(cells.asnumpy(), cells_of(planes.asnumpy(), cell))
    cells.backward(cells)
    assert np.array_equal(planes.grad.asnumpy(), planes.asnumpy())
    found = backend.patchify(mx.nd, image, (height, width), cell, MEAN, STD).asnumpy()
    exact = ((image.asnumpy() / 255 - np.array(MEAN)) / np.array(STD)).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(found, cells_of(exact, cell), rtol=1e-5, atol=1e-6)


def test_all_bytes_are_normalised_to_the_same_bits(native):
    image = np.arange(256, dtype='uint8').reshape(1, 16, 16, 1).repeat(3, 3)
    for mean, std in ((MEAN, STD), ((0.1, 0.2, 1 / 3), (1 / 7, 3.3, 1e-3))):
        ours, plain = (form.patchify(mx.nd, mx.nd.array(image, dtype='uint8'), (16, 16), 4, mean, std)
                       for form in (native, REFERENCE))
        assert np.array_equal(ours.asnumpy(), plain.asnumpy())


def test_one_graph_takes_bytes_and_floats(native):
    block = running(Cells(native, 8, 4), 'hybridized', [])
    rng = np.random.default_rng(0)
    image = mx.nd.array(rng.integers(0, 256, (2, 8, 8, 3)), dtype='uint8')
    normalised = mx.nd.image.normalize(mx.nd.image.to_tensor(image), mean=MEAN, std=STD)
    cells = [block(x).asnumpy() for x in (image, normalised, image)]
    assert np.array_equal(cells[0], cells[1]) and np.array_equal(cells[0], cells[2])


@pytest.mark.parametrize('shape, dtype, cell, said', [
    ((2, 3, 8, 9), 'float32', 4, ['(2, 3, 8, 9)', '(4, 4)']),
    ((2, 4, 8, 8), 'float32', 4, ['(2, 4, 8, 8)', '(B, 3, H, W)']),
    ((3, 8, 8), 'uint8', 4, ['(3, 8, 8)', '(B, H, W, 3)']),
    ((2, 8, 8, 3), 'uint8', 3, ['(2, 8, 8, 3)', '(3, 3)']),
    ((2, 8, 8, 3), 'uint8', 0, ['(2, 8, 8, 3)', '(0, 0)']),
    ((2, 8, 8, 3), 'float32', 4, ['(2, 8, 8, 3)', '(B, 3, H, W)']),
    ((2, 3, 8, 8), 'uint8', 4, ['(2, 3, 8, 8)', '(B, H, W, 3)']),
    ((2, 3, 8, 8), 'float64', 4, ["MXNet's type number"]),
], ids=str)
def test_images_that_do_not_fit(native, shape, dtype, cell, said):
    with pytest.raises(mx.MXNetError) as caught:
        Cells(native, 8, cell)(mx.nd.zeros(shape, dtype=dtype)).asnumpy()
    assert all(part in str(caught.value) for part in said), caught.value
