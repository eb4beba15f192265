"""What a network says of all views of each image of a batch, see `data.views`."""
from typing import List

import numpy as np

from ..data.loader import Batch
from ..data.views import Answer, as_view
from ..parallel.placement import Placement


def answers_of(placement: Placement, batch: Batch) -> List[List[Answer]]:
    """Return the answers about each image of a batch of `ViewsTransform`."""
    views = batch.fields['views']
    there = views.any(axis=2)                                                               # (B, V)
    images = batch.fields['image'][there]                                                   # (all views, H, W, 3)
    found = iter(placement.outputs(batch._replace(fields={'image': images}, index=np.arange(len(images)))))
    return [[(as_view(numbers), next(found)) for numbers in rows[used]] for rows, used in zip(views, there)]
