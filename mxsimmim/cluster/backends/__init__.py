"""List the kinds of clusters that the launcher knows: one file each."""
from typing import Dict

from mxsimmim.cluster.backends.base import Backend
from mxsimmim.cluster.backends.kubernetes import KubernetesBackend
from mxsimmim.cluster.backends.local import LocalBackend
from mxsimmim.cluster.backends.mpi import MpiBackend
from mxsimmim.cluster.backends.ray import RayBackend
from mxsimmim.cluster.backends.slurm import SlurmBackend
from mxsimmim.cluster.backends.ssh import SshBackend

BACKENDS: Dict[str, Backend] = {'local': LocalBackend(), 'ssh': SshBackend(), 'mpi': MpiBackend(),
                                'slurm': SlurmBackend(), 'kubernetes': KubernetesBackend(),
                                'ray': RayBackend()}  # by --launcher
