"""What keeps a job from starting: each host by itself, and compared with the others. Pure functions."""
import argparse
import os
from typing import Any, Dict, List, Sequence

from mxsimmim.cluster.job import Site

CLOCKS = 30.0  # seconds that a host's clock may differ from the launcher's


def needed(options: argparse.Namespace) -> List[str]:
    """Packages that every host must have."""
    own = any(word == 'mxsimmim' or os.path.basename(word) == 'mxsimmim' for word in options.command[:4])
    return ['mxnet'] + ['mxsimmim'] * own + ['horovod'] * options.horovod


def problems(sites: Sequence[Site], facts: Sequence[Dict[str, Any]], options: argparse.Namespace) -> List[str]:
    """One line a problem, each with the name of its host and the way out; empty if the job can start.

    Args:
        facts: what `inspection.collect_facts` found on each host, and `offset`, the seconds that its clock is ahead of ours.
    """
    lines = []
    for site, fact in zip(sites, facts):
        found = list(fact['problems'])
        for package in needed(options):
            if not fact['packages'][package]:
                other = ('start this launcher with' if options.launcher == 'local' else
                         'put first into --env PATH=... the folder of')
                found.append(f"no {package} in {fact['executable']}: install it there, or {other} a Python that has it")
        if abs(fact['offset']) > CLOCKS:
            found.append(f"its clock is {abs(fact['offset']):.0f} s {'ahead' if fact['offset'] > 0 else 'behind'}, "
                         f'more than {CLOCKS:.0f} s: set it (timedatectl set-ntp true)')
        if len(sites) > 1 and site.address.startswith('127.'):
            found.append(f'other hosts cannot reach it at {site.address}: write its name or address in the network '
                         'into the hostfile, or choose with --interface')
        if options.horovod and len(sites) > 1 and not fact['mpi'] and fact['named'] != site.address:
            # Its process sets, the global one too, forget HOROVOD_GLOO_IFACE (gloo_context.cc of 0.28.1).
            found.append(f"its own name, {fact['host']}, stands for {fact['named'] or 'no address'} there, and Horovod "
                         f"would use that: write '{site.address} {fact['host']}' into its /etc/hosts")
        lines += [f'host {site.name}: {problem}' for problem in found]
    lines += unequal('Python', [site.name for site in sites], [fact['python'] for fact in facts])
    for package in ('mxnet', 'mxsimmim', 'horovod'):
        have = [(site.name, fact['packages'][package]) for site, fact in zip(sites, facts)]
        if package in needed(options) or package == 'mxsimmim':
            have = [(name, version) for name, version in have if version]
            lines += unequal(package, [name for name, _ in have], [version for _, version in have])
    return lines


def unequal(what: str, names: Sequence[str], versions: Sequence[str]) -> List[str]:
    """A line for each host whose version is not the one that most hosts have (of two, the first host's)."""
    if not versions:
        return []
    usual = max(versions, key=list(versions).count)
    other = names[list(versions).index(usual)]
    return [f'host {name}: {what} {version}, but {other} has {usual}: install the same on all hosts'
            for name, version in zip(names, versions) if version != usual]
