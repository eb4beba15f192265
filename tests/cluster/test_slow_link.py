"""Training through a slow network: what compression gains. Run as a program, it prints the table of the benchmarks."""
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest
from support.hosts import Hosts, three_hosts, wait_for
from support.running import BASE, ROOT, command
from support.tiny import TINY

LAUNCH = [sys.executable, str(ROOT / 'tools' / 'launch.py')]
PRETRAIN = command('pretrain', BASE)
RATE = '200mbit'  # of each host's link, in either direction
FIRST, LAST = 3, 9  # steps between which time and traffic are measured
PARAMETERS = 4_766_208
DEADLINE = 120  # seconds for one job
TURNS = 3  # that the table takes the medians of
# 4.8 million parameters and a batch that takes a fraction of the time that their gradients take.
MODEL = [*TINY, 'name=slow', 'model.embed_dim=256', 'model.depth=6', 'model.num_heads=4', 'model.drop_path=0',
         'data.val_fraction=0', 'train.batch_size=4', f'train.length={LAST + 3}', 'optim.warmup=1',
         'optim.milestones=[11]', 'checkpoint.every=1000', 'log.every=1', 'data.threads=1']
MODES = {  # words of the launcher, keys of the configuration
    'dist_sync': (['-s', '2'], []),
    'dist_sync, 2bit': (['-s', '2'], ['train.compression=2bit']),
    'horovod': (['--horovod'], []),
    'horovod, fp16': (['--horovod'], ['train.compression=fp16']),
    'horovod, 2bit': (['--horovod'], ['train.compression=2bit']),
}


class Cost(NamedTuple):
    """Of one step: seconds, and bytes that a host sends and receives (the mean of the two that train)."""
    seconds: float
    sent: float
    received: float


def measure(hosts: Hosts, folder: Path, mode: str) -> Cost:
    """Trains with 2 workers, and if any 2 servers, on 2 hosts that are limited already; medians."""
    words, keys = MODES[mode]
    folder.mkdir()
    (folder / 'hostfile').write_text('host0\nhost1\n')
    with open(folder / 'said', 'wb') as said:
        process = subprocess.Popen([*LAUNCH, '-n', '2', '-H', 'hostfile', *words, '--', *PRETRAIN, *MODEL, *keys],
                                   cwd=folder, env=hosts.environ, stdin=subprocess.DEVNULL, stdout=said, stderr=said)
    try:
        before = traffic_at(hosts, process, folder, FIRST)
        after = traffic_at(hosts, process, folder, LAST)
        assert process.wait(DEADLINE) == 0, (folder / 'said').read_text()
    finally:
        process.kill()
        process.wait()
    times = [record['time'] for record in records(folder)]
    seconds = statistics.median(b - a for a, b in zip(times[FIRST:LAST], times[FIRST + 1:]))
    steps = after[0] - before[0]
    sent, received = [sum(after[1][n][way] - before[1][n][way] for n in (0, 1)) / 2 / steps for way in (0, 1)]
    return Cost(seconds, sent, received)


def traffic_at(hosts, process, folder, step):
    """(steps done, traffic) as soon as `step` steps are done."""
    def done():
        assert process.poll() is None, (folder / 'said').read_text()
        return len(records(folder)) >= step
    wait_for(done, f'step {step}', DEADLINE)
    return len(records(folder)), hosts.traffic()


def records(folder):
    path = folder / 'runs' / 'slow' / 'metrics.jsonl'
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith('\n') and '"loss"' in line]


@pytest.fixture
def hosts(tmp_path):
    with three_hosts(tmp_path / 'hosts') as made:
        made.limit(RATE)
        yield made


@pytest.mark.alone
def test_two_bits_make_a_step_three_times_as_fast(hosts, tmp_path):
    plain, packed = [measure(hosts, tmp_path / str(place), mode)
                     for place, mode in enumerate(('dist_sync', 'dist_sync, 2bit'))]
    # With half of the servers on its own host, each worker's and each server's half is on the wire, either way.
    assert plain.sent == pytest.approx(PARAMETERS * 4, rel=0.2) == plain.received
    assert packed.sent == pytest.approx(PARAMETERS * 4 / 10, rel=0.2) == packed.received  # 10 gradients a word
    assert plain.seconds / packed.seconds >= 3, (plain, packed)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, three_hosts(Path(folder) / 'hosts') as hosts:
        print('| network | mode | ms a step | speed-up | MB a step that a host sends | receives |')
        print('|---|---|---|---|---|---|')
        for rate in ('', RATE):
            network = '200 Mbit/s' if rate else 'not limited'
            if rate:
                hosts.limit(rate)
            runs = [{mode: measure(hosts, Path(folder) / f'{rate}-{turn}-{mode}', mode) for mode in MODES}
                    for turn in range(TURNS)]
            costs = {mode: Cost(*map(statistics.median, zip(*(run[mode] for run in runs)))) for mode in MODES}
            for mode, cost in costs.items():
                base = costs[mode.partition(',')[0]]
                print(f'| {network} | {mode} | {1000 * cost.seconds:.0f} | {base.seconds / cost.seconds:.1f} | '
                      f'{cost.sent / 1e6:.2f} | {cost.received / 1e6:.2f} |', flush=True)


if __name__ == '__main__':
    main()
