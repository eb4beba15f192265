"""The detector: both encoders, native and reference operators, however a batch is divided, and what it starts from."""
import subprocess
import sys

import mxnet as mx
import numpy as np
import pytest
from support import machine
from support.trainer import relative_difference, take

from mxsimmim.config import ModelConfig, configfile
from mxsimmim.config.model import MASK_SIDE, OBJECTS
from mxsimmim.data.loader import Batch
from mxsimmim.interop import official
from mxsimmim.models import build_detector, build_simmim, named_parameters, parameter_specs, rcnn
from mxsimmim.models.detector import detector_cost
from mxsimmim.models.rcnn import MASK
from mxsimmim.ops import REFERENCE, OpBackend
from mxsimmim.optim import OPTIMIZERS, parameter_groups
from mxsimmim.parallel.placement import Replicated

SEED, CLASSES = 5, 4
MODELS = {
    'vit': ModelConfig(img_size=(32, 48), patch_size=8, embed_dim=16, depth=2, num_heads=2, drop_path=0.2,
                       head_channels=16, anchor_scale=4),
    'swin': ModelConfig(type='swin', img_size=(64, 96), patch_size=4, embed_dim=8, depths=(1, 1, 1, 1),
                        num_heads=(1, 1, 2, 2), window_size=4, drop_path=0.2, head_channels=16, anchor_scale=4)}


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]


def random_batch(model, images=4):
    """Images with 3 objects, a crowd besides, none, 5 objects, …"""
    rng = np.random.default_rng(SEED)
    print('seed', SEED)
    height, width = model.size
    y, x = (np.mgrid[:MASK_SIDE, :MASK_SIDE] + 0.5) / MASK_SIDE * 2 - 1
    fields = {'image': rng.integers(0, 256, (images, height, width, 3), 'uint8'),
              'boxes': np.zeros((images, OBJECTS, 4), 'float32'), 'classes': np.full((images, OBJECTS), -1, 'int32'),
              'crowd': np.zeros((images, OBJECTS), 'uint8'),
              'masks': np.zeros((images, OBJECTS, MASK_SIDE, MASK_SIDE), 'uint8'),
              'priority': rng.random((images, model.candidates[0] + OBJECTS), 'float32'),
              'uniform': rng.random((images, 2 * model.blocks), 'float32')}
    for image in range(images):
        count = (3, 4, 0, 5)[image % 4]
        corner, side = rng.uniform(0, 0.6, (count, 2)), rng.uniform(0.2, 0.4, (count, 2))
        fields['boxes'][image, :count] = np.concatenate([corner, corner + side], 1) * (width, height, width, height)
        fields['classes'][image, :count] = rng.integers(0, CLASSES, count)
        fields['masks'][image, :count] = y * y + x * x <= 1
        fields['crowd'][image, 3:count] = count == 4
    if not model.masks:
        del fields['masks']
    return Batch(fields, 0, np.arange(images))


def place(model, backend=REFERENCE, contexts=1, accumulate=1):
    return Replicated(build_detector(model, CLASSES, SEED, backend), [mx.cpu(i) for i in range(contexts)], accumulate)


def gradients(placement, batch, total=None):
    """Loss and gradients, those of several contexts added up."""
    loss = placement.forward_backward(batch, total or len(batch.index)).asscalar()
    return loss, {spec.name: sum(grad.asnumpy() for grad in spec.parameter.list_grad())
                  for spec in parameter_specs(placement.net)}


def with_fields(batch, **fields):
    return batch._replace(fields={**batch.fields, **fields})


