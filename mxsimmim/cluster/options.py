"""Read the launcher's command line into a job. What follows the options is the command, whose words are its own."""
import argparse
import difflib
import os
import re
from types import MappingProxyType
from typing import Dict, List, Mapping, NoReturn, Sequence, Tuple

from mxsimmim.cluster.backends import BACKENDS
from mxsimmim.cluster.hostfile import read_hostfile
from mxsimmim.cluster.spec import JobSpec
from mxsimmim.system import paths

HELP = """\
Starts a training command as many processes, here or on many hosts, and ends them together.

  tools/launch.py [options] [--] COMMAND [ARGUMENT ...]

Everything after the first word that is not an option, or after --, is the command, word for word. Each process gets it
with its role in the environment, and writes logs/ROLE-INDEX.log; worker 0 is shown here as well."""
EXAMPLES = """\
examples:
  on this machine, 2 workers and 1 parameter server:
    tools/launch.py -n 2 -s 1 -- mxsimmim pretrain conf/digits.yaml
  on the hosts of a file (host[:port] [slots=N] a line), over ssh:
    tools/launch.py -n 4 -s 2 -H hosts -- mxsimmim pretrain conf/vit_base.yaml data.path=/images
  the same as 4 ranks of Horovod:
    tools/launch.py -n 4 -H hosts --horovod -- mxsimmim pretrain conf/vit_base.yaml data.path=/images
  the same in an allocation of Slurm, 3 hosts with 2 tasks each:
    salloc -N 3 --ntasks-per-node=2 tools/launch.py --launcher slurm -n 6 --horovod -- mxsimmim pretrain …

exit status: 0 if all workers ended well, 2 if nothing was started, else that of the process that failed first
(128 + N if signal N killed it, or stopped the launcher)."""
OPTIONS: Tuple = (
    (('-h', '--help'), dict(action='help', help='show this and end')),
    (('-n', '--num-workers'), dict(type=int, metavar='N', help='workers, or ranks with --horovod')),
    (('-s', '--num-servers'), dict(type=int, metavar='N', help='parameter servers (default: as many as workers)')),
    (('-H', '--hostfile'), dict(metavar='FILE', help='hosts, one a line: host[:port] [slots=N]; default: this one')),
    (('--launcher',), dict(choices=tuple(BACKENDS), help='default: ssh with a hostfile, else local; slurm '
                            'inside an allocation; kubernetes with --image; ray on one of its '
                            'nodes')),
    (('--address',), dict(metavar='A', help='of Ray: HOST:PORT, or auto, the one on this machine (default)')),
    (('--horovod',), dict(action='store_true', help='start Horovod ranks instead of parameter servers')),
    (('--devices',), dict(choices=('cpu', 'gpu'), default='cpu', help="divide each host's cores (cpu, the default) or "
                          'GPUs as well (gpu) among its workers')),
    (('--interface',), dict(default='', metavar='NAME', help='network interface the job uses on every host; default: '
                            'the one that ssh came in by, lo for a job on this machine')),
    (('--sync-dst-dir',), dict(metavar='DIR', help='first copy the working directory to DIR on every host (rsync)')),
    (('--env',), dict(action='append', default=[], metavar='NAME[=VALUE]', help='variable for all processes; without '
                      'a value, the one it has here')),
    (('--env-server',), dict(action='append', default=[], metavar='NAME[=VALUE]', help='for servers and scheduler')),
    (('--env-worker',), dict(action='append', default=[], metavar='NAME[=VALUE]', help='for workers')),
    (('--max-restarts',), dict(type=int, metavar='N', help='start a job that fails again, from its newest checkpoint, '
                               'up to N times without a newer one in between (default: 0; 3 with --min-workers)')),
    (('--min-workers',), dict(type=int, metavar='M', help='over ssh: go on without hosts that are away, as long as '
                              'there is place for M workers, and with them again once they are back')),
    (('--image',), dict(metavar='IMAGE', help='of the pods, for --launcher kubernetes')),
    (('--namespace',), dict(metavar='N', help='of Kubernetes (default: default)')),
    (('--dry-run',), dict(action='store_true', help='print what Kubernetes is to make, and make nothing')),
    (('--p3',), dict(action='store_true', help='parameter servers: send what is needed first, first (P3)')),
)
RESTARTS = 3  # without progress, that --min-workers allows by default


