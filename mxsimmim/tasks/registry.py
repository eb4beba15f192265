"""The tasks, by the name that the configuration gives them."""
from typing import Dict, Type

from .classify import Classification
from .pretrain import Pretraining
from .task import Task

TASKS: Dict[str, Type[Task]] = {'pretrain': Pretraining, 'classify': Classification}
