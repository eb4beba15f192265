"""tools/pack_records.py as a user runs it, and what MXNet reads of its output."""
import importlib.util
import io
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from mxsimmim.data.decode import decode
from mxsimmim.data.sources import open_source

ROOT = Path(__file__).parents[2]


PROGRAM = ROOT / 'tools' / 'pack_records.py'


def process(*args, **options):
    env = {**os.environ, 'PYTHONPATH': str(ROOT)}
    return subprocess.run([sys.executable, str(PROGRAM), *map(str, args)], env=env, capture_output=True, text=True,
                          timeout=120, **options)


@pytest.fixture
def pack(monkeypatch, capsys):
    """The program in this process, which has imported all that it needs: a second less each time."""
    spec = importlib.util.spec_from_file_location('pack_records', PROGRAM)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    before = signal.getsignal(signal.SIGTERM)

    def run(*args):
        monkeypatch.setattr(sys, 'argv', [str(PROGRAM), *map(str, args)])
        try:
            status = module.main()
        except SystemExit as end:  # argparse's
            status = end.code
        return SimpleNamespace(returncode=status, **capsys.readouterr()._asdict())
    yield run
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    """Two class folders of 12 JPEGs each, a PNG beside them."""
    folder = tmp_path_factory.mktemp('images')
    rng = np.random.default_rng(2)
    for number in range(25):
        coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        name = 'flat.png' if number == 24 else f'{"cat" if number % 2 else "dog"}/{number:02}.jpg'
        (folder / name).parent.mkdir(exist_ok=True)
        coarse.resize((120 + number, 90), Image.BICUBIC).save(folder / name)
    return folder


def test_files_are_copied_in_order(images, tmp_path):
    done = process(images, tmp_path / 'a.rec')
    assert done.returncode == 0, done.stderr
    assert '25 images' in done.stdout and '0 left out' in done.stdout and '9 of 25 images' in done.stdout
    paths = sorted(str(p) for p in images.rglob('*.*'))
    source = open_source(str(tmp_path / 'a.rec'))
    assert [source.read(i) for i in range(25)] == [Path(path).read_bytes() for path in paths]
    assert sorted(os.listdir(tmp_path)) == ['a.idx', 'a.rec']


@pytest.mark.parametrize('options', [(), ('--size', 64)], ids=str)
def test_any_number_of_threads_gives_the_same_bytes(pack, images, tmp_path, options):
    for threads in (1, 2, 5):
        assert pack(images, tmp_path / f'{threads}.rec', '--threads', threads, *options).returncode == 0
    assert len({(tmp_path / f'{threads}.rec').read_bytes() for threads in (1, 2, 5)}) == 1
    assert len({(tmp_path / f'{threads}.idx').read_bytes() for threads in (1, 2, 5)}) == 1


