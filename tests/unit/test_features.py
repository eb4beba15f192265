"""Features: the tokens after a block, whatever follows it; a cache that never answers for something else."""
import os

import mxnet as mx
import numpy as np
import pytest
from PIL import Image
from support import tiny
from support.runs import DATA, awake, stored, trained

from mxsimmim.config import ModelConfig
from mxsimmim.data.sources import Digits, ImageFiles
from mxsimmim.data.transforms import ClassifyEvalTransform
from mxsimmim.inference import features
from mxsimmim.inference.trained import load_run
from mxsimmim.interop import official
from mxsimmim.models import build_classifier, build_simmim

VIT = dict(tiny.VIT, depth=3, use_ape=True, use_shared_rpb=False)
SWIN = dict(type='swin', img_size=32, patch_size=4, embed_dim=8, depths=(2, 2), num_heads=(1, 2), window_size=4)


@pytest.fixture
def images(tmp_path):
    """Five images, two of one class and three of another."""
    for number in range(5):
        file = tmp_path / 'images' / ('cat' if number < 2 else 'dog') / f'{number}.png'
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (20, 24, 3), 'uint8')).save(file)
    return tmp_path / 'images'


def files(folder):
    return ImageFiles(sorted(map(str, folder.glob('*/*.png'))))


def normalised(source, model):
    """What the network gets, (n, 3, S, S), computed with Pillow and NumPy."""
    transform = ClassifyEvalTransform(DATA, model)
    batch = np.stack([transform(np.asarray(Image.open(source.name(i))), np.random.default_rng(0))['image']
                      for i in range(len(source))])
    return mx.nd.array(((batch / 255 - DATA.mean) / DATA.std).transpose(0, 3, 1, 2))


@pytest.mark.parametrize('keys', [VIT, SWIN], ids=['vit', 'swin'])
@pytest.mark.parametrize('pretraining', [True, False])
def test_the_last_block_is_the_encoder(images, keys, pretraining):
    model = ModelConfig(**keys)
    net = awake(build_simmim(model) if pretraining else build_classifier(model, 3))
    source = files(images)
    found = features.extract(trained(net), DATA, source, [model.blocks])
    tokens = net.encoder(normalised(source, model)).asnumpy()[:, net.encoder.prefix_tokens:]
    assert list(found) == [model.blocks] and found[model.blocks].dtype == np.float32
    assert tokens.shape[1] == 16
    np.testing.assert_allclose(found[model.blocks], tokens.mean(1), rtol=1e-4, atol=1e-5)


def test_a_block_is_the_last_of_a_network_that_ends_there(images):
    """Without final norm (use_mean_pooling): what follows block b must not matter, and the mask token neither."""
    net = awake(build_simmim(ModelConfig(**VIT)))
    weights = official.export_weights(net)
    found = features.extract(trained(net), DATA, files(images), [1, 2, 3])
    for depth in (1, 2):
        short = build_classifier(ModelConfig(**{**VIT, 'depth': depth, 'use_mean_pooling': True}), 3)
        own = official.export_weights(short)
        official.load_weights(short, {name: weights.get(f'encoder.{name}', value) for name, value in own.items()})
        tokens = short.encoder(normalised(files(images), short.config)).asnumpy()[:, 1:]
        np.testing.assert_allclose(found[depth], tokens.mean(1), rtol=1e-4, atol=1e-5)
    assert not np.allclose(found[1], found[2], atol=1e-3) and not np.allclose(found[2], found[3], atol=1e-3)


def test_blocks_of_swin_go_through_its_stages(images):
    net = awake(build_simmim(ModelConfig(**SWIN)))
    found = features.extract(trained(net), DATA, files(images), [1, 2, 3, 4])
    assert [values.shape for values in found.values()] == [(5, 8), (5, 8), (5, 16), (5, 16)]
    x = net.encoder.patch_embed(normalised(files(images), net.config))
    first, second = net.encoder.layers[0].blocks
    second_out = second(first(x, None), None)
    np.testing.assert_allclose(found[2], second_out.asnumpy().mean(1), rtol=1e-4, atol=1e-5)
    third = net.encoder.layers[1].blocks[0](net.encoder.layers[0].downsample(second_out), None)
    np.testing.assert_allclose(found[3], third.asnumpy().mean(1), rtol=1e-4, atol=1e-5)


def test_weights_that_diverged_are_said(images):
    net = build_simmim(ModelConfig(**VIT))
    net.encoder.blocks[1].mlp.fc2.bias.set_data(mx.nd.full((16,), np.nan))
    with pytest.raises(ValueError, match='after block 2 the features of 5 of 5 images are not finite'):
        features.extract(trained(net), DATA, files(images), [1, 2])


def test_an_unreadable_image_is_named(images):
    (images / 'dog' / '3.png').write_bytes(b'broken')
    with pytest.raises(ValueError, match='remove or repair .*3.png: not an image'):
        features.extract(trained(build_simmim(ModelConfig(**VIT))), DATA, files(images), [3])


