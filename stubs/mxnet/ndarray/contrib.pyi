from . import Operator

adamw_update: Operator
isfinite: Operator
