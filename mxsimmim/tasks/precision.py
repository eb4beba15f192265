"""How right a detector is: average precision as COCO and Pascal VOC measure it, exact however images are divided.

COCO's is computed by pycocotools.
"""
import base64
import copy
import zlib
from typing import Any, Dict, List, NamedTuple, Sequence

import numpy as np

from ..config.model import OBJECTS
from ..data.geometry import Size
from ..data.objects import Objects
from .class_table import by_class
from .detections import Found, needed, overlaps, region_lengths

VOC = 0.5  # IoU from which Pascal VOC takes an object for found
# Of an image's boxes, those of a class together, and of its objects; `hits` and `ignored` have a bit for each of COCO's
# thresholds, `voc` is 1 for an object found, 0 for none, -1 for one that does not count.
FOUND = np.dtype([('class', '<i4'), ('score', '<f4'), ('hits', '<u2'), ('ignored', '<u2'), ('voc', 'i1')])
THERE = np.dtype([('class', '<i4'), ('ignored', 'i1')])


class Comparison:
    """Compares what is found in images with what is there, image by image.

    What it keeps is small: of each box its score and whether it is right, of each object whether it counts. The
    comparisons of all images are those of their parts, one after another, so workers can share them.
    """

    def __init__(self, masks: bool):
        """Begin without images; with `masks`, these are compared as well as boxes."""
        self._kinds = ('bbox', 'segm') if masks else ('bbox',)
        self._tables: Dict[str, List[np.ndarray]] = {
            f'{kind} {what}': [np.empty(0, kept)] for kind in self._kinds
            for what, kept in (('found', FOUND), ('objects', THERE))}

    def add(self, found: Found, objects: Objects, size: Size) -> None:
        """Compare an image of this size."""
        present = np.union1d(found.classes, objects.classes)
        right = voc_matches(found, objects)
        for kind in self._kinds:
            theirs = _coco(_truth(objects, size, kind), size, present)
            ours = _coco(_claims(found, kind), size, present)
            for number, each in zip(present, _compared(ours, theirs, kind)):
                if each is None:
                    continue
                own = np.flatnonzero(found.classes == number)[:len(each['dtScores'])]
                rows = np.zeros(len(own), FOUND)
                rows['class'], rows['score'], rows['voc'] = number, each['dtScores'], right[own]
                rows['hits'] = _bits(np.asarray(each['dtMatches']) > 0)
                rows['ignored'] = _bits(np.asarray(each['dtIgnore']) > 0)
                there = np.zeros(len(each['gtIgnore']), THERE)
                there['class'], there['ignored'] = number, each['gtIgnore']
                self._tables[f'{kind} found'].append(rows)
                self._tables[f'{kind} objects'].append(there)

    def state(self) -> Dict[str, str]:
        """Return what is kept, JSON-ready."""
        return {name: base64.b64encode(zlib.compress(np.concatenate(parts).tobytes())).decode('ascii')
                for name, parts in self._tables.items()}

    def precisions(self, states: Sequence[Dict[str, str]], classes: int) -> 'Precisions':
        """Score what the comparisons with these states have kept, in the order of their images."""
        tables = {name: np.concatenate([np.frombuffer(zlib.decompress(base64.b64decode(state[name])), parts[0].dtype)
                                        for state in states]) for name, parts in self._tables.items()}
        scores = {kind: coco_precisions(tables[f'{kind} found'], tables[f'{kind} objects'], classes)
                  for kind in self._kinds}
        counted = tables['bbox objects']
        return Precisions(np.bincount(counted['class'][counted['ignored'] == 0], minlength=classes), scores['bbox'],
                          scores.get('segm'), voc_precisions(tables['bbox found'], counted, classes))


class Precisions(NamedTuple):
    """Average precision of each class, from 0 to 1; NaN for a class that is not there."""
    objects: np.ndarray  # int64 (K,): how many count
    box: np.ndarray  # float64 (2, K): the mean over IoU of 0.5 to 0.95, and at 0.5
    mask: Any  # the same of masks; None where there are none
    voc: np.ndarray  # float64 (K,): Pascal VOC's at 0.5

    def values(self) -> Dict[str, float]:
        """Return the means over the classes that there are."""
        found = {'box_ap': self.box[0], 'box_ap50': self.box[1]}
        if self.mask is not None:
            found.update(mask_ap=self.mask[0], mask_ap50=self.mask[1])
        return {name: mean(values) for name, values in {**found, 'voc_map': self.voc}.items()}

    def table(self, names: Sequence[str], limit: int = 0) -> str:
        """Format a line a class: its objects, average precisions; of more than `limit` classes those of least."""
        columns = {'box AP': self.box[0], 'box AP50': self.box[1], **(
            {'mask AP': self.mask[0], 'mask AP50': self.mask[1]} if self.mask is not None else {})}

        def line(k: int) -> str:
            scores = ('-' if np.isnan(column[k]) else f'{column[k]:.4f}' for column in columns.values())
            return f'   {self.objects[k]:>7,}' + ''.join(f'{score:>12}' for score in scores)
        heading = '   objects' + ''.join(f'{name:>12}' for name in columns)
        return by_class(names, self.box[0], heading, line, limit)


