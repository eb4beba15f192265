"""The dashboard in a real browser, of a real job that loses a worker; and what rank 0 tells Prometheus meanwhile."""
import json
import os
import re
import signal
import subprocess
from urllib.request import urlopen

import pytest
from support.browser import Browser
from support.jobs import PRETRAIN, SERVERS
from support.programs import free_port
from support.running import command
from support.tiny import TINY

from mxsimmim.training.status import StatusFile

JOB = TINY + ['train.length=100000', 'validation.every=50', 'checkpoint.every=50', 'log.every=10', 'data.threads=1']
TAG = '<img src=x onerror=window.fooled=1>'  # as a folder may be called
DEADLINE = 60
STEP = 'parseInt(document.querySelector("#tiles b").textContent.replace(/,/g, ""))'
WORKERS = ('[...document.querySelectorAll("#workers tr")].slice(1).map(row => [...row.children].map('
           'field => field.innerText.trim()))')


@pytest.fixture
def page(launcher):
    """A browser that looks at the dashboard of the launcher's folder `runs`."""
    runs = launcher.folder / 'runs'
    (runs / TAG).mkdir(parents=True)
    StatusFile(runs / TAG, 10, 0).tell(state='failed', error='<b>bad</b>', time=0, restarts=[(1.5, TAG)])
    happen(runs / TAG, step=4, event='skipped', cause='gradient', time=1)
    happen(runs / TAG, step=3, event='rollback', spike_step=5, spike_loss=9.0, median=0.5, deviations=12.0, time=2)
    process = subprocess.Popen(command('dashboard', runs, '--port', 0), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True)
    browser = None
    try:
        browser = Browser(re.search(r'http://127\S+', process.stdout.readline())[0])
        yield browser
        assert browser.complaints == []
    finally:
        if browser:
            browser.close()
        process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE) == 0, process.stderr.read()


def happen(run, **values):
    """Write down that something happened, as a run does."""
    with open(run / 'metrics.jsonl', 'a') as file:
        file.write(json.dumps(values) + '\n')


def events(page):
    """What happened and why, the latest first, as the page shows it."""
    return page.evaluate('[...document.querySelectorAll("#events tr")].slice(1).map(row => '
                         '[...row.children].slice(1).map(field => field.innerText.trim()))')


def metrics(port):
    with urlopen(f'http://127.0.0.1:{port}/metrics', timeout=DEADLINE) as answer:
        return answer.read().decode()


def test_a_job_that_loses_a_worker(launcher, page):
    port = free_port()
    page.until(f'document.querySelector("#runs .name").textContent == "{TAG}"', DEADLINE)
    page.until('document.querySelector("#error").textContent == "<b>bad</b>"', DEADLINE)
    past = [['rollback', 'to step 3: step 5 had a loss of 9, 12 robust deviations above the median 0.5'],
            ['restart', TAG], ['skipped', 'the gradient of step 4 was not finite']]
    assert events(page) == past
    happen(launcher.folder / 'runs' / TAG, step=8, event='skipped', cause=TAG, time=3)
    page.until('document.querySelectorAll("#events tr").length == 5', DEADLINE)
    assert events(page) == [['skipped', f'the {TAG} of step 8 was not finite'], *past]
    job = launcher.start(*SERVERS, '--max-restarts', 1, '--', *PRETRAIN, *JOB, 'name=job',
                         f'log.prometheus_port={port}')
    err = lambda: launcher.text('err')  # noqa: E731

    # It loads: without a choice the page shows the run that it showed first, so the user clicks.
    page.until('document.querySelectorAll("#runs a").length == 2', DEADLINE, err)
    page.evaluate('document.querySelector("#runs a[href=\'#job\']").click()')
    first = page.until(f'document.querySelector("#name").textContent == "job" && {STEP} > 0 && {STEP}', DEADLINE, err)
    assert page.evaluate('document.querySelector("#state").textContent') == 'training'
    for number in range(4):  # loss, learning rate, images/s, gradient norm
        page.until(f'(document.querySelectorAll("#charts svg")[{number}].querySelector("path").getAttribute("d")'
                   '.match(/L/g) || []).length > 2', DEADLINE, err)
    page.until('document.querySelector("#picture img").naturalWidth > 100', DEADLINE, err)
    page.until('document.querySelectorAll("#charts svg")[0].querySelectorAll("path.second")[0].getAttribute("d")',
               DEADLINE, err)  # the validation loss

    # It updates while the run trains, and shows each worker.
    page.until(f'{STEP} > {first}', DEADLINE, err)
    workers = page.evaluate(WORKERS)
    assert [row[:2] for row in workers] == [[str(rank), os.uname().nodename] for rank in range(2)]
    assert all(float(row[2]) > 0 and row[3] in ('training', 'slow') for row in workers), workers
    told = metrics(port)
    for rank in range(2):
        assert re.search(rf'^mxsimmim_step_seconds{{host=".+",rank="{rank}",run="job"}} \d', told, re.M), told
    assert 'mxsimmim_restarts_total{run="job"} 0.0' in told and 'mxsimmim_validation_loss{' in told
    found = launcher.folder / 'runs' / 'job.prometheus.json'
    assert json.loads(found.read_text())[0]['targets'] == [f'127.0.0.1:{port}']

    # A worker is killed; the launcher starts the job again.
    for pid in launcher.find('DMLC_WORKER_ID=1'):
        os.kill(pid, signal.SIGKILL)
    page.until('document.querySelector("#state").textContent == "restarting"', DEADLINE, err)
    assert page.evaluate(WORKERS)[1][3] == 'was killed by SIGKILL', page.evaluate(WORKERS)
    assert 'worker 1 on' in page.evaluate('document.querySelector("#error").textContent')
    page.until('document.querySelector("#state").textContent == "training" && '
               'document.querySelector("#events td.why").textContent.includes("by SIGKILL")', DEADLINE, err)
    (what, why), = events(page)
    assert what == 'restart' and why.startswith(f'worker 1 on {os.uname().nodename} was killed by SIGKILL; ')
    assert 'mxsimmim_restarts_total{run="job"} 1.0' in metrics(port) and found.exists()

    # In a narrow window nothing sticks out, and the user's dark colours are used.
    colour = 'getComputedStyle(document.body).backgroundColor'
    light = page.evaluate(colour)
    page.size(400, 800, dark=True)
    assert page.until('document.documentElement.scrollWidth', DEADLINE) <= 400
    assert page.evaluate(colour) != light

    # The end of the job, and of the dashboard while the page looks on.
    job.send_signal(signal.SIGTERM)
    page.until('document.querySelector("#state").textContent == "stopped"', DEADLINE, err)
    assert page.evaluate('window.fooled') is None and page.evaluate('document.querySelectorAll("b").length') == 7
    job.wait(DEADLINE)
    assert not found.exists()
