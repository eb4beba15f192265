"""Optimisers, parameter groups and schedules."""
from .groups import NO_DECAY, parameter_groups, weight_decays
from .optimizers import OPTIMIZERS, SGD, AdamW, Optimizer, adamw_arguments
from .schedules import REFERENCE_BATCH, learning_rates

__all__ = ['NO_DECAY', 'OPTIMIZERS', 'REFERENCE_BATCH', 'AdamW', 'Optimizer', 'SGD', 'adamw_arguments',
           'learning_rates', 'parameter_groups', 'weight_decays']
