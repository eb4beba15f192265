"""What Kubernetes is asked to make, against its own schemas; tests/cluster/test_kinds.py runs what the pods would."""
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import yaml
from support.running import ROOT

from mxsimmim.cluster import options
from mxsimmim.cluster.backends import kubernetes, manifests
from mxsimmim.cluster.backends.kubernetes import KubernetesBackend
from mxsimmim.cluster.hostfile import Host
from mxsimmim.cluster.spec import JobSpec

FOLDER = ROOT / 'launch' / 'kubernetes'
VERSIONS = [f'1.{minor}' for minor in range(28, 38)]
KEY = 'ab' * 32


def argv(*words):
    return ['--launcher', 'kubernetes', '--image', 'registry.example/mxsimmim:1', *words]


def made(*words, name='job'):
    return kubernetes.manifests_of(options.parse(argv(*words)), name, KEY)


# The ready files, as --dry-run prints them but for their names, and for the Secret, which nobody should keep in a file.
CONF = '/opt/mxsimmim/conf'
READY = {
    'two_workers': ['-n', '2', '--horovod', '--', 'mxsimmim', 'pretrain', f'{CONF}/digits.yaml'],
    'eight_gpus': ['-n', '8', '-s', '4', '--devices', 'gpu', '--', 'mxsimmim', 'pretrain', f'{CONF}/vit_base.yaml',
                   'data.path=/data', 'devices=[gpu(0)]', 'log.prometheus_port=9400', 'log.prometheus_host=0.0.0.0']}


def ready(name):
    """What a ready file must hold below its comments."""
    return manifests.text(made(*READY[name], name=name.replace('_', '-'))[1:], 'default')


@pytest.mark.parametrize('name', READY)
def test_ready_files_are_what_is_printed(name):
    lines = (FOLDER / f'{name}.yaml').read_text().splitlines(keepends=True)
    assert ''.join(line for line in lines if not line.startswith('#')) == ready(name)


@pytest.mark.parametrize('version', VERSIONS)
def test_the_schemas_of_kubernetes(version):
    validate = pytest.importorskip('kubernetes_validate')
    for words in READY.values():
        for manifest in yaml.safe_load_all(manifests.text(made(*words), 'default')):
            validate.validate(manifest, version, strict=True)
    job = made('-n', '1', 'x')[2]
    job['spec']['template']['spec']['subdomains'] = 'x'
    with pytest.raises(validate.ValidationError, match="'subdomains' was unexpected"):
        validate.validate(job, version, strict=True)


def test_the_job(monkeypatch):
    monkeypatch.setenv('TOKEN', 'secret $x')
    words = ['-n', '3', '--devices', 'gpu', '--env', 'TOKEN', '--env-server', 'A=1', '--', 'x', 'ä 🖼', '$(HOME) $$', '']
    text = manifests.text(made(*words), 'team')
    secret, service, job = yaml.safe_load_all(text)
    assert secret['stringData'] == {'MXSIMMIM_LAUNCH': f'job-0.job 41000 {KEY}', 'TOKEN': 'secret $x'}
    assert service['spec'] == {'clusterIP': 'None', 'publishNotReadyAddresses': True, 'selector': {'job-name': 'job'}}
    assert {manifest['metadata']['namespace'] for manifest in (secret, service, job)} == {'team'}
    spec, pod = job['spec'], job['spec']['template']['spec']
    [container] = pod['containers']
    assert (spec['completionMode'], spec['completions'], spec['parallelism'], spec['backoffLimit']) == ('Indexed', 3, 3,
                                                                                                       0)
    assert container['command'] == [
        'python3', '-m', 'mxsimmim.cluster.launch', *argv('-n', '3', '--devices', 'gpu', '--env', 'TOKEN',
                                                          '--env-server', 'A=1'), '--', 'x', 'ä 🖼', '$$(HOME) $$$$', '']
    assert 'secret $x' not in text.partition('kind: "Job"')[2] and KEY not in str(job)
    assert container['resources'] == {'limits': {'nvidia.com/gpu': 1}} and container['workingDir'] == '/runs'
    assert spec['template']['metadata'] == {'labels': {'app.kubernetes.io/name': 'mxsimmim'}}
    assert pod['securityContext']['runAsNonRoot'] and container['securityContext']['readOnlyRootFilesystem']


