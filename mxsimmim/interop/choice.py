"""Which network of a checkpoint: files keep several side by side, each under the names of what it was wrapped in.

Names are those of tensors, with dots between them and the dicts that they are in: ``model.teacher.backbone.cls_token``.
A network is where a patch embedding is; what precedes that is its root, whatever wrappers have added to it.
"""
import os
from collections import Counter
from pathlib import Path
from typing import Callable, Dict, List, Mapping, Optional, Sequence, Tuple, Union

PATCHES = 'patch_embed.proj.weight'
HF_PATCHES = 'embeddings.patch_embeddings.projection.weight'
HF_MODELS = ('vit', 'beit', 'swin', 'swinv2')  # the encoder beside its head in Hugging Face's classes
USUAL = ('model.', 'state_dict.')  # taken first, in this order
LONGEST = 1000  # characters of a name that is looked at
SHOWN = 3


def split_key(path: Union[str, Path]) -> Tuple[Path, str]:
    """FILE and KEY of ``FILE:KEY``; a file that has a colon in its name is one, and KEY may be missing."""
    text = str(path)
    for end in [len(text)] + [at for at in reversed(range(1, len(text))) if text[at] == ':']:
        if os.path.isfile(text[:end]):
            return Path(text[:end]), text[end + 1:]
    file, colon, key = text.rpartition(':')
    return (Path(file), key) if colon and '/' not in key else (Path(text), '')


def usual(names: Sequence[str]) -> Dict[str, str]:
    """The names in 'model', else in 'state_dict', else all; each with what it is called there."""
    prefix = next((prefix for prefix in USUAL if any(name.startswith(prefix) for name in names)), '')
    return {name: name[len(prefix):] for name in names if name.startswith(prefix)}


def network(file: Path, names: Sequence[str], key: str, log: Callable[[str], None]) -> Dict[str, str]:
    """The names of one network's tensors, each with what it is called without the network's root.

    Without a key it is the only one, or the only one in 'model', else in 'state_dict'; `log` is told of others, and of
    tensors beside it. With a key it is the one whose root has that among its parts. A file without any network has its
    `usual` names.

    Raises:
        ValueError: several networks, or none of that key; lists them.
    """
    known = set(names)
    roots = list(dict.fromkeys(root for root in (_root(name, known) for name in names) if root is not None))
    if not roots:
        if key:
            raise ValueError(f"{file} has no ViT, BEiT or Swin under '{key}', nor elsewhere: leave ':{key}' out to see "
                             'what it holds')
        return usual(names)
    owners = {name: _owner(name, set(roots)) for name in names}
    sizes = Counter(owners.values())
    root = _chosen(file, roots, sizes, key, log)
    beside = [name for name, owner in owners.items() if owner is None and not name.startswith('optim')]
    if beside:
        more = ', …' if len(beside) > SHOWN else ''
        log(f'{file}: left out, beside the network: {", ".join(beside[:SHOWN])}{more} ({len(beside)} tensors)')
    return {name: name[len(root):] for name, owner in owners.items() if owner == root}


def _root(name: str, known: set) -> Optional[str]:
    """What precedes the names of the network whose patch embedding this is, empty or with a dot; None for others."""
    patches = next((patches for patches in (HF_PATCHES, PATCHES) if f'.{name}'.endswith(f'.{patches}')), None)
    if patches is None or name.startswith('optim') or len(name) > LONGEST:
        return None
    root = name[:-len(patches)]
    parent, dot, last = root[:-1].rpartition('.')
    headed = last in HF_MODELS if patches is HF_PATCHES else (
        last == 'encoder' and f'{parent}{dot}decoder.0.weight' in known)
    return parent + dot if headed else root


def _owner(name: str, roots: set) -> Optional[str]:
    """The longest root that the name begins with."""
    if len(name) > LONGEST:
        return None
    end = len(name)
    while end >= 0:
        end = name.rfind('.', 0, end)
        if name[:end + 1] in roots:
            return name[:end + 1]
    return None


def _chosen(file: Path, roots: List[str], sizes: Mapping[Optional[str], int], key: str,
            log: Callable[[str], None]) -> str:
    labels = {root: _label(root, roots) for root in roots}
    listed = ', '.join(f'{labels[root] or "the top level"} ({sizes[root]} tensors)' for root in roots)
    if key:
        fitting = [root for root in roots if root == f'{key}.'] or [
            root for root in roots if f'.{key}.' in f'.{root}']
        if not fitting:
            raise ValueError(f"{file} has no network under '{key}': it holds {listed}")
    else:
        fitting = next((inside for inside in ([root for root in roots if root.startswith(prefix)] for prefix in USUAL)
                        if inside), roots)
        fitting = [''] if '' in fitting else fitting
    if len(fitting) > 1:
        raise ValueError(f'{file} holds {len(fitting)} networks'
                         + (f" under '{key}'" if key else '') + ': '
                         + ', '.join(f'{labels[root]} ({sizes[root]} tensors)' for root in fitting)
                         + f': choose one, for instance {file}:{labels[fitting[-1]]}')
    if len(roots) > 1 and not key:
        other = next(root for root in reversed(roots) if root != fitting[0])
        log(f'{file} holds {len(roots)} networks: {listed}: taken is {labels[fitting[0]] or "the top level"}; '
            f'{file}:{labels[other]} takes another')
    return fitting[0]


def _label(root: str, roots: Sequence[str]) -> str:
    """The first part of a root that no other root has; the whole root if there is none."""
    others = {part for other in roots if other != root for part in other.split('.')} if len(roots) <= 100 else set()
    return next((part for part in root.split('.')[:-1] if part not in others and len(roots) <= 100), root[:-1])
