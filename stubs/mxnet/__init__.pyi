"""Types of what mxsimmim uses of MXNet 1.9.1, which has none of its own. Add what is needed."""
from . import autograd as autograd, base as base, context as context, contrib as contrib, gluon as gluon
from . import initializer as init, io as io, kvstore as kv, ndarray as nd, ndarray as ndarray, profiler as profiler
from . import runtime as runtime, symbol as sym, symbol as symbol
from .base import MXNetError as MXNetError
from .context import Context as Context, cpu as cpu, gpu as gpu

__version__: str

__all__ = ['Context', 'MXNetError', 'autograd', 'base', 'context', 'contrib', 'cpu', 'gluon', 'gpu', 'init', 'io', 'kv',
           'nd', 'ndarray', 'profiler', 'runtime', 'sym', 'symbol']
