"""Operators of the models, each in two forms; see `backend`."""
from .backend import FORMS, REFERENCE, OpBackend, select_backend
from .layout import Windows, shift_mask

__all__ = ['FORMS', 'REFERENCE', 'OpBackend', 'Windows', 'choose', 'select_backend', 'shift_mask']

choose = select_backend  # the earlier name
