"""The segmenter: both encoders, native and reference operators, however a batch is divided, and what it starts from."""
import mxnet as mx
import numpy as np
import pytest
from support import machine
from support.trainer import relative_difference

from mxsimmim.config import ConfigError, ModelConfig, configfile
from mxsimmim.data.loader import Batch
from mxsimmim.interop import official
from mxsimmim.models import build_segmenter, build_simmim, named_parameters, parameter_specs
from mxsimmim.models.segmenter import segmenter_cost
from mxsimmim.ops import REFERENCE, OpBackend
from mxsimmim.optim import OPTIMIZERS, parameter_groups
from mxsimmim.parallel.placement import Replicated

SEED, CLASSES = 5, 4
MODELS = {
    'vit': ModelConfig(img_size=(32, 48), patch_size=8, embed_dim=16, depth=4, num_heads=2, drop_path=0.2,
                       head_channels=16),
    'swin': ModelConfig(type='swin', img_size=(64, 96), patch_size=4, embed_dim=8, depths=(1, 1, 1, 1),
                        num_heads=(1, 1, 2, 2), window_size=4, drop_path=0.2, head_channels=32)}


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]


def random_batch(model, images=6):
    rng = np.random.default_rng(SEED)
    print('seed', SEED)
    labels = rng.integers(0, CLASSES, (images, *model.size)).astype('uint8')
    labels[rng.random(labels.shape) < 0.2] = 255
    return Batch({'image': rng.integers(0, 256, (images, *model.size, 3), 'uint8'), 'label_map': labels,
                  'uniform': rng.random((images, 2 * model.blocks), 'float32')}, 0, np.arange(images))


def gradients(model, backend=REFERENCE, contexts=1, accumulate=1):
    """Loss and gradients, those of several contexts added up."""
    batch = random_batch(model)
    placement = Replicated(build_segmenter(model, CLASSES, SEED, backend), [mx.cpu(i) for i in range(contexts)],
                           accumulate)
    loss = placement.forward_backward(batch, len(batch.index)).asscalar()
    return loss, {spec.name: sum(grad.asnumpy() for grad in spec.parameter.list_grad())
                  for spec in parameter_specs(placement.net)}


