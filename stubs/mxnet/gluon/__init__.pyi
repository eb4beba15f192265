from . import nn as nn
from .block import Block as Block, HybridBlock as HybridBlock, SymbolBlock as SymbolBlock
from .parameter import Constant as Constant, Parameter as Parameter, ParameterDict as ParameterDict
