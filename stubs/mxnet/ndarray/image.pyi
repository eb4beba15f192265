from . import Operator

normalize: Operator
to_tensor: Operator
