"""Which faults a job must survive, how they are drawn from a seed, and the table of what became of them. Pure."""
import json
import random
from statistics import median
from typing import Any, Dict, List, NamedTuple, Sequence, Tuple

SAVED = 10  # steps between the checkpoints of a job
EARLIEST, LATEST = 12, 40  # step of a fault


class Mode(NamedTuple):
    """How the workers of a job share it."""
    launch: Tuple[object, ...]  # the launcher's options
    keys: Tuple[str, ...] = ()
    tolerance: float = 1e-5  # of the weights, relative to those of an undisturbed run; 0: the same bits
    synchronous: bool = True  # the weights are those of one process, but for the order of sums


# Sums of three have the order in which messages arrive; those of two, and what a pipeline hands on, have always one.
MODES: Dict[str, Mode] = {
    'servers': Mode(('-n', 3, '-s', 2)),
    'Horovod': Mode(('-n', 3, '--horovod')),
    'asynchronous': Mode(('-n', 3, '-s', 1), ('train.store=dist_async', 'optim.clip_grad=null'), 0.2, False),
    'local SGD': Mode(('-n', 3, '-s', 1), ('train.aggregation=local_sgd', 'train.local_steps=5'),
                      synchronous=False),
    'pipeline': Mode(('-n', 3, '--horovod'), ('parallel.pipeline=3', 'parallel.micro_batches=3'), 0),
    'hybrid': Mode(('-n', 4, '--horovod'), ('parallel.pipeline=2', 'parallel.micro_batches=3'), 0),
}
WORKERS = ('worker 0', 'worker 1', 'worker 2')
HELPERS = ('agent', 'guardian', 'ssh')  # of the launcher: on a host, above the agent, and here
SERVERS = ('server', 'scheduler')

# Kind -> what it can hit. `HELPERS` stand for servers as well where the mode has any.
KINDS: Dict[str, Tuple[str, ...]] = {
    'killed worker': WORKERS,
    'host lost': ('host0', 'host1', 'host2'),
    'full disk': ('',),
    'killed while saving': ('checkpoint.arrays', 'checkpoint.written', 'checkpoint.published'),
    'stopped worker': WORKERS,
    'truncated checkpoint': ('weights.safetensors', 'optimizer.safetensors', 'state.json', 'manifest.json'),
    'link down': ('host0', 'host1', 'host2'),
    'killed helper': HELPERS,
    'deleted image': ('',),
    'killed launcher': ('',),
    '30 % of packets lost': ('host0', 'host1', 'host2'),
    'flipped bit': ('weights.safetensors', 'optimizer.safetensors', 'state.json', 'manifest.json'),
    'killed at a point': ('update.before', 'update.after', 'control.hello'),
    'stopped helper': ('agent',),
}
SECONDS = {'host lost': (1, 6), 'full disk': (1, 9), 'link down': (4, 15), '30 % of packets lost': (6, 6)}  # it lasts


class Fault(NamedTuple):
    """One fault of a draw; the same seed and number are the same fault."""
    seed: int
    number: int
    kind: str
    mode: str
    target: str
    step: int  # at which it happens, at the earliest
    seconds: int  # that it lasts

    def __str__(self) -> str:
        return f'{self.number:02d}-{self.kind}-{self.mode}'.replace(' ', '_')


def draw(seed: int, count: int, kinds: Sequence[str] = tuple(KINDS)) -> List[Fault]:
    """Draws faults so that all kinds come equally often, to one, and each meets the modes in turn."""
    chance = random.Random(seed)
    kinds, modes = (chance.sample(list(names), len(names)) for names in (kinds, MODES))
    faults = []
    for number in range(count):
        turn, place = divmod(number, len(kinds))
        kind, mode, chance = kinds[place], modes[(turn + place) % len(modes)], random.Random(f'{seed} {number}')
        targets = KINDS[kind]
        if targets[0] == 'agent' and '-s' in MODES[mode].launch:
            targets += SERVERS
        faults.append(Fault(seed, number, kind, mode, chance.choice(targets), chance.randint(EARLIEST, LATEST),
                            chance.choice(SECONDS.get(kind, (0,)))))
    return faults


def course(history: Sequence[Tuple[float, int]], begin: float) -> Tuple[float, int]:
    """Says what a fault cost: seconds from `begin` to the end of the longest pause since then, and steps done again.

    `history` has (time, last step that was logged) of each change of that step.
    """
    lost, now, longest, recovered = 0, begin, 0.0, begin
    for (_, before), (time, step) in zip(history, history[1:]):
        lost += max(0, before - step)
        if step > before and time > begin:
            longest, recovered = max((longest, recovered), (time - now, time))
            now = time
    return recovered - begin, lost


def table(lines: Sequence[str]) -> str:
    """Makes the table of records as JSON lines, in Markdown."""
    records = [json.loads(line) for line in lines]
    rows = ['| fault | tried | recovered | seconds to recover, median | worst | steps lost, median | worst |',
            '|---|--:|--:|--:|--:|--:|--:|']
    for kind in [*KINDS, 'all']:
        tried = [record for record in records if kind in (record['kind'], 'all')]
        rows.append(f'| {kind} | {_row(tried)} |' if tried else f'| {kind} | not tried | | | | | |')
    return '\n'.join(rows)


def _row(tried: Sequence[Dict[str, Any]]) -> str:
    good = [record for record in tried if record['recovered']]
    if not good:
        return f'{len(tried)} | 0 | | | |'
    seconds, lost = ([record[name] for record in good] for name in ('seconds', 'lost'))
    return (f'{len(tried)} | {len(good)} | {median(seconds):.1f} | {max(seconds):.1f} | {median(lost):.0f} | '
            f'{max(lost)}')


if __name__ == '__main__':
    import sys
    with open(sys.argv[1]) as file:
        print(table(file.readlines()))
