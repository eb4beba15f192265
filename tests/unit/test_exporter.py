"""What Prometheus is told of a run, and the alerts and dashboards that are made of it."""
import contextlib
import itertools
import json
import platform
import re
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import quote
from urllib.request import urlopen

import numpy as np
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from support.programs import needed
from support.prometheus import MONITORING, config_for, prometheus
from support.running import DATA, ROOT, rounds

from mxsimmim.cluster import options
from mxsimmim.cluster.backends import kubernetes
from mxsimmim.training import checkpoint, exporter

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


@contextlib.contextmanager
def serving(run, told):
    """The endpoint of a run, at a free port."""
    server = exporter.serve(run, told, '127.0.0.1', 0)
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def scraped(server, query=''):
    """(name, value, labels) of each sample that an endpoint answers with."""
    with urlopen(f'http://127.0.0.1:{server.server_port}/metrics{query}', timeout=10) as answer:
        found = list(text_string_to_metric_families(answer.read().decode()))
    return {(sample.name, *(sample.labels[key] for key in ('rank', 'host') if key in sample.labels)): sample.value
            for family in found for sample in family.samples if sample.labels['run'] == 'digits'}


def test_what_is_told(run):
    path = checkpoint.save(run / 'checkpoints', 20, {'weights': {'a': np.zeros(5, 'float32')}}, {}, keep=1)
    with serving(run, lambda: TOLD) as server:
        found = scraped(server)
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


def test_where_a_run_answers(run, monkeypatch):
    """The file says it; whoever asks for another run, by a file that is out of date, is not told of this one."""
    monkeypatch.chdir(run.parent)
    with serving(run.relative_to(run.parent), lambda: TOLD) as server:
        [found] = json.loads((run.parent / 'digits.prometheus.json').read_text())
        assert found == {'targets': [f'127.0.0.1:{server.server_port}'],
                         'labels': {'instance': str(run), '__param_run': str(run)}}
        assert ('mxsimmim_loss',) in scraped(server, f'?run={quote(str(run))}')
        with pytest.raises(HTTPError) as refused:
            scraped(server, f'?run={quote(str(run))}-2')
        assert refused.value.code == 404
    for _ in range(2):
        exporter.withdraw(run)
        assert list(run.parent.iterdir()) == [run]


@pytest.mark.parametrize('host, asked', [
    ('127.0.0.1', '127.0.0.1'), ('node1', 'node1'), ('fd00::1', '[fd00::1]'),
    *[(every, platform.node()) for every in ('0.0.0.0', '::', '')]])
def test_the_address_to_ask(host, asked):
    assert exporter.target(host, 9400) == f'{asked}:9400'


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
    assert {exporter.PREFIX + name for name, _, _ in exporter.GAUGES} <= asked


def panels():
    """(title, PromQL, legend) of every line on the dashboard."""
    for panel in json.loads((MONITORING / 'grafana.json').read_text())['panels']:
        yield from ((panel['title'], target['expr'], target['legendFormat']) for target in panel['targets'])


@pytest.mark.parametrize('title, expression, legend', list(panels()), ids=lambda text: text[:30])
def test_every_panel_shows_the_runs_that_were_chosen(title, expression, legend):
    asked = re.findall(r'\bmxsimmim_\w+(\{[^}]*\})?', expression)
    assert asked and set(asked) == {'{run=~"$run"}'} and '{{run}}' in legend


def in_pods():
    """The configuration for Kubernetes, its pods read from a file: Debian's Prometheus knows no Kubernetes."""
    config = yaml.safe_load((MONITORING / 'kubernetes.yml').read_text())
    [scrape] = config['scrape_configs']
    assert scrape.pop('kubernetes_sd_configs') == [{'role': 'pod', 'namespaces': {'names': ['default']}}]
    return config, scrape


def pods(host, port):
    """What Prometheus makes of the pods of two jobs, in the labels of its discovery; of one all have ended."""
    words = ['--launcher', 'kubernetes', '--image', 'x', '-n', '2', '--', 'mxsimmim', 'pretrain', 'x.yaml',
             f'log.prometheus_port={port}', 'log.prometheus_host=0.0.0.0']
    for name, phase in (('job', 'Running'), ('done', 'Succeeded')):
        made = kubernetes.manifests_of(options.parse(words), name, 'key')[2]['spec']['template']
        [container] = made['spec']['containers']
        for place, declared in itertools.product(range(2), container['ports']):
            labels = {'job-name': name, **made['metadata']['labels']}
            annotations = {'batch.kubernetes.io/job-completion-index': str(place)}
            meta = {'namespace': 'default', 'pod_phase': phase, 'pod_container_port_name': declared['name'],
                    **{f'pod_{kind}_{re.sub("[^a-zA-Z0-9]", "_", key)}': value for kind, values in (
                        ('label', labels), ('annotation', annotations)) for key, value in values.items()}}
            yield {'targets': [f'{host}:{declared["containerPort"]}'],
                   'labels': {f'__meta_kubernetes_{key}': value for key, value in meta.items()}}


