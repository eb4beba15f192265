from . import Operator

BilinearResize2D: Operator
adamw_update: Operator
isfinite: Operator
