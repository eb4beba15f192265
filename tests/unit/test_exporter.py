"""What Prometheus is told of a run, and the alerts and dashboards that are made of it."""
import json
import re
import subprocess
import sys
import time
from urllib.parse import quote
from urllib.request import urlopen

import numpy as np
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from support.programs import free_port, needed
from support.running import DATA, ROOT

from mxsimmim.training import checkpoint, exporter

MONITORING = ROOT / 'launch' / 'monitoring'
TOLD = {'state': 'training', 'step': 40, 'total': 100, 'started': 1000.0, 'time': 2000.5, 'pause': 4.0, 'loss': 0.25,
        'val_loss': None, 'lr': 1e-4, 'grad_norm': 1.5, 'images_per_second': 64.0, 'data_seconds': 0.25,
        'compute_seconds': 0.5, 'communication_seconds': 0.125, 'skipped': 3, 'broken_images': 1,
        'steps_per_second': 0.5, 'restarts': [[1500.0, 'worker 1 on b was killed by SIGKILL']],
        'workers': [{'host': 'a', 'seconds': 0.5}, {'host': 'b"', 'seconds': 1.25}]}


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / 'digits'
    folder.mkdir()
    return folder


def scraped(server):
    """(name, value, labels) of each sample that an endpoint answers with."""
    with urlopen(f'http://127.0.0.1:{server.server_port}/metrics', timeout=10) as answer:
        found = list(text_string_to_metric_families(answer.read().decode()))
    return {(sample.name, *(sample.labels[key] for key in ('rank', 'host') if key in sample.labels)): sample.value
            for family in found for sample in family.samples if sample.labels['run'] == 'digits'}


def test_what_is_told(run):
    path = checkpoint.save(run / 'checkpoints', 20, {'weights': {'a': np.zeros(5, 'float32')}}, {}, keep=1)
    server = exporter.serve(run, lambda: TOLD, '127.0.0.1', 0)
    try:
        found = scraped(server)
    finally:
        server.shutdown()
        server.server_close()
    assert server.server_address[0] == '127.0.0.1'
    assert 0 < found.pop(('mxsimmim_disk_free_bytes',)) < 1e16
    manifest = json.loads((path / 'manifest.json').read_text())
    assert found.pop(('mxsimmim_checkpoint_bytes',)) == sum(entry['bytes'] for entry in manifest['files'].values())
    assert abs(found.pop(('mxsimmim_checkpoint_timestamp_seconds',)) - time.time()) < 60
    assert {name.replace('mxsimmim_', ''): value for (name, *labels), value in found.items() if not labels} == {
        'step': 40, 'planned_steps': 100, 'loss': 0.25, 'gradient_norm': 1.5, 'learning_rate': 1e-4,
        'images_per_second': 64, 'data_seconds': 0.25, 'compute_seconds': 0.5, 'communication_seconds': 0.125,
        'left_seconds': 120, 'start_timestamp_seconds': 1000, 'record_timestamp_seconds': 2000.5,
        'record_pause_seconds': 4, 'nonfinite_steps_total': 3, 'broken_images_total': 1, 'restarts_total': 1,
        'checkpoint_step': 20}
    assert {key[1:]: value for key, value in found.items() if len(key) > 1} == {('0', 'a'): 0.5, ('1', 'b"'): 1.25}


def test_what_is_not_known_yet_is_left_out(run):
    """But counters begin at 0 with the run, so that their first steps are an increase."""
    told = {'state': 'training', 'step': 0, 'total': 9, 'started': 1.0, 'time': 1.0, 'pause': 0.0, 'restarts': []}
    names = {family.name: family for family in exporter.families(run, told)}
    assert {'mxsimmim_loss', 'mxsimmim_left_seconds', 'mxsimmim_checkpoint_step'}.isdisjoint(names)
    counters = [f'mxsimmim_{name}' for name, _, _ in exporter.COUNTERS]
    assert [names[name].samples[0].value for name in counters] == [0, 0, 0]
    names = {family.name for family in exporter.families(run, {**told, 'step': 5})}  # goes on: it has skipped who knows
    assert 'mxsimmim_nonfinite_steps' not in names and 'mxsimmim_restarts' in names


def test_the_package_is_imported_only_where_it_is_asked_for():
    program = 'import sys, mxsimmim.training.exporter; sys.exit("prometheus_client" in sys.modules)'
    assert subprocess.run([sys.executable, '-c', program], cwd=ROOT, timeout=60).returncode == 0


def test_a_missing_package_is_named(monkeypatch, run):
    monkeypatch.setitem(sys.modules, 'prometheus_client', None)
    with pytest.raises(ValueError, match=r"log.prometheus_port needs the package prometheus_client: pip install"):
        exporter.serve(run, lambda: TOLD, '127.0.0.1', 0)


