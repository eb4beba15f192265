"""A classifier made of an official checkpoint, against recorded numbers of the reference's fine-tuning (float32).

finetune_*.npz is what the reference makes of finetune_*.pth at another resolution and window.
"""
import json
from pathlib import Path

import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd
from support import machine

from mxsimmim.config import ModelConfig
from mxsimmim.interop import official
from mxsimmim.models import Classifier, build_classifier, build_simmim, named_parameters
from mxsimmim.ops import OpBackend
from mxsimmim.optim import parameter_groups

pytestmark = pytest.mark.unmeasured

DATA = Path(__file__).parent.parent / 'data'


class Recorded:
    def __init__(self, kind):
        self.file, self.checkpoint = np.load(DATA / f'finetune_{kind}.npz'), DATA / f'finetune_{kind}.pth'
        self.meta = json.loads(self.file['meta'].tobytes().decode())
        self.classes = self.meta['finetune']['classes']
        keys = {**self.meta['pretrain'], **self.meta['finetune']}
        if kind == 'vit':
            keys.update(use_rpb=True, use_mean_pooling=True, use_shared_rpb=False)
        self.model = ModelConfig(**{key: value for key, value in keys.items() if key not in ('classes', 'batch')})

    def group(self, prefix):
        return {k[len(prefix) + 1:]: self.file[k] for k in self.file.files if k.startswith(prefix + '/')}

    def target(self):
        smoothing, label = self.meta['label_smoothing'], self.file['label']
        return mx.nd.array(np.eye(self.classes)[label] * (1 - smoothing) + smoothing / self.classes)


@pytest.fixture(params=machine.FORMS, autouse=True)
def backend(request):
    """Everything here holds for both forms of the operators."""
    return OpBackend(request.param)


@pytest.fixture(params=['vit', 'swin'])
def recorded(request):
    return Recorded(request.param)


def apart(ours, theirs):
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


def test_loading_an_official_checkpoint(recorded):
    net = build_classifier(recorded.model, recorded.classes, seed=1)
    before = official.export_weights(net)
    new = official.load_pretrained(net, recorded.checkpoint)
    expected, ours = recorded.group('param'), official.export_weights(net)
    assert set(ours) == set(expected)
    assert set(new) == {name for name in ours if name.startswith(('head.', 'fc_norm.'))}
    for name, value in ours.items():
        if name in new:
            np.testing.assert_array_equal(value, before[name])
        else:
            assert apart(value, expected[name]) < (1e-4 if name.endswith('table') else 1e-5), name


@pytest.mark.parametrize('hybrid', [False, True])
def test_logits_loss_and_gradients(recorded, backend, hybrid):
    net = build_classifier(recorded.model, recorded.classes, 0, backend)
    official.load_pretrained(net, recorded.checkpoint)
    official.load_weights(net, {**official.export_weights(net),
                                **{name: value for name, value in recorded.group('param').items()
                                   if name.startswith(('head.', 'fc_norm.'))}})
    if hybrid:
        net.hybridize(static_alloc=True)
    image = mx.nd.array(recorded.file['image'])
    assert np.abs(net(image).asnumpy() - recorded.file['logits']).max() < 1e-4
    with autograd.record():
        loss = net(image, recorded.target())
    loss.backward()
    assert abs(loss.asscalar() - recorded.file['loss']) < 1e-5
    gradients = official.export_weights(net, grad=True)
    for name, expected in recorded.group('grad').items():
        assert apart(gradients[name], expected) < 1e-3, name


def test_gradients_from_logits(recorded, backend):
    """The same by way of the logits and a loss of one's own."""
    net = build_classifier(recorded.model, recorded.classes, 0, backend)
    official.load_weights(net, recorded.group('param'))
    with autograd.record():
        logits = net(mx.nd.array(recorded.file['image']))
        loss = -(mx.nd.log_softmax(logits) * recorded.target()).sum(axis=1).mean()
    loss.backward()
    gradients = official.export_weights(net, grad=True)
    for name, expected in recorded.group('grad').items():
        assert apart(gradients[name], expected) < 1e-3, name


def test_layer_decay(recorded):
    net = build_classifier(recorded.model, recorded.classes)
    groups = parameter_groups(net, recorded.meta['layer_decay'], 0.05)
    assert groups == {name: (group['lr_scale'], group['weight_decay'])
                      for name, group in recorded.meta['groups'].items()}


def test_the_fixed_recipe_decays_no_table(recorded):
    net = build_classifier(recorded.model, recorded.classes)
    groups = parameter_groups(net, 1.0, 0.05, 'fixed')
    assert {decay for name, (_, decay) in groups.items() if name.endswith('table')} == {0.0}


@pytest.mark.parametrize('keys, classes, parameters', [
    (dict(type='vit', use_rpb=True, use_shared_rpb=False, use_mean_pooling=True), 1000, 86_530_984),
    (dict(type='swin', patch_size=4, embed_dim=128, depths=[2, 2, 18, 2], num_heads=[4, 8, 16, 32]), 1000, 87_768_224)])
def test_sizes_at_224(keys, classes, parameters):
    net = Classifier(ModelConfig(**keys), classes)  # without values
    assert sum(int(np.prod(p.shape)) for p in named_parameters(net).values()) == parameters


def test_weights_of_another_width(recorded, tmp_path):
    narrow = recorded.model.model_copy(update={'embed_dim': recorded.model.embed_dim * 2})
    with pytest.raises(ValueError, match=r'finetune_\w+\.pth: .*has shape .* the network needs .* more: set '
                       fr'model.embed_dim={recorded.model.embed_dim}$'):
        official.load_pretrained(build_classifier(narrow, 3, None), recorded.checkpoint)


def test_a_head_for_other_classes_is_left_out(recorded):
    net = build_classifier(recorded.model, 3)
    new = official.load_encoder_weights(net, recorded.group('param'))
    assert new == ['head.weight', 'head.bias']
    again = build_classifier(recorded.model, recorded.classes)
    assert official.load_encoder_weights(again, recorded.group('param')) == []


def test_learned_positions_are_resized():
    small, large = (ModelConfig(img_size=size, patch_size=8, embed_dim=12, depth=1, num_heads=2, use_ape=True,
                                use_mean_pooling=True) for size in (32, 48))
    pretrained = build_simmim(small)
    ramp = np.tile(np.arange(4.0), 4).reshape(1, 16, 1)
    plane = np.concatenate([np.full((1, 1, 12), 7.0), np.repeat(ramp, 12, 2)], 1)
    arrays = {**official.export_weights(pretrained), 'encoder.pos_embed': plane.astype('float32')}
    net = build_classifier(large, 2)
    official.load_encoder_weights(net, arrays)
    table = official.export_weights(net)['pos_embed'][0]
    # torch.nn.functional.interpolate(…, mode='bicubic')
    expected = np.array([-0.0868, 0.4063, 1.2130, 1.7870, 2.5938, 3.0868])
    np.testing.assert_allclose(table[1:, 5].reshape(6, 6), np.tile(expected, (6, 1)), atol=1e-4)
    np.testing.assert_array_equal(table[0], 7)
