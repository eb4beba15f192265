"""A job on three hosts survives whatever happens to it: drawn from a seed, ten here, a hundred in `make soak`.

Each is compared with an undisturbed job of its mode, bit by bit where that is possible; here one process stands for
those of synchronous modes where it is not.
"""
import fcntl
import json
import os
import subprocess
import time

import numpy as np
import pytest
from support.fault_job import DEADLINE, HAPPEN, KEYS, Job, arm, check, weights_of
from support.faults import MODES, course, draw
from support.hosts import run, three_hosts
from support.images import noise
from support.running import BASE, command, rounds

pytestmark = [pytest.mark.soak, pytest.mark.unmeasured]

SEED = int(os.environ.get('FAULT_SEED') or rounds(314, time.strftime('%Y%m%d')))
ROOM = '32m'  # of the disk that the runs are on


@pytest.fixture(scope='module')
def hosts(tmp_path_factory):
    """Three hosts; they and this machine have one small disk, with the images and one folder for runs."""
    folder = tmp_path_factory.mktemp('cluster')
    (folder / 'disk').mkdir()
    run('mount', '-t', 'tmpfs', '-o', f'size={ROOM}', 'none', folder / 'disk')
    try:
        noise(folder / 'disk' / 'images', 96)
        with three_hosts(folder / 'hosts') as made:
            yield made
    finally:
        run('umount', '-l', folder / 'disk')


@pytest.fixture
def start(hosts, disk, tmp_path):
    """Makes jobs of a mode; they end with the test."""
    jobs = []

    def begin(mode, name):
        jobs.append(Job(hosts, tmp_path / name, disk, disk / 'images', mode))
        return jobs[-1]
    yield begin
    for job in jobs:
        job.close()


@pytest.fixture
def disk(hosts):
    return hosts.folder.parent / 'disk'


@pytest.fixture
def undisturbed(start, disk, tmp_path_factory):
    """Gives the weights of a mode where nothing happens; pytest's workers share what each has computed."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if 'PYTEST_XDIST_WORKER' in os.environ else folder

    def alone():
        subprocess.run([*command('pretrain', BASE), *KEYS, f'data.path={disk}/images', 'name=alone'], cwd=folder,
                       check=True, timeout=DEADLINE, stderr=subprocess.DEVNULL)
        return folder / 'runs' / 'alone'

    def job(mode):
        job = start(mode, 'undisturbed')
        job.start()
        assert job.process.wait(DEADLINE) == 0 and not job.restarts(), job.told()
        return job.run

    def weights(mode):
        one = rounds(MODES[mode].synchronous and MODES[mode].tolerance > 0, False)
        file = folder / f'undisturbed-{"alone" if one else mode}.npy'
        with open(file.with_suffix('.lock'), 'w') as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not file.exists():
                np.save(file, weights_of(alone() if one else job(mode))[1])
        return np.load(file)
    return weights


@pytest.mark.parametrize('fault', draw(SEED, rounds(10, 100)), ids=str)
def test_a_job_survives(start, undisturbed, fault):
    print(f'FAULT_SEED={SEED}: {fault}')
    expected, job = undisturbed(fault.mode), start(fault.mode, 'job')
    record = dict(fault._asdict(), recovered=False)
    try:
        if fault.target.partition('.')[0] in ('update', 'checkpoint', 'control'):
            arm(job, fault)
        job.start()
        begin = HAPPEN[fault.kind](job, fault)
        check(job, expected)
        assert fault.seconds or job.restarts() <= 1, job.said()  # a moment's fault is one failure
        seconds, lost = course(job.history, begin)
        record.update(recovered=True, seconds=round(seconds, 2), lost=lost, restarts=job.restarts())
    finally:
        print(record)
        if os.environ.get('FAULT_RECORDS'):
            with open(os.environ['FAULT_RECORDS'], 'a') as file:
                file.write(json.dumps(record) + '\n')