def expressions():
    """(where, PromQL) of every alert and every panel."""
    for group in yaml.safe_load((MONITORING / 'alerts.yml').read_text())['groups']:
        yield from ((rule['alert'], rule['expr']) for rule in group['rules'])
    board = json.loads((MONITORING / 'grafana.json').read_text())
    for panel in board['panels']:
        yield from ((panel['title'], target['expr']) for target in panel['targets'])
    yield from ((variable['name'], variable['query']['query']) for variable in board['templating']['list']
                if variable['type'] == 'query')


@pytest.mark.parametrize('where, expression', list(expressions()), ids=lambda text: text[:30])
def test_every_name_that_is_asked_for_exists(run, where, expression):
    checkpoint.save(run / 'checkpoints', 20, {'weights': {'a': np.zeros(5, 'float32')}}, {}, keep=1)
    told = {**TOLD, 'val_loss': 0.5}
    known = {sample.name for family in exporter.families(run, told) for sample in family.samples}
    asked = set(re.findall(r'\bmxsimmim_\w+', expression))
    assert asked and asked <= known, where


def test_every_metric_is_on_the_dashboard_or_in_an_alert(run):
    asked = set(re.findall(r'\bmxsimmim_\w+', ' '.join(text for _, text in expressions())))
    known = {exporter.PREFIX + name for name, _, _ in exporter.GAUGES}
    assert known - asked == {'mxsimmim_start_timestamp_seconds'}


@pytest.mark.parametrize('words', [('check', 'rules', MONITORING / 'alerts.yml'),
                                   ('check', 'config', MONITORING / 'prometheus.yml'),
                                   ('test', 'rules', DATA / 'alerts_test.yml')], ids=lambda words: ' '.join(words[:2]))
def test_promtool(words):
    done = subprocess.run([needed('promtool', 'prometheus'), *map(str, words)], stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True, timeout=60)
    assert done.returncode == 0 and 'SUCCESS' in done.stdout, done.stdout


def test_the_tests_of_the_alerts_name_each():
    text = (DATA / 'alerts_test.yml').read_text()
    for group in yaml.safe_load((MONITORING / 'alerts.yml').read_text())['groups']:
        for rule in group['rules']:
            cases = re.findall(rf'alertname: {rule["alert"]}\b.*\n(?:\s+eval_time.*\n)?(\s+exp_alerts)?', text)
            assert any(cases) and not all(cases), rule['alert']  # when it fires, and when not


def test_prometheus_fires(run, tmp_path):
    """A real one, asking a real endpoint: an alert comes with the first skipped update, not before."""
    program, port = needed('prometheus', 'prometheus'), free_port()
    told = {**TOLD, 'skipped': 0, 'time': time.time()}
    server = exporter.serve(run, lambda: told, '127.0.0.1', 0)
    config = yaml.safe_load((MONITORING / 'prometheus.yml').read_text())
    config['global'] = dict.fromkeys(('scrape_interval', 'scrape_timeout', 'evaluation_interval'), '250ms')
    config['rule_files'] = [str(MONITORING / 'alerts.yml')]
    config['scrape_configs'][0]['static_configs'][0]['targets'] = [f'127.0.0.1:{server.server_port}']
    (tmp_path / 'prometheus.yml').write_text(yaml.safe_dump(config))

    def ask(path):
        with urlopen(f'http://127.0.0.1:{port}/api/v1/{path}', timeout=10) as answer:
            return json.load(answer)['data']

    def until(condition):
        end = time.monotonic() + 60
        while True:
            try:
                if condition():
                    return
            except OSError:  # it starts
                pass
            assert process.poll() is None and time.monotonic() < end, (tmp_path / 'log').read_text()[-2000:]
            time.sleep(0.1)

    def firing():
        return {alert['labels']['alertname']: alert['annotations']['summary'] for alert in ask('alerts')['alerts']
                if alert['state'] == 'firing'}
    with open(tmp_path / 'log', 'wb') as log:
        process = subprocess.Popen([program, f'--config.file={tmp_path}/prometheus.yml', '--web.listen-address='
                                    f'127.0.0.1:{port}', f'--storage.tsdb.path={tmp_path}/data'],
                                   stdout=log, stderr=log, cwd=tmp_path)
    try:
        counted = 'query?query=' + quote('count_over_time(mxsimmim_nonfinite_steps_total[1m])')
        until(lambda: [int(row['value'][1]) for row in ask(counted)['result'] if int(row['value'][1]) >= 3])
        assert firing() == {}
        told['skipped'] = 2
        until(firing)
        assert firing() == {'MxsimmimNonFiniteSteps': 'digits skips updates whose loss or gradient is not finite'}
    finally:
        process.terminate()
        process.wait(30)
        server.shutdown()
        server.server_close()