# What mpirun, torchrun, horovodrun and MXNet's own launcher call it.
FOREIGN = {
    **dict.fromkeys(('-np', '--np', '-c', '--num-proc', '--n', '--ntasks', '--world-size'), 'write -n N, the workers'),
    **dict.fromkeys(('--nproc_per_node', '--nproc-per-node', '--nproc', '--ppn', '-ppn', '--npernode', '-npernode',
                     '--slots-per-host', '--num-gpus', '--num_gpus', '--nnodes', '--nodes', '-N', '--map-by'),
                    'write -n N, the workers on all hosts together, and slots=N after a host in the file'),
    **dict.fromkeys(('-hostfile', '--machinefile', '-machinefile', '-f', '--host-file', '--hosts-file', '--host_file'),
                    'write -H FILE'),
    **dict.fromkeys(('--hosts', '--host', '-host'), 'write the hosts into a file, host slots=N a line, and -H FILE'),
    **dict.fromkeys(('-x', '-genv', '--export', '-genvlist'), 'write --env NAME, or --env NAME=VALUE'),
    **dict.fromkeys(('--master_addr', '--master-addr', '--master_port', '--master-port', '--rdzv_endpoint',
                     '--rdzv-endpoint', '--rdzv_backend', '--rdzv-backend', '--node_rank', '--node-rank',
                     '--standalone'),
                    'leave it out: one launcher starts all hosts, and finds where they meet'),
    **dict.fromkeys(('--oversubscribe', '--allow-run-as-root', '--bind-to', '-bind-to', '-map-by', '--mca', '-mca'),
                    "leave it out, or give it to mpirun: --launcher mpi takes its own options from the environment "
                    '(OMPI_MCA_…)'),
    **dict.fromkeys(('--max_restarts', '--restarts', '--reset-limit'), 'write --max-restarts N'),
    **dict.fromkeys(('--min-np', '--min_np', '--min-num-proc', '--min-nodes', '--min-nnodes'), 'write --min-workers M'),
    **dict.fromkeys(('--max-np', '--max_np', '--max-num-proc'), 'write -n N: no more workers than these are started'),
    **dict.fromkeys(('--host-discovery-script', '--blacklist-cooldown-range', '--elastic-timeout'),
                    'write all hosts into the hostfile; with --min-workers M those that are away are left out'),
    **dict.fromkeys(('--cluster',), 'write --launcher local, ssh, mpi, slurm, kubernetes or ray'),
    **dict.fromkeys(('--gloo', '--mpi'), 'write --horovod; what its ranks speak is chosen by what is there'),
    **dict.fromkeys(('--network-interface', '--network-interfaces', '--nics', '--nic'), 'write --interface NAME'),
    **dict.fromkeys(('--output-filename', '--log-dir', '--log_dir', '--redirects', '--tee'),
                    'leave it out: every process writes logs/ROLE-INDEX.log'),
    **dict.fromkeys(('-p', '--ssh-port'), 'write the port into the hostfile, as host:port'),
}


