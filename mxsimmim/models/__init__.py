"""Networks, written for one device; what runs them on several is in `mxsimmim.parallel`."""
from .layers import named_parameters
from .simmim import SimMIM, build_simmim

__all__ = ['SimMIM', 'build_simmim', 'named_parameters']
