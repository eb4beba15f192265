"""Networks, written for one device; what runs them on several is in `mxsimmim.parallel`."""
from typing import Union

from .classifier import Classifier, build_classifier
from .simmim import SimMIM, build_simmim
from .specs import ParameterSpec, joined, named_parameters, parameter_specs

Network = Union[SimMIM, Classifier]  # what the tasks train

__all__ = ['Classifier', 'Network', 'ParameterSpec', 'SimMIM', 'build_classifier', 'build_simmim', 'joined',
           'named_parameters', 'parameter_specs']
