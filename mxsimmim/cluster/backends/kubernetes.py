"""Run a job as the pods of an Indexed Job of Kubernetes: pod 0 launches, and the agents of all pods call it.

The command is the same in all pods. Where it finds no place in its environment, it makes the Job.
"""
import argparse
import os
import platform
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from types import MappingProxyType
from typing import List, Optional, Sequence

from mxsimmim.cluster.backends import manifests
from mxsimmim.cluster.backends.base import Backend
from mxsimmim.cluster.callback import AGENT, VARIABLE, Callbacks
from mxsimmim.cluster.connections import AgentConnection, Command
from mxsimmim.cluster.hostfile import Host
from mxsimmim.cluster.spec import JobSpec

PLACE = 'JOB_COMPLETION_INDEX'
AGAIN, GONE = 2.0, 10.0  # seconds until an agent calls again, and without an answer until its launcher has ended
ALONE = 60.0  # seconds after which a pod that is told to end was told alone; else the launcher ends its processes


class KubernetesBackend(Backend):
    """Take the agents that call, one a pod and a worker."""
    patience = 1800.0  # pods wait for machines, and machines for the image
    grace = 90.0  # of the 120 s that a pod has
    needs_image = True
    other_python = 'put into the image'
    refuses = MappingProxyType({
        'hostfile': '--launcher kubernetes leaves the choice of hosts to the cluster: leave out -H',
        'min_workers': '--min-workers leaves out hosts that do not answer, and a Job needs all its pods: leave it out, '
                       'and make the Job again when it has failed',
        'sync_dst_dir': '--sync-dst-dir copies to hosts, and pods see their image and their volumes alone: leave it '
                        'out'})

    def __init__(self) -> None:
        self.listener: Optional[socket.socket] = None  # open until the launcher ends, from which agents know that

    def hosts(self, spec: JobSpec) -> Sequence[Host]:
        address, *_ = os.environ[VARIABLE].split()
        name = address.partition('.')[2]
        return [Host(f'{name}-{place}') for place in range(spec.workers)]

    def start_agents(self, spec: JobSpec, agents: Sequence[AgentConnection]) -> None:
        _, port, key = os.environ[VARIABLE].split()
        self.listener = self.listener or listen(int(port), len(agents))
        callbacks = Callbacks(self.listener.dup(), PLACE, {str(place): agent for place, agent in enumerate(agents)},
                              bytes.fromhex(key))
        # Its own name stands for its address from the beginning, that in the Service later.
        command = Command(AGENT, {**os.environ, VARIABLE: f'{platform.node()} {port} {key}'})
        command.silent.add_done_callback(lambda _: callbacks.close())
        agents[0].command = command

    def instead(self, options: argparse.Namespace) -> Optional[int]:
        place = os.environ.get(PLACE)
        if place is None:
            return submit(options)
        if not re.fullmatch(r'\S+\.\S+ \d+ [0-9a-f]{64}', os.environ.get(VARIABLE, '')):
            raise ValueError(f'this is a pod of an Indexed Job ({PLACE}={place}) without {VARIABLE}, a name, a port '
                             'and a key of 64 digits: make its Secret, as the first lines of the ready files in '
                             'launch/kubernetes say')
        return None if place == '0' else follow()


def submit(options: argparse.Namespace) -> int:
    """Print the manifests of a job, or have kubectl apply them; return the exit status.

    Raises:
        ValueError: a name that Kubernetes does not take, or no kubectl.
    """
    if not re.fullmatch('[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?', options.namespace or 'default'):
        raise ValueError(f"--namespace '{options.namespace}' is none: write small letters, digits and -")
    name = f'mxsimmim-{secrets.token_hex(3)}'
    text = manifests.text(manifests_of(options, name, secrets.token_hex(32)), options.namespace or 'default')
    if options.dry_run:
        sys.stdout.write(text)
        return 0
    try:
        status = subprocess.run(['kubectl', 'apply', '-f', '-'], input=text.encode()).returncode
    except OSError as error:
        raise ValueError(f"'kubectl' cannot be started ({error.strerror}): install it, or apply what --dry-run prints"
                         ) from None
    if not status:
        where = f'-n {options.namespace or "default"}'
        print(f'launch: worker 0: kubectl {where} logs -f job/{name}; to end it and clear up: kubectl {where} delete '
              f'job,service,secret {name}', file=sys.stderr)
    return status


def listen(port: int, count: int) -> socket.socket:
    """Open the port where so many agents call."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(('', port))
    listener.listen(count)
    return listener


def manifests_of(options: argparse.Namespace, name: str, key: str) -> List[manifests.Manifest]:
    """Write what Kubernetes is to make of parsed options: Secret, Service and Job of this name."""
    given = {**options.given['server'], **options.given['worker']}
    passed = [*options.env, *options.env_worker, *options.env_server]  # those with a value are in the command
    words = [word for word in options.words if word != '--dry-run']
    return [manifests.secret(name, key, {word: given[word] for word in passed if word in given}),
            manifests.service(name),
            manifests.job(name, options.image, [*words, '--', *options.command], options.num_workers,
                          options.devices == 'gpu')]


def follow() -> int:
    """Be another pod than the first: call its launcher until there is one, and again, as long as it lives.

    Returns:
        0 when the launcher has ended, which says itself how; 143 when this pod is told to end.
    """
    told: List[float] = []  # when
    signal.signal(signal.SIGTERM, lambda *_: told.append(time.monotonic()))  # pods do not end by it otherwise
    heard: Optional[float] = None
    while not told:
        agent = subprocess.Popen(AGENT)
        while agent.poll() is None:
            if told and time.monotonic() - told[0] > ALONE:
                agent.terminate()
            time.sleep(0.1)
        if agent.returncode != 1:  # else it did not reach the launcher; one that was killed may have
            heard = time.monotonic()
        elif heard is not None and time.monotonic() - heard > GONE:
            return 0
        if not told:
            time.sleep(AGAIN)
    return 128 + signal.SIGTERM
