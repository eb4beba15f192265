"""Networks, written for one device; what runs them on several is in `mxsimmim.parallel`."""
from typing import Union

from .classifier import Classifier, build_classifier
from .detector import Detector, build_detector
from .segmenter import Segmenter, build_segmenter
from .simmim import SimMIM, build_simmim
from .specs import ParameterSpec, joined, named_parameters, parameter_specs

Network = Union[SimMIM, Classifier, Segmenter, Detector]  # what the tasks train
Cut = Union[SimMIM, Classifier]  # those that show their segments, to be computed in parts

__all__ = ['Classifier', 'Cut', 'Detector', 'Network', 'ParameterSpec', 'Segmenter', 'SimMIM', 'build_classifier',
           'build_detector', 'build_segmenter', 'build_simmim', 'joined', 'named_parameters', 'parameter_specs']
