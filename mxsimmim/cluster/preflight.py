"""Say what keeps a job from starting: each host by itself, and compared with the others. Pure functions."""
import os
from typing import Any, Dict, List, Sequence, Tuple

from mxsimmim.cluster.environment import check_environment
from mxsimmim.cluster.spec import HostInfo, JobSpec
from mxsimmim.system.paths import BUILT_IN

CLOCKS = 30.0  # seconds that a host's clock may differ from the launcher's


def needs(spec: JobSpec, address: str, checks: bool) -> Dict[str, Any]:
    """Say what an agent is to look for on its host, as the `needs` of `inspection.collect_facts`.

    Args:
        address: where others reach the host, if that is known.
        checks: whether this host checks the job's configuration.
    """
    return dict(command=spec.command[0], paths=data_paths(spec.command), interface=spec.interface, near=address,
                gpus=spec.gpus, horovod=spec.horovod,
                trial=(check_command(spec.command) if checks else [], check_environment(spec)))


def check_command(command: Sequence[str]) -> List[str]:
    """Build the command that checks a training command's configuration alone; empty where it is none of ours."""
    words = list(command)
    if os.path.basename(words[0]) == 'mxsimmim':
        words = words[1:]
    elif os.path.basename(words[0]).startswith('python') and 'mxsimmim' in words and words[:6].count('-m'):
        place = words.index('mxsimmim')
        words = words[place + 1:] if words[place - 1] == '-m' else []
    else:
        return []
    return list(command) + ['--check-config'] if words[:1] in (['pretrain'], ['finetune']) else []


def data_paths(command: Sequence[str]) -> List[str]:
    """List the data that a command will read on every host, by its words data.path=… and data.val_path=…."""
    found = [word.partition('=')[2] for word in command if word.startswith(('data.path=', 'data.val_path='))]
    return [path for path in found if path and not BUILT_IN.fullmatch(path)]


def packages(spec: JobSpec) -> List[str]:
    """List the packages that every host must have."""
    own = any(word == 'mxsimmim' or os.path.basename(word) == 'mxsimmim' for word in spec.command[:4])
    return ['mxnet'] + ['mxsimmim'] * own + ['horovod'] * spec.horovod


def problems(spec: JobSpec, infos: Sequence[HostInfo], facts: Sequence[Dict[str, Any]], other_python: str
             ) -> List[Tuple[int, str]]:
    """List what is wrong; empty if the job can start.

    Args:
        facts: from `inspection.collect_facts` on each host, and `offset`, the seconds that its clock is ahead of ours.
        other_python: how the user says that agents run with another Python.

    Returns:
        for each problem the number of its host in `infos`, and a line with the host's name and the way out.
    """
    lines: List[Tuple[int, str]] = []
    for number, (info, fact) in enumerate(zip(infos, facts)):
        found = list(fact['problems'])
        for package in packages(spec):
            if not fact['packages'][package]:
                found.append(f"no {package} in {fact['executable']}: install it there, or {other_python} a Python that "
                             'has it')
        if abs(fact['offset']) > CLOCKS:
            found.append(f"its clock is {abs(fact['offset']):.0f} s {'ahead' if fact['offset'] > 0 else 'behind'}, "
                         f'more than {CLOCKS:.0f} s: set it (timedatectl set-ntp true)')
        if len(infos) > 1 and info.address.startswith('127.'):
            found.append(f'other hosts cannot reach it at {info.address}: write its name or address in the network '
                         'into the hostfile, or choose with --interface')
        if spec.horovod and len(infos) > 1 and not fact['mpi'] and fact['named'] != info.address:
            # Its process sets, the global one too, forget HOROVOD_GLOO_IFACE (gloo_context.cc of 0.28.1).
            found.append(f"its own name, {fact['host']}, stands for {fact['named'] or 'no address'} there, and Horovod "
                         f"would use that: write '{info.address} {fact['host']}' into its /etc/hosts")
        lines += [(number, f'host {info.name}: {problem}') for problem in found]
    lines += unequal('Python', infos, [fact['python'] for fact in facts])
    for package in ('mxnet', 'mxsimmim', 'horovod'):
        if package in packages(spec) or package == 'mxsimmim':
            lines += unequal(package, infos, [fact['packages'][package] or '' for fact in facts])
    return lines


def unequal(what: str, infos: Sequence[HostInfo], versions: Sequence[str]) -> List[Tuple[int, str]]:
    """List, as `problems` does, the hosts whose version is not the one that most have (of two, the first host's).

    Hosts without a version do not count.
    """
    have = [version for version in versions if version]
    if not have:
        return []
    usual = max(have, key=have.count)
    other = infos[list(versions).index(usual)].name
    return [(number, f'host {info.name}: {what} {version}, but {other} has {usual}: install the same on all hosts')
            for number, (info, version) in enumerate(zip(infos, versions)) if version not in ('', usual)]
