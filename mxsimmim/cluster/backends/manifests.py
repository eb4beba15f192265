"""Write what Kubernetes is to make of a job: a Secret, a headless Service, an Indexed Job. Pure functions."""
import json
import re
from typing import Any, Dict, List, Mapping, Sequence

from mxsimmim.cluster.callback import VARIABLE

PORT = 41000  # at which pod 0 is called
USER = 10001  # whom the image of launch/kubernetes/Dockerfile has
COMMAND = 'python3', '-m', 'mxsimmim.cluster.launch'
LABELS = {'app.kubernetes.io/name': 'mxsimmim'}  # of each pod
METRICS = re.compile(r'log\.prometheus_port=(\d+)')  # in the words of the command
VOLUMES = {'data': '/data', 'runs': '/runs'}  # claims, by name, and where they are mounted

Manifest = Dict[str, Any]


def secret(name: str, key: str, passed: Mapping[str, str]) -> Manifest:
    """Write the Secret: where agents call and the key with which they prove themselves, and the user's variables."""
    return {'apiVersion': 'v1', 'kind': 'Secret', 'metadata': {'name': name},
            'stringData': {VARIABLE: f'{name}-0.{name} {PORT} {key}', **passed}}


def service(name: str) -> Manifest:
    """Write the Service that gives each pod its name, before it is ready, as all wait for each other."""
    return {'apiVersion': 'v1', 'kind': 'Service', 'metadata': {'name': name},
            'spec': {'clusterIP': 'None', 'publishNotReadyAddresses': True, 'selector': {'job-name': name}}}


def job(name: str, image: str, words: Sequence[str], pods: int, gpus: bool) -> Manifest:
    """Write the Job; `words` are the launcher's, in which Kubernetes would replace $(NAME); `gpus`: one a pod."""
    container = {
        'name': 'worker', 'image': image, 'command': [word.replace('$', '$$') for word in (*COMMAND, *words)],
        'workingDir': VOLUMES['runs'],
        'envFrom': [{'secretRef': {'name': name}}], 'env': [{'name': 'TMPDIR', 'value': '/tmp'}],
        'resources': {'limits': {'nvidia.com/gpu': 1}} if gpus else {},
        'securityContext': {'allowPrivilegeEscalation': False, 'capabilities': {'drop': ['ALL']},
                            'readOnlyRootFilesystem': True},
        'volumeMounts': [{'name': 'tmp', 'mountPath': '/tmp'}] + [
            {'name': volume, 'mountPath': path, 'readOnly': volume == 'data'} for volume, path in VOLUMES.items()]}
    ports = [int(found[1]) for found in map(METRICS.fullmatch, words) if found]
    if any(ports[-1:]):  # at which the worker of pod 0 answers Prometheus
        container['ports'] = [{'name': 'metrics', 'containerPort': ports[-1]}]
    pod = {
        'subdomain': name, 'restartPolicy': 'Never', 'terminationGracePeriodSeconds': 120,
        'automountServiceAccountToken': False, 'enableServiceLinks': False,
        'securityContext': {'runAsNonRoot': True, 'runAsUser': USER, 'runAsGroup': USER, 'fsGroup': USER,
                            'seccompProfile': {'type': 'RuntimeDefault'}},
        'containers': [container],
        'volumes': [{'name': 'tmp', 'emptyDir': {}}] + [
            {'name': volume, 'persistentVolumeClaim': {'claimName': volume}} for volume in VOLUMES]}
    return {'apiVersion': 'batch/v1', 'kind': 'Job', 'metadata': {'name': name},
            'spec': {'completionMode': 'Indexed', 'completions': pods, 'parallelism': pods, 'backoffLimit': 0,
                     'template': {'metadata': {'labels': LABELS}, 'spec': pod}}}


def text(made: Sequence[Manifest], namespace: str) -> str:
    """Write manifests as YAML, each a document."""
    for manifest in made:
        manifest['metadata']['namespace'] = namespace
    return ''.join('---\n' + '\n'.join(lines(manifest)) + '\n' for manifest in made)


def lines(value: Any) -> List[str]:
    """Write a value as lines of YAML: mappings and lists as blocks, all else as JSON, which YAML contains.

    But for its pairs of surrogates, which YAML has one escape for.
    """
    if isinstance(value, dict) and value:
        return [line for key, part in value.items() for line in _under(f'{key}:', part)]
    if isinstance(value, list) and value:
        return [('  ' if number else '- ') + line for part in value for number, line in enumerate(lines(part))]
    return [json.dumps(value, ensure_ascii=False).encode('ascii', 'backslashreplace').decode('ascii')]


def _under(head: str, part: Any) -> List[str]:
    written = lines(part)
    if isinstance(part, (dict, list)) and part:
        return [head] + ['  ' + line for line in written]
    return [f'{head} {written[0]}']