def mean(values: np.ndarray) -> float:
    """Return the mean of the numbers among values; NaN where there are none."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float('nan')


def _bits(flags: np.ndarray) -> np.ndarray:
    """One number for each column of flags (T, n)."""
    return (flags.astype(np.uint16) << np.arange(len(flags), dtype=np.uint16)[:, None]).sum(axis=0, dtype=np.uint16)


def _flags(bits: np.ndarray, count: int) -> np.ndarray:
    """The inverse of `_bits`, for `count` thresholds: (count, n)."""
    return bits >> np.arange(count, dtype=np.uint16)[:, None] & 1


def _truth(objects: Objects, size: Size, kind: str) -> List[Dict[str, Any]]:
    """The objects of an image, but for crowds without a mask where masks are compared."""
    found = []
    for box, number, crowd, region in zip(objects.boxes.astype(float), objects.classes, objects.crowd,
                                          objects.regions):
        if kind == 'segm' and region is None:
            assert crowd
            continue
        found.append({'category_id': int(number), 'iscrowd': int(crowd), **_box(box), **(
            {'segmentation': region_lengths(region, size)} if kind == 'segm' and region is not None else {})})
    return found


def _claims(found: Found, kind: str) -> List[Dict[str, Any]]:
    return [{'category_id': int(number), 'score': float(score), **_box(box),
             **({'segmentation': found.masks[place]} if kind == 'segm' else {})}
            for place, (box, number, score) in enumerate(zip(found.boxes, found.classes, found.scores))]


def _box(box: np.ndarray) -> Dict[str, Any]:
    x, y, width, height = (float(value) for value in (*box[:2], *(box[2:] - box[:2])))
    return {'bbox': [x, y, width, height], 'area': width * height}


def _coco(annotations: Sequence[Dict[str, Any]], size: Size, classes: np.ndarray) -> Any:
    """pycocotools' set of one image."""
    found = needed()[0]()
    found.dataset = {'images': [{'id': 0, 'height': size[0], 'width': size[1]}],
                     'categories': [{'id': int(number)} for number in classes],
                     'annotations': [{'id': place + 1, 'image_id': 0, **each}  # id 0 would mean that nothing matches
                                     for place, each in enumerate(annotations)]}
    found.createIndex()
    return found


def _compared(ours: Any, theirs: Any, kind: str) -> List[Any]:
    """pycocotools' comparison for each class, in their order; None where there is nothing of it."""
    evaluation = _restricted(needed()[1](theirs, ours, kind))
    evaluation.evaluate()
    return list(evaluation.evalImgs)


def _restricted(evaluation: Any) -> Any:
    """Have pycocotools compare objects of all sizes together, and up to a hundred boxes an image alone."""
    evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ['all']
    evaluation.params.maxDets = [OBJECTS]
    return evaluation


def coco_precisions(found: np.ndarray, objects: np.ndarray, classes: int) -> np.ndarray:
    """COCO's average precision of each class: over IoU of 0.5, 0.55, … 0.95, and at 0.5; float64 (2, classes).

    Args:
        found: `FOUND` of all images, one after another.
        objects: `THERE` of all images.
    """
    evaluation = _restricted(needed()[1](iouType='bbox'))
    params = evaluation.params
    params.imgIds, params.catIds, params.maxDets = [0], list(range(classes)), [max(1, len(found))]
    evaluation.evalImgs = []
    for number in range(classes):  # all images as one: pycocotools puts them one after another itself
        own, there = found[found['class'] == number], objects[objects['class'] == number]
        evaluation.evalImgs.append({
            'dtScores': own['score'].astype(float), 'gtIgnore': there['ignored'],
            'dtMatches': _flags(own['hits'], len(params.iouThrs)),
            'dtIgnore': _flags(own['ignored'], len(params.iouThrs))} if len(own) or len(there) else None)
    evaluation._paramsEval = copy.deepcopy(params)
    evaluation.accumulate()
    precision = evaluation.eval['precision'][..., 0, 0]  # (thresholds, recalls, classes), -1 without objects
    precision = np.where(precision < 0, np.nan, precision)
    return np.stack([precision.mean(axis=(0, 1)), precision[0].mean(axis=0)])


def voc_matches(found: Found, objects: Objects) -> np.ndarray:
    """Tell, as Pascal VOC does, which boxes found are right (1), wrong (0) or do not count (-1), int8 (n,).

    Each is compared with the object of its class that it shares most with; of several about one object the best is
    right. Difficult objects are not counted, nor is a box that finds one.
    """
    right = np.zeros(len(found.boxes), np.int8)
    for number in np.unique(found.classes):
        own, there = np.flatnonzero(found.classes == number), np.flatnonzero(objects.classes == number)
        if not len(there):
            continue
        shared = overlaps(found.boxes[own], objects.boxes[there].astype(float))
        taken = np.zeros(len(there), bool)
        for place, nearest, most in zip(own, shared.argmax(axis=1), shared.max(axis=1)):
            if most < VOC:
                continue
            right[place] = -1 if objects.crowd[there[nearest]] else int(not taken[nearest])
            taken[nearest] = True
    return right


def voc_precisions(found: np.ndarray, objects: np.ndarray, classes: int) -> np.ndarray:
    """Pascal VOC's average precision of each class since 2010, float64 (classes,): the area under the curve.

    The precision at a recall is the largest at that or more. `found` and `objects` as for `coco_precisions`.
    """
    result = np.full(classes, np.nan)
    for number in range(classes):
        total = int(((objects['class'] == number) & (objects['ignored'] == 0)).sum())
        own = found[(found['class'] == number) & (found['voc'] >= 0)]
        if not total:
            continue
        right = own['voc'][np.argsort(-own['score'], kind='stable')].cumsum()
        precision = right / np.arange(1, len(right) + 1)
        largest = np.maximum.accumulate(precision[::-1])[::-1]
        result[number] = (np.diff(right, prepend=0) * largest).sum() / total
    return result
