from typing import Any, Dict, Mapping, Tuple

from ..ndarray import NDArray
from ..symbol import Symbol

def quantize_model(sym: Symbol, arg_params: Mapping[str, NDArray], aux_params: Mapping[str, NDArray], **options: Any
                   ) -> Tuple[Symbol, Dict[str, NDArray], Dict[str, NDArray]]: ...