def test_shapes_and_names(model):
    net = build_detector(model, CLASSES, SEED)
    names = set(named_parameters(net))
    assert {'patch_embed.proj.weight', 'neck.lateral_convs.3.conv.weight', 'neck.fpn_convs.0.conv.weight',
            'rpn_head.rpn_conv.weight', 'rpn_head.rpn_cls.bias', 'rpn_head.rpn_reg.weight',
            'roi_head.bbox_head.shared_fcs.1.weight', 'roi_head.bbox_head.fc_cls.weight',
            'roi_head.bbox_head.fc_reg.bias', 'roi_head.mask_head.convs.3.conv.weight',
            'roi_head.mask_head.upsample.weight', 'roi_head.mask_head.conv_logits.weight'} <= names
    assert ({'norm0.weight', 'norm3.bias'} if model.type == 'swin' else
            {'neck.fpn1.0.weight', 'neck.fpn1.1.bias', 'neck.fpn1.3.bias', 'neck.fpn2.0.weight',
             'neck.lateral_convs.0.gn.bias'}) <= names
    boxes = build_detector(model.model_copy(update={'masks': False}), CLASSES, SEED)
    assert set(named_parameters(boxes)) == {name for name in names if '.mask_head.' not in name}
    assert 'masks' in net.inputs and 'masks' not in boxes.inputs
    assert detector_cost(model, CLASSES) > detector_cost(boxes.config, CLASSES) > 0
    for name, units in {'fc_cls': CLASSES + 1, 'fc_reg': 4 * CLASSES}.items():
        assert named_parameters(net)[f'roi_head.bbox_head.{name}.weight'].shape == (units, 64)


