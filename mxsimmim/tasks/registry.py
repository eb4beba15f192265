"""The tasks, by the name that the configuration gives them."""
from typing import Dict, Type

from .classify import Classification
from .detect import Detection
from .pretrain import Pretraining
from .segment import Segmentation
from .task import Task

TASKS: Dict[str, Type[Task]] = {'pretrain': Pretraining, 'classify': Classification,
                               'segment': Segmentation, 'detect': Detection}