def test_short_side_is_shrunk(pack, images, tmp_path):
    sizes = {}
    for quality in (95, 50):
        out = tmp_path / f'{quality}.rec'
        assert pack(images, out, '--size', 64, '--quality', quality).returncode == 0
        source = open_source(str(out))
        pictures = [Image.open(io.BytesIO(source.read(i))) for i in range(25)]
        assert all(min(picture.size) == 64 and picture.format == 'JPEG' for picture in pictures)
        assert pictures[24].size == (64 * 144 // 90, 64)  # the PNG
        sizes[quality] = out.stat().st_size
    assert sizes[50] < 0.8 * sizes[95]
    assert pack(images, tmp_path / 'kept.rec', '--size', 90).returncode == 0
    assert pack(images, tmp_path / 'all.rec').returncode == 0
    assert (tmp_path / 'kept.rec').read_bytes() == (tmp_path / 'all.rec').read_bytes()  # never enlarged


def test_orientation_is_kept_and_not_applied_twice(pack, tmp_path):
    """Shrunk or not, an image is turned when it is read, if at all; a TIFF, which Pillow turns, need not be."""
    exif = Image.Exif()
    exif[0x0112] = 8
    image = Image.fromarray(np.random.default_rng(4).integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((160, 120), 3)
    for name in ('a.jpg', 'b.png', 'c.tif'):
        (tmp_path / 'images').mkdir(exist_ok=True)
        image.save(tmp_path / 'images' / name, exif=exif, **({'quality': 95} if name == 'a.jpg' else {}))
    want = np.asarray(image.resize((80, 60), 3), int)
    for size, shape in ((60, (60, 80)), (120, (120, 160))):
        assert pack(tmp_path / 'images', tmp_path / 'a.rec', '--size', size).returncode == 0
        for number in range(3):
            record = open_source(str(tmp_path / 'a.rec')).read(number)
            ignored, upright = (decode(record, 'x', turn) for turn in (False, True))
            assert upright.shape[:2] == shape[::-1]
            assert (ignored == (upright if number == 2 else np.rot90(upright, -1))).all()
            if size == 60:
                assert np.abs(upright - np.rot90(want)).mean() < 3


def test_an_image_that_is_too_long_for_a_jpeg_is_copied(pack, tmp_path):
    (tmp_path / 'images').mkdir()
    Image.new('L', (70_000, 65)).save(tmp_path / 'images' / 'wide.png')
    Image.new('L', (1, 60_000)).save(tmp_path / 'images' / 'thin.png')
    assert pack(tmp_path / 'images', tmp_path / 'a.rec', '--size', 64).returncode == 0
    for number, name in enumerate(('thin.png', 'wide.png')):
        assert open_source(str(tmp_path / 'a.rec')).read(number) == (tmp_path / 'images' / name).read_bytes()


def test_mxnet_reads_images_and_labels(pack, images, tmp_path):
    import mxnet as mx
    assert pack(images, tmp_path / 'a.rec').returncode == 0
    labels = [0] * 12 + [1] * 12 + [0]  # cat, dog, flat.png
    reader = mx.recordio.MXIndexedRecordIO(str(tmp_path / 'a.idx'), str(tmp_path / 'a.rec'), 'r')
    found = [mx.recordio.unpack(reader.read_idx(i)) for i in range(25)]
    reader.close()
    assert [header.label for header, _ in found] == labels and [header.id for header, _ in found] == list(range(25))
    batches = mx.io.ImageRecordIter(path_imgrec=str(tmp_path / 'a.rec'), path_imgidx=str(tmp_path / 'a.idx'),
                                    data_shape=(3, 90, 120), batch_size=5, preprocess_threads=1, verbose=False)
    read = [(batch.data[0].asnumpy(), batch.label[0].asnumpy()) for batch in batches]
    assert np.concatenate([label for _, label in read]).tolist() == labels
    first = np.asarray(Image.open(io.BytesIO(found[0][1])).convert('RGB'))  # 121 wide: cropped to the middle
    got = read[0][0][0].transpose(1, 2, 0)
    assert min(np.abs(got - first[:, left:left + 120]).max() for left in (0, 1)) <= 1


def test_broken_images_are_left_out_by_name(images, tmp_path):
    folder = tmp_path / 'some'
    (folder / 'x').mkdir(parents=True)
    for path in sorted(images.glob('cat/*'))[:3]:
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / 'x' / 'cut.jpg').write_bytes((images / 'cat' / '01.jpg').read_bytes()[:500])
    (folder / 'x' / 'empty.png').touch()
    (folder / 'x' / 'photo.heic').touch()
    done = process(folder, tmp_path / 'a.rec')
    assert done.returncode == 0 and '3 images' in done.stdout and '2 left out' in done.stdout
    assert 'left out: ' + str(folder / 'x' / 'cut.jpg') in done.stderr
    assert str(folder / 'x' / 'empty.png') + ': empty file' in done.stderr
    assert f'{folder}: 1 other file left out: .heic (1)\n' in done.stderr
    assert len(open_source(str(tmp_path / 'a.rec'))) == 3


def test_error_messages(pack, images, tmp_path):
    broken = tmp_path / 'broken'
    broken.mkdir()
    (broken / 'a.jpg').write_bytes(b'nothing')
    empty = tmp_path / 'empty'
    empty.mkdir()
    for args, message in (((tmp_path / 'none', tmp_path / 'a.rec'), 'none is not a folder'),
                          ((empty, tmp_path / 'a.rec'), 'empty has no images: no file in or below it ends in .jpg'),
                          ((broken, tmp_path / 'a.rec'), 'none of the 1 images in .*broken can be read'),
                          ((images, tmp_path / 'a.bin'), 'the name of a RecordIO file ends in .rec'),
                          ((images, tmp_path / 'no' / 'a.rec'), 'No such file or directory'),
                          ((images, tmp_path / 'a.rec', '--quality', 0), '--quality 0 is not between 1 and 100'),
                          ((images, tmp_path / 'a.rec', '--size', -3), '--size -3 is not between 1 and')):
        done = pack(*args)
        assert done.returncode != 0 and 'Traceback' not in done.err
        assert message.split('.*')[0] in done.err and message.split('.*')[-1] in done.err
    assert sorted(os.listdir(tmp_path)) == ['broken', 'empty']


def test_full_disk_leaves_nothing_behind(images, tmp_path):
    """A limit on the size of a file stands for the full disk: the same error path."""
    done = process(images, tmp_path / 'a.rec',
                   preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000)))
    assert done.returncode == 1 and 'Traceback' not in done.stderr
    assert 'a.rec: File too large after' in done.stderr and 'free some space' in done.stderr
    assert os.listdir(tmp_path) == []
