"""Networks, written for one device; what runs them on several is in `mxsimmim.parallel`."""
from typing import Union

from .classifier import Classifier, build_classifier
from .layers import named_parameters
from .simmim import SimMIM, build_simmim

Network = Union[SimMIM, Classifier]  # what the tasks train

__all__ = ['Classifier', 'Network', 'SimMIM', 'build_classifier', 'build_simmim', 'named_parameters']