def test_blocks_named():
    model = ModelConfig(**SWIN)
    assert [features.blocks_named(text, model) for text in ('', '1', '4', 'all')] == [[4], [1], [4], [1, 2, 3, 4]]
    for text in ('0', '5', '-1', 'last', '1.0', '²'):
        with pytest.raises(ValueError, match=f'--block {text}: this swin has blocks 1 to 4'):
            features.blocks_named(text, model)


def test_the_cache_answers_for_the_same_and_nothing_else(images, tmp_path, monkeypatch):
    computed = []
    compute = features.extract

    def counted(done, data, source, blocks):
        computed.append(list(blocks))
        return compute(done, data, source, blocks)

    monkeypatch.setattr(features, 'extract', counted)

    def ask(net, blocks, data=DATA, source=None):
        computed.clear()
        done = trained(net)
        return features.cached(tmp_path, done, data, source or files(images), blocks), [b for c in computed for b in c]

    net, other = (build_simmim(ModelConfig(**VIT), seed) for seed in (0, 1))
    first, work = ask(net, [1, 2])
    assert work == [1, 2]
    again, work = ask(net, [1, 2, 3])
    assert work == [3] and all(np.array_equal(first[b], again[b]) for b in (1, 2))
    assert ask(net, [1, 2, 3])[1] == []
    assert ask(other, [1])[1] == [1]  # other weights of the same step
    assert ask(net, [1], DATA.model_copy(update={'eval_crop': 0.5}))[1] == [1]
    assert ask(net, [1], source=ImageFiles([files(images).name(0)]))[1] == [1]
    assert ask(net, [1])[1] == []
    changed = images / 'cat' / '0.png'
    Image.new('RGB', (9, 9)).save(changed)
    found, work = ask(net, [1])
    assert work == [1] and not np.array_equal(found[1][0], first[1][0]) and np.array_equal(found[1][1:], first[1][1:])
    for file in (tmp_path / 'features').iterdir():
        file.write_bytes(file.read_bytes()[:100])
    assert ask(net, [1])[1] == [1] and ask(net, [1])[1] == []
    assert not [name for name in os.listdir(tmp_path / 'features') if name.startswith('.')]
    for file in (tmp_path / 'features').iterdir():
        file.unlink()
    (tmp_path / 'features').rmdir()
    (tmp_path / 'features').write_text('no folder')
    again, work = ask(net, [1])
    assert work == [1] and np.array_equal(again[1], found[1])


def test_save_features(images, tmp_path):
    net = build_simmim(ModelConfig(**VIT))
    run, out = stored(tmp_path, net), tmp_path / 'out.npz'
    said = features.save_features(run, [str(images)], '2', out, tmp_path / 'out.png')
    assert said == f'{out}: 5 x 16 after block 2 of 3, step 7, 2 classes\n{tmp_path}/out.png'
    with np.load(out) as saved:
        assert saved['features'].dtype == np.float32
        np.testing.assert_allclose(saved['features'], features.extract(load_run(run), DATA, files(images), [2])[2],
                                   rtol=1e-5)
        assert saved['names'].tolist() == files(images)._paths and saved['labels'].tolist() == [0, 0, 1, 1, 1]
        assert saved['classes'].tolist() == ['cat', 'dog'] and saved['block'] == 2 and saved['step'] == 7
        assert saved['run'] == 'tiny'
    picture = Image.open(tmp_path / 'out.png')
    assert picture.size[0] > 900 and len(picture.convert('RGB').getcolors(1 << 20)) > 3  # paper, ink, two classes


def test_images_with_and_without_labels(images):
    single = str(images / 'cat' / '0.png')
    for paths, count in (([single], 1), ([str(images / 'dog')], 3), ([str(images / 'dog'), single], 4)):
        source, labels, classes = features.open_images(paths)
        assert len(source) == count and labels is None and classes == ()
    source, labels, classes = features.open_images(['digit-scenes-val'])
    assert (len(source), labels, classes) == (500, None, ())
    source, labels, classes = features.open_images(['digits'])
    assert len(source) == len(labels) == 1797 and classes == tuple('0123456789')
    (images / 'empty').mkdir()
    with pytest.raises(ValueError, match='class folder .*empty has no images'):
        features.open_images([str(images)])
    with pytest.raises(ValueError, match='nowhere does not exist'):
        features.open_images(['nowhere'])


def test_bad_requests(images, tmp_path):
    run = stored(tmp_path, build_simmim(ModelConfig(**VIT)))
    out = tmp_path / 'out.npz'
    for block, paths, place, picture, complaint in (
            ('4', [str(images)], out, None, r'--block 4: this vit has blocks 1 to 3'),
            ('all', [str(images)], out, None, '--block all is for `mxsimmim probe`'),
            ('', [str(images / 'cat')], out, tmp_path / 'p.png', '2 images are too few for a picture, which needs 5'),
            ('', [str(images)], tmp_path / 'none' / 'x.npz', None, 'none/x.npz: cannot be written: No such file')):
        with pytest.raises(ValueError, match=complaint):
            features.save_features(run, paths, block, place, picture)
    assert not out.exists()


def test_digits_are_a_source_of_features():
    net = build_classifier(ModelConfig(**VIT), 10)
    few = features.extract(trained(net), DATA, Digits(), [3])[3]
    assert few.shape == (1797, 16) and np.isfinite(few).all()
