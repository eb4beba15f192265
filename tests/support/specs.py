"""Specifications of parameters that no network has."""
from mxsimmim.models import ParameterSpec


def specs_of(parameters, decays=None, scales=None):
    """Weights by name, with their decays (0) and learning-rate scales (1)."""
    return [ParameterSpec(name, parameter, decay=(decays or {}).get(name, 0.0), lr_scale=(scales or {}).get(name, 1.0))
            for name, parameter in parameters.items()]