@pytest.mark.parametrize('words, port', [
    ([], None), (['log.prometheus_port=9400'], 9400), (['log.prometheus_port=9400', 'log.prometheus_port=9500'], 9500),
    (['log.prometheus_port=9400', 'log.prometheus_port=0'], None), (['xlog.prometheus_port=9400'], None)])
def test_the_port_of_the_metrics_is_declared(words, port):
    [container] = made('-n', '1', '--', 'x', *words)[2]['spec']['template']['spec']['containers']
    assert container.get('ports') == (port and [{'name': 'metrics', 'containerPort': port}])


@pytest.mark.parametrize('words, part', [
    (['--launcher', 'kubernetes'], 'give --image IMAGE'), (['--image', 'x'], '--image is for --launcher kubernetes'),
    (['--dry-run'], '--dry-run is for'), (argv('-H', 'h'), 'leave out -H'), (argv('--min-workers', '1'), 'needs all'),
    (argv('--sync-dst-dir', 'd'), 'their image and their volumes')])
def test_what_does_not_go_together(words, part):
    with pytest.raises(ValueError, match=part):
        options.parse(['-n', '2', *words, 'x'])


def test_it_prints_or_applies(tmp_path, monkeypatch, capfd):
    monkeypatch.delenv('JOB_COMPLETION_INDEX', raising=False)
    backend = KubernetesBackend()
    assert backend.instead(options.parse(argv('-n', '2', '--dry-run', 'x'))) == 0
    printed = capfd.readouterr().out
    assert re.search(r'MXSIMMIM_LAUNCH: "(mxsimmim-\w{6})-0\.\1 41000 [0-9a-f]{64}"', printed)
    assert '--dry-run' not in printed
    (tmp_path / 'kubectl').write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/words; cat > {tmp_path}/text\n')
    (tmp_path / 'kubectl').chmod(0o755)
    monkeypatch.setenv('PATH', str(tmp_path), prepend=os.pathsep)
    assert backend.instead(options.parse(argv('-n', '2', '--namespace', 'a', 'x'))) == 0
    assert (tmp_path / 'words').read_text() == 'apply -f -\n'
    assert [one['kind'] for one in yaml.safe_load_all((tmp_path / 'text').read_text())] == ['Secret', 'Service', 'Job']
    assert 'kubectl -n a logs -f job/mxsimmim-' in capfd.readouterr().err
    with pytest.raises(ValueError, match="--namespace 'A' is none"):
        backend.instead(options.parse(argv('-n', '2', '--namespace', 'A', 'x')))
    monkeypatch.setenv('PATH', '/nowhere')
    with pytest.raises(ValueError, match="'kubectl' cannot be started"):
        backend.instead(options.parse(argv('-n', '2', 'x')))


def test_pods_know_their_place(monkeypatch):
    monkeypatch.setenv('JOB_COMPLETION_INDEX', '0')
    given = options.parse(argv('-n', '2', 'x'))
    for value in ('', 'job-0.job 41000', f'job-0 41000 {KEY}', f'job-0.job 41000 {KEY[2:]}'):  # as without openssl
        monkeypatch.setenv('MXSIMMIM_LAUNCH', value)
        with pytest.raises(ValueError, match='without MXSIMMIM_LAUNCH, a name, a port and a key .* make its Secret'):
            KubernetesBackend().instead(given)
    monkeypatch.setenv('MXSIMMIM_LAUNCH', f'job-0.job 41000 {KEY}')
    assert KubernetesBackend().instead(given) is None
    assert KubernetesBackend().hosts(JobSpec(('x',), 2)) == [Host('job-0'), Host('job-1')]


def test_another_pod_ends_when_it_is_told_to():
    environ = {**os.environ, 'JOB_COMPLETION_INDEX': '1', 'MXSIMMIM_LAUNCH': f'no-such-name.invalid 41000 {KEY}'}
    pod = subprocess.Popen([sys.executable, '-m', 'mxsimmim.cluster.launch', *argv('-n', '2', 'x')], env=environ,
                           stderr=subprocess.PIPE)
    assert b'cannot reach the launcher at no-such-name.invalid:41000' in pod.stderr.readline()
    began = time.monotonic()
    pod.send_signal(signal.SIGTERM)
    assert pod.wait(10) == 143 and time.monotonic() - began < 5
    pod.stderr.close()