@pytest.mark.parametrize('masks', [True, False])
def test_answers(model, masks):
    """Boxes inside of the image, the best score first, the same hybridized and for each image alone."""
    model = model.model_copy(update={'masks': masks})
    net, image = build_detector(model, CLASSES, SEED), mx.nd.random.normal(shape=(2, 3, *model.size))
    found = net(image).asnumpy()
    assert found.shape == (2, OBJECTS, 6 + masks * MASK * MASK) and np.isfinite(found).all()
    box, score, number = found[..., :4], found[..., 4], found[..., 5]
    height, width = model.size
    assert (score[:, 0] > 0.05).all() and (np.diff(score) <= 0).all()
    assert (box >= 0).all() and (box <= (width, height, width, height)).all()
    there = number >= 0
    assert (np.unique(number) >= -1).all() and number.max() < CLASSES
    assert (box[there][:, 2:] > box[there][:, :2]).all() and (score[there] > 0.05).all()
    assert not found[~there][:, :5].any() and not found[~there][:, 6:].any() and (number[~there] == -1).all()
    if masks:
        assert (found[there][:, 6:] > 0).all() and (found[there][:, 6:] < 1).all()
    net.hybridize(static_alloc=True)
    for _ in range(2):
        np.testing.assert_allclose(net(image).asnumpy(), found, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(net(image[1:]).asnumpy(), found[1:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('form', machine.FORMS)
def test_a_divided_batch_has_the_same_gradient(model, form):
    """On two contexts and in two parts, or as 1 and 3 images: to 1e-6 in the L2 norm. Twice: bit by bit."""
    backend, batch = OpBackend(form), random_batch(model)
    placement = place(model, backend)
    loss, expected = gradients(placement, batch)
    assert all(np.isfinite(each).all() and each.any() for each in expected.values())
    again, same = gradients(place(model, backend), batch)
    assert again == loss and all(np.array_equal(same[name], each) for name, each in expected.items())
    other, found = gradients(place(model, backend, contexts=2, accumulate=2), batch)
    assert abs(other - loss) < 1e-6 * loss
    assert relative_difference(found, expected) < 1e-6
    parts = [gradients(placement, take(batch, part), 4) for part in (slice(0, 1), slice(1, 4))]
    assert abs(sum(each for each, _ in parts) - loss) < 1e-6 * loss
    summed = {name: sum(each[name] for _, each in parts) for name in expected}
    assert relative_difference(summed, expected) < 1e-6


@machine.natively
def test_native_operators_compute_the_same(model):
    batch = random_batch(model)
    loss, expected = gradients(place(model), batch)
    other, found = gradients(place(model, OpBackend('native')), batch)
    assert abs(other - loss) < 1e-5 * loss
    assert relative_difference(found, expected) < 1e-4


@pytest.mark.parametrize('form', machine.FORMS)
def test_what_does_not_count(form):
    """Numbers after the last object, masks of crowds; the order of objects."""
    model = MODELS['swin']
    batch, placement = random_batch(model), place(model, OpBackend(form))
    loss = placement.loss(batch).asscalar()
    boxes, masks = batch.fields['boxes'].copy(), batch.fields['masks'].copy()
    nothing = batch.fields['classes'] < 0
    boxes[nothing], masks[nothing] = (3, 4, 30, 40), 1
    masks[batch.fields['crowd'] > 0] = 1
    assert placement.loss(with_fields(batch, boxes=boxes, masks=masks)).asscalar() == loss
    order = np.array([2, 0, 1, *range(3, OBJECTS)])
    turned = {name: batch.fields[name][:, order] for name in ('boxes', 'classes', 'crowd', 'masks')}
    assert placement.loss(with_fields(batch, **turned)).asscalar() != 0


def test_images_without_objects(model):
    """Their loss is that of the background: gradients reach what tells objects apart, and no box or mask."""
    model = model.model_copy(update={'drop_path': 0.0})  # what is dropped has no gradient
    batch = take(random_batch(model), slice(2, 3))
    del batch.fields['uniform']
    assert (batch.fields['classes'] < 0).all()
    loss, found = gradients(place(model), batch)
    assert np.isfinite(loss) and loss > 0
    for name, gradient in found.items():
        assert np.isfinite(gradient).all(), name
        told = '.mask_head.' not in name and 'fc_reg' not in name and 'rpn_reg' not in name
        assert bool(gradient.any()) == told, name


def test_boxes_in_a_crowd_are_no_negatives():
    """With a crowd over all of an image nothing is trained; with an object in it, that alone."""
    model = MODELS['swin']
    batch = take(random_batch(model), slice(2, 3))
    batch.fields['boxes'][0, 0], batch.fields['classes'][0, 0] = (-300, -300, 400, 400), 1
    batch.fields['crowd'][0, 0] = 1
    loss, found = gradients(place(model), batch)
    assert abs(loss) < 1e-6 and not any(each.any() for each in found.values())
    batch.fields['boxes'][0, 1], batch.fields['classes'][0, 1] = (8, 8, 40, 40), 2
    loss, found = gradients(place(model), batch)
    assert loss > 0.1 and found['roi_head.mask_head.conv_logits.weight'].any()


def test_priorities_choose():
    """Others give another loss where more boxes could be sampled than are."""
    model = MODELS['swin']
    batch, placement = random_batch(model), place(model)
    other = np.random.default_rng(1).random(batch.fields['priority'].shape, 'float32')
    assert placement.loss(with_fields(batch, priority=other)).asscalar() != placement.loss(batch).asscalar()


def test_sampled_boxes(model, monkeypatch):
    """Of 16 boxes of an image four are objects at most; where an image has one, those known are among them."""
    model, taken = model.model_copy(update={'sampled_boxes': 16}), []
    original = rcnn.sample
    monkeypatch.setattr(rcnn, 'sample', lambda *args: taken.append(original(*args)) or taken[-1])
    placement, batch = place(model), random_batch(model)
    placement.net.hybridize(False)
    loss = placement.loss(batch).asscalar()
    positive, used = (getattr(taken[0], name).asnumpy() for name in ('positive', 'used'))
    assert np.isfinite(loss) and used.shape == (4, 16) and used.all()
    assert (positive.sum(axis=1) >= (3, 3, 0, 4)).all() and not positive[2].any() and not positive[:, 4:].any()
    more = model.model_copy(update={'sampled_boxes': 512})
    assert 0 < detector_cost(model, CLASSES) < 0.5 * detector_cost(more, CLASSES)


@pytest.mark.parametrize('form', machine.FORMS)
def test_an_update_right_after_inference_is_not_lost(form):
    """oneDNN lays out the weights of convolutions for inference anew; the optimiser must not update a copy."""
    model = MODELS['swin']
    backend, batch = OpBackend(form), random_batch(model, 2)
    placement = place(model, backend)
    specs = {spec.name: spec for spec in parameter_specs(placement.net) if len(spec.parameter.shape) == 4}
    config = configfile.load('conf/base.yaml', ['task=segment']).optim
    optimizer = OPTIMIZERS['adamw'](specs.values(), config, backend)
    for step in range(2):
        placement.forward_backward(batch, 2)
        before = {name: spec.parameter.data().asnumpy() for name, spec in specs.items()}
        placement.outputs(batch)
        optimizer.update(step, 1e-2, mx.nd.ones((1,)))
        moved = {name: np.abs(spec.parameter.data().asnumpy() - before[name]).max() for name, spec in specs.items()}
        assert min(moved.values()) > 1e-3, (step, moved)


def test_learns():
    """One image by heart: the loss of 3.2 falls below 1 in 60 steps, and each object is found."""
    model = MODELS['swin'].model_copy(update={'drop_path': 0.0})
    backend = OpBackend(machine.FORMS[-1])
    batch, placement = take(random_batch(model), slice(0, 1)), place(model, backend)
    specs = list(parameter_specs(placement.net))
    config = configfile.load('conf/base.yaml', ['task=segment']).optim
    optimizer = OPTIMIZERS['adamw'](specs, config, backend)
    losses = []
    for step in range(60):
        losses.append(placement.forward_backward(batch, 1).asscalar())
        optimizer.update(step, 2e-3, mx.nd.ones((1,)))
    print(losses[::5])
    assert losses[-1] < 1 < losses[0]
    found = placement.outputs(batch)[0]
    known = batch.fields['boxes'][0, :3]
    low, high = np.maximum(found[:, None, :2], known[:, :2]), np.minimum(found[:, None, 2:4], known[:, 2:])
    common = np.maximum(high - low, 0).prod(2)
    union = (found[:, 2:4] - found[:, :2]).prod(1)[:, None] + (known[:, 2:] - known[:, :2]).prod(1) - common
    right = (common / union > 0.5) & (found[:, 5:6] == batch.fields['classes'][0, :3])
    assert right.any(axis=0).all()


def test_starts_from_a_pre_training(model):
    """Of square images of another size: position tables are resized, the heads are new."""
    side = 32 if model.type == 'vit' else 96
    other = model.model_copy(update={'img_size': side, 'use_shared_rpb': False, 'use_rpb': True})
    own = model.model_copy(update={'use_shared_rpb': False, 'use_rpb': True})
    source = build_simmim(other, SEED)
    net = build_detector(own, CLASSES, SEED + 1)
    new = official.load_encoder_weights(net, official.export_weights(source))
    assert all(name.startswith(('neck.', 'rpn_head.', 'roi_head.', 'norm')) for name in new)
    np.testing.assert_array_equal(named_parameters(net)['patch_embed.proj.weight'].data().asnumpy(),
                                  named_parameters(source)['encoder.patch_embed.proj.weight'].data().asnumpy())


def test_layer_decay():
    net = build_detector(MODELS['swin'], CLASSES, None)
    assert not any(spec.parameter.data().asnumpy().any() for spec in parameter_specs(net))
    groups = parameter_groups(net, 0.5, 0.05)
    assert groups['patch_embed.proj.weight'] == (0.5 ** 5, 0.05)
    assert groups['layers.3.blocks.0.mlp.fc1.weight'] == (0.5, 0.05)
    for name in ('norm0.weight', 'neck.fpn_convs.0.conv.bias', 'rpn_head.rpn_cls.bias'):
        assert groups[name] == (1.0, 0.0), name
    assert groups['roi_head.bbox_head.fc_cls.weight'] == (1.0, 0.05)


HIDDEN = """
import sys, types
torch = types.ModuleType('torch')
torch.__version__ = '2.13.0'
torch.__getattr__ = lambda name: (_ for _ in ()).throw(RuntimeError(name))
sys.modules['torch'] = torch
{more}
from PIL import ImageFile
from mxsimmim.models import from_gluoncv
try:
    print(from_gluoncv.model_zoo().MaskRCNN.__name__, sys.modules['torch'] is torch, ImageFile.LOAD_TRUNCATED_IMAGES)
except ValueError as error:
    print(error)
"""


@pytest.mark.parametrize('more, told', [
    ('', 'MaskRCNN True False'),
    ("sys.modules['gluoncv'] = None", "task=detect needs the package gluoncv: pip install 'mxsimmim[detect]'")])
def test_gluoncv_is_imported_without_torch(more, told):
    """Also where a program has loaded PyTorch, beside which it may not load; and what is said where it is not there.

    Its import has Pillow take truncated images for whole ones.
    """
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', HIDDEN.format(more=more)], stdout=subprocess.PIPE,
                          universal_newlines=True, check=True, timeout=60)
    assert done.stdout.strip() == told