def test_the_operator_is_told_the_same():
    monitor = yaml.safe_load((MONITORING / 'podmonitor.yaml').read_text())['spec']
    [endpoint] = monitor['podMetricsEndpoints']
    _, scrape = in_pods()
    [chosen, *others] = scrape['relabel_configs']
    [place, *same] = [{re.sub('[A-Z]', lambda found: '_' + found[0].lower(), key): value for key, value in rule.items()}
                      for rule in endpoint['relabelings']]
    assert same == others and endpoint['filterRunning'] is False
    assert [place['source_labels'][0], place['regex']] == [chosen['source_labels'][1], chosen['regex'].split(';')[1]]
    [(label, value)] = monitor['selector']['matchLabels'].items()
    assert [value, endpoint['port']] == chosen['regex'].split(';')[::2] and monitor['jobLabel'] == label


@pytest.mark.parametrize('words', [('check', 'rules', MONITORING / 'alerts.yml'),
                                   ('check', 'config', MONITORING / 'prometheus.yml'),
                                   ('check', 'config', 'pods.yml'),
                                   ('test', 'rules', DATA / 'alerts_test.yml')],
                         ids=lambda words: f'{words[0]} {Path(words[2]).name}')
def test_promtool(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config, scrape = in_pods()
    scrape['file_sd_configs'] = [{'files': ['pods.json']}]
    Path('pods.yml').write_text(yaml.safe_dump({**config, 'rule_files': [str(MONITORING / 'alerts.yml')]}))
    done = subprocess.run([needed('promtool', 'prometheus'), *map(str, words)], stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True, timeout=60)
    assert done.returncode == 0 and 'SUCCESS' in done.stdout, done.stdout


def test_the_tests_of_the_alerts_name_each():
    text = (DATA / 'alerts_test.yml').read_text()
    for group in yaml.safe_load((MONITORING / 'alerts.yml').read_text())['groups']:
        for rule in group['rules']:
            cases = re.findall(rf'alertname: {rule["alert"]}\b.*\n(?:\s+eval_time.*\n)?(\s+exp_alerts)?', text)
            assert any(cases) and not all(cases), rule['alert']  # when it fires, and when not


def test_prometheus_finds_runs_and_fires(run, tmp_path):
    """A real one, asking real endpoints: an alert comes with the first skipped update, not before.

    It finds two runs by their files, and one as a pod. Of a third the file is left, with the address of another.
    """
    told = {**TOLD, 'val_loss': 0.5, 'skipped': 0, 'time': time.time()}
    runs, other = [run, tmp_path / 'other'], {**told, 'step': 50}
    for one in runs:
        checkpoint.save(one / 'checkpoints', 20, {'weights': {'a': np.zeros(5, 'float32')}}, {}, keep=1)
    config = config_for(f'{tmp_path}/*.prometheus.json')
    _, scrape = in_pods()
    config['scrape_configs'].append({**scrape, 'job_name': 'pods',
                                     'file_sd_configs': [{'files': [f'{tmp_path}/pods.json']}]})
    with serving(run, lambda: told) as server, serving(runs[1], lambda: other):
        stale = (tmp_path / 'digits.prometheus.json').read_text().replace(str(run), f'{tmp_path}/killed')
        (tmp_path / 'killed.prometheus.json').write_text(stale)
        (tmp_path / 'pods.json').write_text(json.dumps(list(pods('127.0.0.1', server.server_port))))
        with prometheus(tmp_path / 'prometheus', config) as one:
            counted = 'count_over_time(mxsimmim_nonfinite_steps_total{run="digits", job="mxsimmim"}[1m]) >= 3'
            one.until(lambda: one.query(counted) and len(one.up()) == 4)
            assert one.up() == {('mxsimmim', str(run)): '1', ('mxsimmim', str(runs[1])): '1',
                                ('pods', 'default/job'): '1', ('mxsimmim', f'{tmp_path}/killed'): '0'}
            for title, expression, _ in panels():
                for chosen in ('digits|other', 'other'):
                    found = {row['metric']['run'] for row in one.query(expression.replace('$run', chosen))}
                    assert found == set(chosen.split('|')), title
            assert one.firing() == {}
            told['skipped'] = 2
            one.until(one.firing)
            assert one.firing() == {
                'MxsimmimNonFiniteSteps': 'digits skips updates whose loss or gradient is not finite'}
            if rounds(0, 1):  # Prometheus looks every five seconds
                exporter.withdraw(run)
                one.until(lambda: ('mxsimmim', str(run)) not in one.up())
