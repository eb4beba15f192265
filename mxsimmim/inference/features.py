"""Features of a frozen network: the mean of an image's patch tokens after any block, nothing masked."""
import contextlib
import hashlib
import json
import os
import zipfile
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import mxnet as mx
import numpy as np
from mxnet.gluon import HybridBlock

from ..config import DataConfig, ModelConfig
from ..data.labels import labelled_source
from ..data.loader import every_image
from ..data.scenes import is_scenes
from ..data.sources import ImageFiles, Source, image_files, open_source, tell
from ..data.transforms import ClassifyEvalTransform
from ..interop import official
from ..models import Detector, Segmenter
from .trained import Trained, data_in_use, load_for_inference

BATCH = 64  # images at a time
DRAWN = 5000  # images at most in a picture: t-SNE takes minutes for many more


def extract(trained: Trained, data: DataConfig, source: Source, blocks: Sequence[int]) -> Dict[int, np.ndarray]:
    """Returns block -> float32 (n, C), the mean of the patch tokens that the block puts out for each image.

    Blocks count from 1, in Swin through all stages; after the last one comes the encoder's final norm, if it has one.
    The images are transformed as for evaluation, as `data` says; the network must not be hybridized.

    Raises:
        ValueError: an image that cannot be read, or features that are not finite.
    """
    net = trained.net
    if isinstance(net, (Segmenter, Detector)):
        raise ValueError(f'features are of whole images, and this run is {trained.predictor.kind.partition(",")[0]}: '
                         'give the run that its encoder is from')
    layers, prefix = _layers(net.encoder, net.config), net.encoder.prefix_tokens
    pooled: Dict[int, mx.nd.NDArray] = {}

    def keep(number: int) -> Callable[..., None]:
        def hook(_block: HybridBlock, _inputs: Any, tokens: mx.nd.NDArray) -> None:
            pooled[number] = tokens.slice_axis(axis=1, begin=prefix, end=None).mean(axis=1)
        return hook

    hooks = [layers[number - 1].register_forward_hook(keep(number)) for number in blocks]
    found: Dict[int, List[np.ndarray]] = {number: [] for number in blocks}
    for batch in every_image(source, ClassifyEvalTransform(data, net.config), BATCH, data.threads):
        image = mx.nd.image.to_tensor(mx.nd.array(batch.fields['image'], ctx=trained.context, dtype='uint8'))
        net.encoder(mx.nd.image.normalize(image, mean=data.mean, std=data.std))
        for number in blocks:
            found[number].append(pooled[number].asnumpy())
    for hook in hooks:
        hook.detach()
    features = {number: np.concatenate(parts) for number, parts in found.items()}
    for number, values in features.items():
        if not np.isfinite(values).all():
            raise ValueError(f'after block {number} the features of {(~np.isfinite(values)).any(1).sum()} of '
                             f'{len(values)} images are not finite: this network diverged in training; take an '
                             'earlier checkpoint')
    return features


def _layers(encoder: Any, model: ModelConfig) -> List[HybridBlock]:
    """What puts out the tokens of each block: the blocks, but for the last one the encoder."""
    stages = [encoder] if model.type == 'vit' else encoder.layers
    return [block for stage in stages for block in stage.blocks][:-1] + [encoder]


def blocks_named(text: str, model: ModelConfig) -> List[int]:
    """Returns the blocks that '' (the last), 'all' or a number stands for.

    Raises:
        ValueError: there is no such block.
    """
    if text == 'all':
        return list(range(1, model.blocks + 1))
    if not text:
        return [model.blocks]
    if not text.isdecimal() or not 1 <= int(text) <= model.blocks:
        raise ValueError(f'--block {text}: this {model.type} has blocks 1 to {model.blocks}; without it: the last')
    return [int(text)]


def cached(run: Path, trained: Trained, data: DataConfig, source: Source, blocks: Sequence[int]
           ) -> Dict[int, np.ndarray]:
    """Returns what `extract` does, from files in RUN/features where they hold the same weights, images and transform.

    What cannot be kept there is computed every time.

    Raises:
        ValueError: as `extract`.
    """
    origin = {'weights': _weights(trained), 'images': _images(source), 'img_size': trained.config.model.img_size,
              'eval_crop': data.eval_crop, 'mean': data.mean, 'std': data.std,
              'precision': trained.config.runtime.precision,
              **({'exif_orientation': True} if data.exif_orientation else {})}
    digest = hashlib.sha256(json.dumps(origin).encode()).hexdigest()
    files = {number: Path(run) / 'features' / f'step-{trained.step:08d}-block-{number:02d}-{digest[:12]}.npz'
             for number in blocks}
    kept = {number: _read(file, digest) for number, file in files.items()}
    features = {number: values for number, values in kept.items() if values is not None}
    missing = [number for number in blocks if number not in features]
    for number, values in extract(trained, data, source, missing).items() if missing else ():
        features[number] = values
        with contextlib.suppress(OSError, ValueError):  # another's run, a full disk: it costs time, no more
            files[number].parent.mkdir(exist_ok=True)
            write(files[number], features=values, origin=digest)
    return features


