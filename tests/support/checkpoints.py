"""Checkpoints of which one look tells whether they are whole; also for the programs that tests kill."""
import numpy as np


def arrays_of(value, size=1000):
    """Two groups in which every number is `value`, so that a mixture of two checkpoints shows."""
    return {'weights': {'encoder.w': np.full((10, size // 10), value, 'float32'), 'step': np.array(value, 'int64')},
            'optimizer': {'mean/encoder.w': np.full(size, value, 'float32')}}
