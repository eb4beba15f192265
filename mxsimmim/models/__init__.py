"""Networks, written for one device; what runs them on several is in `mxsimmim.parallel`."""
from .classifier import Classifier, build_classifier
from .layers import named_parameters
from .simmim import SimMIM, build_simmim

__all__ = ['Classifier', 'SimMIM', 'build_classifier', 'build_simmim', 'named_parameters']