def _weights(trained: Trained) -> str:
    digest = hashlib.sha256()
    for name, array in sorted(official.export_weights(trained.net).items()):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _images(source: Source) -> str:
    """Of names, and where they are files, of their sizes and times."""
    digest = hashlib.sha256()
    for index in range(len(source)):
        name = source.name(index)
        digest.update(f'{name}\n'.encode('utf-8', 'surrogateescape'))
        file = name if os.path.exists(name) else name.rpartition('#')[0]
        if os.path.exists(file):
            status = os.stat(file)
            digest.update(f'{status.st_size} {status.st_mtime_ns}\n'.encode())
    return digest.hexdigest()


def _read(file: Path, digest: str) -> Optional[np.ndarray]:
    """None for a file that is not there, damaged, or of something else."""
    try:
        with np.load(file) as saved:
            return saved['features'] if str(saved['origin']) == digest else None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def write(file: Path, **arrays: Any) -> None:
    """Writes an .npz file, whole or not at all.

    Raises:
        ValueError: it cannot be written.
    """
    hidden = file.with_name(f'.{file.name}.{os.getpid()}')
    try:
        try:
            with open(hidden, 'wb') as opened:
                np.savez(opened, **arrays)
            os.replace(hidden, file)
        finally:
            hidden.unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(f'{file}: cannot be written: {error.strerror or error}; choose another place') from None


def open_images(paths: Sequence[str]) -> Tuple[Source, Optional[np.ndarray], Tuple[str, ...]]:
    """Opens files and folders, or what a data.path can be; returns (images, int64 (n,) labels or None, class names).

    Labels come with the digits, a RecordIO file, and one folder that has all its images in class folders.

    Raises:
        ValueError: nothing there, no images, or an empty class folder.
    """
    if len(paths) > 1 or os.path.isfile(paths[0]) and not paths[0].lower().endswith('.rec'):
        notes: List[str] = []
        return ImageFiles(image_files(paths, notes), notes), None, ()
    if os.path.isdir(paths[0]):
        source = open_source(paths[0])
        names = (source.name(index) for index in range(len(source)))
        if isinstance(source, ImageFiles) and any(os.path.samefile(os.path.dirname(name), paths[0]) for name in names):
            return source, None, ()
    return (open_source(paths[0]), None, ()) if is_scenes(paths[0]) else labelled_source(paths[0])


def save_features(run: Path, paths: Sequence[str], block: str, out: Path, picture: Optional[Path]) -> str:
    """Writes features, names, labels and classes (where known), block, step and run of the images as an .npz file.

    With `picture`, a t-SNE of them (van der Maaten and Hinton 2008), too. Returns a sentence about it all.

    Raises:
        ValueError: no such run, images or block, or a file that cannot be written.
    """
    trained = load_for_inference(run)
    if block == 'all':
        raise ValueError('--block all is for `mxsimmim probe`: features.npz holds those of one block, give its number')
    number, = blocks_named(block, trained.config.model)
    source, labels, classes = open_images(paths)
    tell(source.notes)
    if picture and len(source) < 5:
        raise ValueError(f'--picture {picture}: {len(source)} images are too few for a picture, which needs 5')
    features = extract(trained, data_in_use(trained.config), source, [number])[number]
    known = {} if labels is None else {'labels': labels, 'classes': np.array(classes)}
    write(out, features=features, names=np.array([source.name(i) for i in range(len(source))]), block=number,
          step=trained.step, run=trained.config.name, **known)
    said = f'{out}: {len(features):,} x {features.shape[1]} after block {number} of {trained.config.model.blocks}, ' \
           f'step {trained.step}' + ('' if labels is None else f', {len(classes)} classes')
    if picture:
        draw(features, labels, classes, f'{trained.config.name}, step {trained.step}, block {number}', picture)
        said += f'\n{picture}'
    return said


def draw(features: np.ndarray, labels: Optional[np.ndarray], classes: Sequence[str], title: str, out: Path) -> None:
    """Draws a t-SNE of features (n, C), of 5,000 random ones at most, as a PNG file."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    from ..data.sampling import generator
    from ..tasks.pictures import embedding
    chosen = np.sort(generator(0).permutation(len(features))[:DRAWN])
    features = features[chosen]
    if min(features.shape) > 50:  # as its authors do: faster, and less noise
        features = PCA(50, random_state=0).fit_transform(features)
    points = TSNE(init='pca', perplexity=min(30, (len(features) - 1) / 3), random_state=0).fit_transform(features)
    embedding(points, None if labels is None else labels[chosen], classes, title, out)