class Parser(argparse.ArgumentParser):
    """Errors are the launcher's own, without half a page of usage."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the options, with `command` (a list of words) and `given` (variables by role); fill in defaults.

    Raises:
        ValueError: an option or a value that cannot be used, for the user.
    """
    parser = Parser('tools/launch.py', usage=argparse.SUPPRESS, description=HELP, epilog=EXAMPLES, add_help=False,
                    allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    for names, details in OPTIONS:
        parser.add_argument(*names, **details)
    words, command = split(argv)
    options = parser.parse_args(words)
    options.hostfile = options.hostfile and paths.home(options.hostfile)  # -H=~/hosts: no shell replaces this ~
    options.command, options.words = command, words
    check(options)
    options.given = {'worker': variables(options.env + options.env_worker, os.environ),
                     'server': variables(options.env + options.env_server, os.environ)}
    return options


def job_spec(options: argparse.Namespace) -> JobSpec:
    """Make the job of parsed options, reading its hostfile.

    Raises:
        ValueError: the hostfile cannot be read, or has a bad line.
    """
    hosts = read_hostfile(contents(options.hostfile), options.hostfile) if options.hostfile else ()
    given = options.given
    if options.launcher == 'local' and 'OMP_NUM_THREADS' in os.environ:
        given = {role: {'OMP_NUM_THREADS': os.environ['OMP_NUM_THREADS'], **given[role]} for role in given}
    directory = options.sync_dst_dir or os.getcwd()
    if directory.startswith('~/'):
        at_home = BACKENDS[options.launcher].copies_by_ssh  # where ssh begins
        directory = (directory[2:] or '.') if at_home else os.path.expanduser(directory)
    return JobSpec(
        command=tuple(options.command), workers=options.num_workers, servers=options.num_servers, hosts=tuple(hosts),
        directory=directory, copy=bool(options.sync_dst_dir),
        horovod=options.horovod, gpus=options.devices == 'gpu', interface=options.interface, p3=options.p3,
        address=options.address or 'auto' * BACKENDS[options.launcher].takes_address,
        max_restarts=options.max_restarts, min_workers=options.min_workers or 0,
        worker_variables=MappingProxyType(given['worker']), server_variables=MappingProxyType(given['server']))


def split(argv: Sequence[str]) -> Tuple[List[str], List[str]]:
    """Split the words into the launcher's and the command's.

    Raises:
        ValueError: an option that the launcher does not have.
    """
    takes = {name: 'action' not in details or details['action'] == 'append'
             for names, details in OPTIONS for name in names}
    place = 0
    while place < len(argv):
        word = argv[place]
        if word == '--':
            return list(argv[:place]), list(argv[place + 1:])
        if not word.startswith('-') or word == '-':
            break
        name = word.partition('=')[0] if word.startswith('--') else word[:2]
        stem = word.partition('=')[0].rstrip('0123456789')
        if stem in FOREIGN:
            raise ValueError(f"no option '{stem}': {FOREIGN[stem]}")
        if name not in takes or ('=' in word and word.startswith('--') and not takes[name]):
            near = difflib.get_close_matches(name, takes, 1)
            raise ValueError(f"no option '{word}'" + (f' (did you mean {near[0]}?)' if near and near[0] != name else '')
                             + ": the command's own options come after it, as in: tools/launch.py -n 2 -- COMMAND "
                             + word)
        place += 2 if takes[name] and word == name else 1
    return list(argv[:place]), list(argv[place:])


def check(options: argparse.Namespace) -> None:
    """Fill in what depends on other options, and refuse what does not go together."""
    def need(condition: object, text: str) -> None:
        if not condition:
            raise ValueError(text)

    need(options.num_workers is not None, 'how many workers? Give -n N (-h shows help)')
    need(options.num_workers > 0, f'-n {options.num_workers}: at least 1 worker is needed')
    least = options.min_workers
    if options.max_restarts is None:
        options.max_restarts = RESTARTS if least else 0
    need(options.max_restarts >= 0, f'--max-restarts {options.max_restarts} cannot be: write how often a job '
         'that fails without progress is started again')
    need(options.command, 'no command: write it after the options, as in: tools/launch.py -n 2 -- mxsimmim pretrain …')
    options.launcher = options.launcher or ('ssh' if options.hostfile else 'local')
    need(least is None or 0 < least <= options.num_workers, f'--min-workers {least} cannot be: write a number from 1 '
         f'to the {options.num_workers} workers of -n')
    backend = BACKENDS[options.launcher]
    need(options.hostfile or not backend.needs_hostfile, f'--launcher {options.launcher} needs the hosts: give -H FILE')
    need(options.image or not backend.needs_image, f'--launcher {options.launcher} needs the image of its pods: give '
         '--image IMAGE')
    for name in ('image', 'namespace', 'dry_run'):
        need(not getattr(options, name) or backend.needs_image, f'--{name.replace("_", "-")} is for --launcher '
             'kubernetes: leave it out, or choose that')
    need(options.address is None or backend.takes_address, '--address is for --launcher ray: leave it out, or choose '
         'that')
    for name, why in backend.refuses.items():
        need(not getattr(options, name), why)
    need(not options.sync_dst_dir or options.hostfile or not backend.copies_by_ssh,
         '--sync-dst-dir copies to other hosts: it needs -H')
    if options.horovod:
        need(not options.num_servers, f'--horovod has no parameter servers: leave out -s {options.num_servers}')
        need(not options.p3, '--p3 is a way to speak to parameter servers: leave it out with --horovod')
        options.num_servers = 0
    elif options.num_servers is None:
        options.num_servers = options.num_workers
    need(options.horovod or options.num_servers > 0, f'-s {options.num_servers}: at least 1 parameter server is '
         'needed; --horovod works without')


def variables(words: Sequence[str], environ: Mapping[str, str]) -> Dict[str, str]:
    """Read variables from NAME (as it is here), NAME=VALUE, or NAME:VALUE as MXNet's launcher wrote it.

    Raises:
        ValueError: not of this form, or NAME is not set here.
    """
    result = {}
    for word in words:
        found = re.fullmatch(r'([A-Za-z_]\w*)(?:[=:](.*))?', word, re.DOTALL)
        if not found:
            raise ValueError(f"'{word}' is not a variable: write NAME to pass on its value here, or NAME=VALUE")
        name, value = found.groups()
        if value is None and name not in environ:
            raise ValueError(f"variable '{name}' is not set here: set it, or write {name}=VALUE")
        result[name] = environ[name] if value is None else value
    return result


def contents(hostfile: str) -> str:
    """Read the text of a hostfile.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        return paths.contents(hostfile).decode('utf-8-sig')
    except (OSError, ValueError) as error:
        hint = ''
        if re.search('[,:]', hostfile) and not os.path.exists(hostfile):  # horovodrun -H a:2,b:2
            lines = (part.replace(':', ' slots=') for part in hostfile.split(','))
            hint = f": write the hosts into a file, one a line, as in '{next(lines)}', and give its name"
        raise ValueError(f"hostfile '{hostfile}' cannot be read ({getattr(error, 'strerror', 'not a text')}){hint}"
                         ) from None
