"""`parallel=auto` in jobs: what is chosen trains as if it had been written, and a run goes on under another choice."""
import shutil
import sys

import pytest
from support.jobs import HOROVOD, PRETRAIN, PROGRAMS, assert_close, newest, same
from support.running import DIGITS, rounds
from support.tiny import TEN_STEPS

from mxsimmim.config import configfile
from mxsimmim.planner import automatic
from mxsimmim.planner.automatic import Machine
from mxsimmim.planner.costs import Layout, predict

pytestmark = pytest.mark.unmeasured

KEYS = [*TEN_STEPS, 'checkpoint.every=5']


def little():
    """Bytes of a host of two workers in which a pipeline of two fits just so, and data parallelism does not."""
    config = configfile.load(DIGITS, KEYS)
    cluster = automatic.cluster_of([Machine('here', 'cpu', 1, 1e12)] * 2)
    whole = min(predict(config, cluster, Layout(2, store='horovod', recompute=recompute)).memory
                for recompute in (False, True))
    half = predict(config, cluster, Layout(1, 2, 1, 8, 'horovod')).memory
    assert half < whole
    return (half + (whole - half) / 10) * 2 / automatic.ROOM


def chosen(launcher, name):
    """What the newest log of a run says about what was chosen."""
    lines = sorted((launcher.folder / 'runs' / name / 'logs').glob('*'))[-1].read_text().splitlines()
    return [line for line in lines if 'parallel=auto: ' in line][-1].partition('parallel=auto: ')[2]


@pytest.mark.soak
def test_memory_makes_it_a_pipeline_and_a_run_goes_on_with_three_workers_and_a_server(launcher):
    """In `make soak` beside a job whose keys were written by hand, bit by bit."""
    pretrain = [sys.executable, '-W', 'ignore', PROGRAMS / 'little_memory.py', little(), 'pretrain', DIGITS]
    launcher.run(*HOROVOD, '--', *pretrain, *KEYS, 'parallel=auto', 'name=auto')
    line = chosen(launcher, 'auto')
    assert line.startswith('data 1, pipeline 2, tensor 1, ') and '; a whole model on each device needs 0.36 GB' in line
    micro_batches, recompute = line.split(', ')[3].split()[0], str(', recompute' in line).lower()
    runs = launcher.folder / 'runs'
    expected = newest(runs / 'auto')[1]
    for name in rounds([], ['hand']):
        launcher.run(*HOROVOD, '--', *PRETRAIN, *KEYS, 'parallel.pipeline=2', f'name={name}',
                     f'parallel.micro_batches={micro_batches}', f'model.recompute={recompute}')
        same(newest(runs / name)[1], expected)
    written = configfile.load(runs / 'auto' / 'config.yaml')
    assert written.parallel.auto and written.parallel.pipeline == 1
    shutil.rmtree(runs / 'auto' / 'checkpoints' / 'step-00000010')
    launcher.run('-n', 3, '-s', 1, '--', *PRETRAIN, *KEYS, 'parallel=auto', 'name=auto')
    assert chosen(launcher, 'auto').startswith('data 3, pipeline 1, tensor 1, 1 micro-batches, dist_sync: ')
    assert_close(newest(runs / 'auto')[1], expected)
