import ctypes

_LIB: ctypes.CDLL  # libmxnet.so: its functions return 0, or what check_call turns into an MXNetError
mx_uint = ctypes.c_uint
NDArrayHandle = ctypes.c_void_p
OpHandle = ctypes.c_void_p

class MXNetError(RuntimeError): ...

def check_call(ret: int) -> None: ...
def c_str(string: str) -> ctypes.c_char_p: ...