def test_shapes_and_names(model):
    net = build_segmenter(model, CLASSES, SEED)
    height, width = model.size
    logits = net(mx.nd.zeros((2, 3, height, width)))
    finest = 2 if model.type == 'vit' else 4
    assert logits.shape == (2, CLASSES, height // finest, width // finest)
    names = set(named_parameters(net))
    assert {'patch_embed.proj.weight', 'decode_head.psp_modules.3.1.conv.weight', 'decode_head.bottleneck.gn.bias',
            'decode_head.lateral_convs.2.conv.weight', 'decode_head.fpn_convs.0.gn.weight', 'decode_head.conv_seg.bias',
            'auxiliary_head.convs.0.conv.weight', 'auxiliary_head.conv_seg.weight'} <= names
    assert ({'norm0.weight', 'norm3.bias'} if model.type == 'swin' else
            {'fpn1.0.weight', 'fpn1.1.bias', 'fpn1.3.bias', 'fpn2.0.weight'}) <= names
    assert segmenter_cost(model, CLASSES) > 0


@pytest.mark.parametrize('form', machine.FORMS)
def test_a_divided_batch_has_the_same_gradient(model, form):
    """In parts of 2 images, on two contexts, to 1e-5 in the L2 norm: no statistics of a batch."""
    backend = OpBackend(form)
    loss, expected = gradients(model, backend)
    other, found = gradients(model, backend, contexts=2, accumulate=3)
    assert abs(other - loss) < 1e-5 * loss
    assert relative_difference(found, expected) < 1e-5


@pytest.mark.skipif('native' not in machine.FORMS, reason='no native operators here')
def test_native_operators_compute_the_same(model):
    loss, expected = gradients(model)
    other, found = gradients(model, OpBackend('native'))
    assert abs(other - loss) < 1e-5 * loss
    assert relative_difference(found, expected) < 1e-4


def test_pixels_without_a_class(model):
    """They add nothing, and count in what the sum is divided by."""
    batch = random_batch(model, 2)
    net = build_segmenter(model, CLASSES, SEED)
    placement = Replicated(net, [mx.cpu()])
    half = batch.fields['label_map'].copy()
    half[:, :, model.size[1] // 2:] = 255

    def loss(labels):
        return placement.loss(batch._replace(fields={**batch.fields, 'label_map': labels})).asscalar()
    other = np.where(batch.fields['label_map'] == 255, 200, batch.fields['label_map']).astype('uint8')
    assert loss(other) == loss(batch.fields['label_map'])
    rest = batch.fields['label_map'].copy()
    rest[:, :, :model.size[1] // 2] = 255
    assert loss(half) + loss(rest) == pytest.approx(loss(batch.fields['label_map']), rel=1e-5)
    assert loss(np.full_like(half, 255)) == 0


@pytest.mark.parametrize('form', machine.FORMS)
def test_an_update_right_after_inference_is_not_lost(model, form):
    """oneDNN lays out the weights of convolutions for inference anew; the optimiser must not update a copy."""
    backend, batch = OpBackend(form), random_batch(model, 2)
    net = build_segmenter(model, CLASSES, SEED, backend)
    placement = Replicated(net, [mx.cpu()])
    specs = {spec.name: spec for spec in parameter_specs(net) if len(spec.parameter.shape) == 4}
    config = configfile.load('conf/base.yaml', ['task=segment']).optim
    optimizer = OPTIMIZERS['adamw'](specs.values(), config, backend)
    for step in range(2):
        placement.forward_backward(batch, 2)
        before = {name: spec.parameter.data().asnumpy() for name, spec in specs.items()}
        placement.outputs(batch)
        optimizer.update(step, 1e-2, mx.nd.ones((1,)))
        moved = {name: np.abs(spec.parameter.data().asnumpy() - before[name]).max() for name, spec in specs.items()}
        assert min(moved.values()) > 1e-3, (step, moved)


def test_inference_is_the_same_hybridized(model):
    net, image = build_segmenter(model, CLASSES, SEED), mx.nd.random.normal(shape=(2, 3, *model.size))
    expected = net(image).asnumpy()
    net.hybridize(static_alloc=True)
    for _ in range(2):
        np.testing.assert_allclose(net(image).asnumpy(), expected, rtol=1e-4, atol=1e-5)


def test_starts_from_a_pre_training(model):
    """Of square images of another size: position tables are resized, the heads are new."""
    side = 32 if model.type == 'vit' else 96
    other = model.model_copy(update={'img_size': side, 'use_shared_rpb': False, 'use_rpb': True})
    own = model.model_copy(update={'use_shared_rpb': False, 'use_rpb': True})
    source = build_simmim(other, SEED)
    net = build_segmenter(own, CLASSES, SEED + 1)
    new = official.load_encoder_weights(net, official.export_weights(source))
    assert all(name.startswith(('decode_head.', 'auxiliary_head.', 'norm', 'fpn')) for name in new)
    np.testing.assert_array_equal(named_parameters(net)['patch_embed.proj.weight'].data().asnumpy(),
                                  named_parameters(source)['encoder.patch_embed.proj.weight'].data().asnumpy())


@pytest.mark.parametrize('word, told', [
    ('parallel.pipeline=2', 'parallel.pipeline=2: segment trains whole models'),
    ('parallel.tensor=2', 'parallel.tensor=2: segment trains whole models'),
    ('parallel=auto', 'parallel.auto=true: segment trains whole models'),
    ('validation.scales=[]', 'scales=[] must be different numbers from 0.1 to 4, such as [0.75, 1, 1.25]'),
    ('validation.scales=[1, 0]', 'scales=[1.0, 0.0] must be different numbers from 0.1 to 4'),
    ('validation.scales=[1, 1]', 'scales=[1.0, 1.0] must be different numbers from 0.1 to 4')])
def test_refused(word, told):
    with pytest.raises(ConfigError) as error:
        configfile.load('conf/base.yaml', ['task=segment', word])
    assert told in str(error.value) and '\n' not in str(error.value)


def test_layer_decay():
    net = build_segmenter(MODELS['swin'], CLASSES, None)
    groups = parameter_groups(net, 0.5, 0.05)
    assert groups['patch_embed.proj.weight'] == (0.5 ** 5, 0.05)
    assert groups['layers.3.blocks.0.mlp.fc1.weight'] == (0.5, 0.05)
    for name in ('norm0.weight', 'decode_head.bottleneck.gn.weight', 'decode_head.conv_seg.bias'):
        assert groups[name] == (1.0, 0.0), name
    assert groups['decode_head.fpn_convs.0.conv.weight'] == (1.0, 0.05)
