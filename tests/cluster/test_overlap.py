"""Gradients travel while others are computed."""
import json
import sys
from pathlib import Path

import pytest
from support.hosts import three_hosts

PROGRAM = Path(__file__).parent / 'programs' / 'overlap.py'
BLOCKS = 5

pytestmark = pytest.mark.alone


def measured(out):
    return json.loads([line for line in out.splitlines() if line.startswith('{')][-1])


def test_each_half_block_sends_its_gradients_when_it_has_them(launcher):
    """What Horovod was asked for, and when, in the last step: not all at once, nor in MXNet's bulks of operators."""
    out, _ = launcher.run('-n', 2, '--horovod', '--env', 'HOROVOD_TIMELINE=timeline.json', '--env',
                          'MXSIMMIM_FIRST_RANKS=', '--', sys.executable, PROGRAM, 'horovod', seconds=120)
    text = (launcher.folder / 'timeline.json').read_text().strip().rstrip(',')
    events = json.loads(text if text.endswith(']') else text + ']')
    names = {event['pid']: event['args'].get('name') for event in events if event.get('name') == 'process_name'}
    asked = {names[event['pid']]: event['ts'] / 1e6 for event in events
             if event['ph'] == 'B' and event['name'].startswith('NEGOTIATE')}
    times = sorted(asked[f'horovod_allreduce.{key}'] for key in measured(out)['keys'])
    apart = 1 + sum(after - before > 0.003 for before, after in zip(times, times[1:]))
    assert apart >= 1.5 * BLOCKS, times


@pytest.mark.parametrize('words, store', [(['--horovod'], 'horovod'), (['-s', '2'], 'dist_sync')])
def test_a_slow_network_is_used_during_the_backward_pass(launcher, tmp_path, words, store):
    """Gradients that travel for 0.8 of the time of a step: what the backward pass leaves room for is hidden in it.

    Other programs on this machine's cores can only make it less: the best of three jobs counts.
    """
    hidden = []
    with three_hosts(tmp_path / 'hosts') as hosts:
        hosts.limit('600mbit')
        (tmp_path / 'hostfile').write_text('host0\nhost1\n')
        while len(hidden) < 3 and max(hidden, default=0) <= 0.35:
            out, _ = launcher.run('-n', 2, '-H', 'hostfile', *words, '--', sys.executable, PROGRAM, store, seconds=120,
                                  env=hosts.environ)
            seconds = measured(out)
            hidden.append(1 - (seconds['step'] - seconds['alone']) / seconds['exchange'])
            print(f'{hidden[-1]:.0%} hidden, {seconds}')  # 0.62 to 0.64; with MXNet's bulks of 15 operators 0.45 to 0.5
    assert max(hidden) > 0.35
