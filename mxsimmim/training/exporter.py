"""What a run tells Prometheus: rank 0's figures, those of each worker, and the room left, as `/metrics` over HTTP.

The names follow https://prometheus.io/docs/practices/naming: base units, `_total` for counters. Each metric has the
label `run`; what is not known yet is left out. The alerts and the dashboard of launch/monitoring use these names.

Where rank 0 runs, a cluster decides when the job starts. So each run that answers says where, in a file beside its
folder, in the form that Prometheus reads (`file_sd_configs`).
"""
import contextlib
import ipaddress
import json
import platform
from pathlib import Path
from typing import Any, Callable, Iterator, Mapping, Tuple
from urllib.parse import parse_qs

from ..cluster import run_status
from ..system import files
from ..system.guards import unusable
from .checkpoint import MANIFEST
from .status import left, newest_whole, workers

PREFIX = 'mxsimmim_'
# Name, key of `StatusFile.told`, help.
GAUGES = (
    ('step', 'step', 'Updates done.'),
    ('planned_steps', 'total', 'Updates of the whole run.'),
    ('loss', 'loss', 'Training loss, the mean since the record before.'),
    ('validation_loss', 'val_loss', 'Loss of the last validation.'),
    ('gradient_norm', 'grad_norm', 'L2 norm of the gradient before clipping, the mean since the record before.'),
    ('learning_rate', 'lr', 'Learning rate of the last update.'),
    ('images_per_second', 'images_per_second', 'Images of the whole job a second.'),
    ('data_seconds', 'data_seconds', 'Time of a step that a worker waits for data, the mean over workers.'),
    ('compute_seconds', 'compute_seconds', 'Time of a step that a worker computes, the mean over workers.'),
    ('communication_seconds', 'communication_seconds', 'Time of a step that a worker waits for others, the mean.'),
    ('left_seconds', 'left', 'Time to the end of the run at this speed.'),
    ('start_timestamp_seconds', 'started', 'Unix time at which this process began to train.'),
    ('record_timestamp_seconds', 'time', 'Unix time of the last record: a stalled job makes none.'),
    ('record_pause_seconds', 'pause', 'The longest time between two records so far.'),
)
COUNTERS = (
    ('nonfinite_steps', 'skipped', 'Updates skipped because loss or gradient was not finite.'),
    ('broken_images', 'broken_images', 'Images that could not be read.'),
    ('restarts', 'restarts', 'Times that the launcher started the job again after a failure.'),
)


def families(run: Path, told: Mapping[str, Any]) -> Iterator[Any]:
    """Yield what Prometheus is told of a run, of which `StatusFile.told` is `told`."""
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    def family(kind: Any, name: str, text: str, value: Any, *more: Tuple[str, str]) -> Any:
        labels, values = zip(('run', run.name), *more)
        made = kind(PREFIX + name, text, labels=labels)
        made.add_metric(values, value)
        return made
    start = {'skipped': 0, 'broken_images': 0} if told['step'] == 0 else {}  # so that the first ones are an increase
    known = {**start, **told, 'left': left(told), 'restarts': len(told['restarts'])}
    for name, key, text in GAUGES:
        if known.get(key) is not None:
            yield family(GaugeMetricFamily, name, text, known[key])
    for name, key, text in COUNTERS:
        if known.get(key) is not None:
            yield family(CounterMetricFamily, name, text, known[key])
    seconds = GaugeMetricFamily(PREFIX + 'step_seconds', 'Time of a step that a worker needs by itself.',
                                labels=('run', 'rank', 'host'))
    for worker in workers(told):
        seconds.add_metric((run.name, str(worker['rank']), worker['host']), worker['seconds'])
    yield seconds
    for name, text, value in room(run):
        yield family(GaugeMetricFamily, name, text, value)


def room(run: Path) -> Iterator[Tuple[str, str, float]]:
    """Yield (name, help, value) of what the run's disk holds: free bytes, and the newest whole checkpoint."""
    free = files.free(run)
    if free is not None:
        yield 'disk_free_bytes', "Bytes free on the disk of the run's folder.", free
    step = newest_whole(run / 'checkpoints')
    with contextlib.suppress(OSError, ValueError):  # deleted meanwhile
        if step is not None:
            manifest = run / 'checkpoints' / f'step-{step:08d}' / MANIFEST
            sizes = [entry['bytes'] for entry in json.loads(manifest.read_text(encoding='utf-8'))['files'].values()]
            yield 'checkpoint_bytes', 'Bytes of the newest whole checkpoint.', sum(sizes)
            yield 'checkpoint_timestamp_seconds', 'Unix time of the newest whole checkpoint.', manifest.stat().st_mtime
            yield 'checkpoint_step', 'Step of the newest whole checkpoint.', step


class Collector:
    """Asks, whenever Prometheus does, what a run has told last."""

    def __init__(self, run: Path, told: Callable[[], Mapping[str, Any]]):
        self.run, self.told = run, told

    def collect(self) -> Iterator[Any]:
        """Yield the metrics of this moment."""
        return families(self.run, self.told())

    def describe(self) -> Tuple[()]:
        """Return nothing: names are not looked up at the registration."""
        return ()


def serve(run: Path, told: Callable[[], Mapping[str, Any]], host: str, port: int) -> Any:
    """Answer Prometheus in a thread, and tell it where; return the HTTP server, whose `server_port` is its port.

    Raises:
        ValueError: the package is missing.
        OSError: the address cannot be had, or the file not be written.
    """
    try:
        from prometheus_client import CollectorRegistry, start_http_server
    except Exception as error:  # a broken package raises anything
        raise unusable('log.prometheus_port', error) from None
    run = run.absolute()
    registry = CollectorRegistry()
    registry.register(Collector(run, told))
    server, _ = start_http_server(port, host, registry)
    server.set_app(refuse_others(server.get_app(), run))
    run_status.write(discovery_file(run), [{
        'targets': [target(host, server.server_port)],
        # Its name in all figures, wherever it runs after a restart; the second becomes ?run= of the address.
        'labels': {'instance': str(run), '__param_run': str(run)}}])
    return server


def withdraw(run: Path) -> None:
    """Have Prometheus no longer ask for a run, which has ended or was stopped; of one that failed it is to know."""
    with contextlib.suppress(OSError):
        discovery_file(run).unlink()


def discovery_file(run: Path) -> Path:
    """Return the file that says where a run answers; beside its folder, as Prometheus takes no * for a folder."""
    return run.with_name(run.name + '.prometheus.json')


def target(host: str, port: int) -> str:
    """Write the address to ask, HOST:PORT; of a run that listens on all addresses it has the name of this machine."""
    with contextlib.suppress(ValueError):
        address = ipaddress.ip_address(host or '0.0.0.0')
        if address.is_unspecified:
            host = platform.node()
        elif address.version == 6:
            host = f'[{host}]'
    return f'{host}:{port}'


def refuse_others(app: Callable[..., Any], run: Path) -> Callable[..., Any]:
    """Have a WSGI application answer 404 where the query asks for another run, as one that was killed left its file."""
    def answer(environ: Mapping[str, Any], start_response: Callable[..., Any]) -> Any:
        asked = parse_qs(environ.get('QUERY_STRING', '')).get('run')
        if asked in (None, [str(run)]):
            return app(environ, start_response)
        start_response('404 Not Found', [('Content-Type', 'text/plain')])
        return [b'another run answers here\n']
    return answer
