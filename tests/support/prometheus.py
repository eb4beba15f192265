"""A real Prometheus, which runs while a test does."""
import contextlib
import json
import subprocess
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, Sequence, Tuple
from urllib.parse import quote
from urllib.request import ProxyHandler, build_opener

import yaml

from .programs import free_port, needed
from .running import ROOT

MONITORING = ROOT / 'launch' / 'monitoring'
WEB = build_opener(ProxyHandler({}))
OFTEN = dict.fromkeys(('scrape_interval', 'scrape_timeout', 'evaluation_interval'), '250ms')


class Prometheus:
    """Asks one at `address`, HOST:PORT, what it knows."""

    def __init__(self, process: subprocess.Popen, address: str, log: Path) -> None:
        self.process, self.address, self.log = process, address, log

    def ask(self, path: str) -> Dict[str, Any]:
        """What its API answers; OSError while it starts."""
        with WEB.open(f'http://{self.address}/api/v1/{path}', timeout=10) as answer:
            return json.load(answer)['data']

    def query(self, expression: str) -> List[Dict[str, Any]]:
        """The series that an expression has now, each a `metric` and a `value`."""
        return self.ask('query?query=' + quote(expression))['result']

    def up(self) -> Dict[Tuple[str, str], str]:
        """Whether each (job, instance) that it knows has answered: '1' or '0'."""
        return {(row['metric']['job'], row['metric']['instance']): row['value'][1] for row in self.query('up')}

    def firing(self) -> Dict[str, str]:
        """Name and text of each alert of the job `mxsimmim` that fires."""
        return {alert['labels']['alertname']: alert['annotations']['summary'] for alert in self.ask('alerts')['alerts']
                if alert['state'] == 'firing' and alert['labels']['job'] == 'mxsimmim'}

    def until(self, condition, seconds: float = 60) -> None:
        """Waits until `condition()` is true; AssertionError after so long."""
        end = time.monotonic() + seconds
        while True:
            try:
                if condition():
                    return
            except OSError:  # it starts
                pass
            assert self.process.poll() is None and time.monotonic() < end, self.log.read_text()[-2000:]
            time.sleep(0.1)


def config_for(files: str) -> Dict[str, Any]:
    """The configuration of launch/monitoring, for the runs of these files, asked and judged four times a second."""
    config = yaml.safe_load((MONITORING / 'prometheus.yml').read_text())
    config.update({'global': OFTEN, 'rule_files': [str(MONITORING / 'alerts.yml')]})
    config['scrape_configs'][0]['file_sd_configs'][0]['files'] = [files]
    return config


@contextlib.contextmanager
def prometheus(folder: Path, config: Mapping[str, Any], inside: Sequence[str] = (), host: str = '127.0.0.1'
               ) -> Iterator[Prometheus]:
    """One with this configuration, its files in `folder`; `inside`: the words that begin a command on that host."""
    program, address = needed('prometheus', 'prometheus'), f'{host}:{free_port()}'
    folder.mkdir(exist_ok=True)
    (folder / 'prometheus.yml').write_text(yaml.safe_dump(config))
    with open(folder / 'log', 'wb') as log:
        process = subprocess.Popen([*inside, program, f'--config.file={folder}/prometheus.yml', f'--web.listen-address='
                                    f'{address}', f'--storage.tsdb.path={folder}/data', '--web.enable-lifecycle'],
                                   stdout=log, stderr=log, stdin=subprocess.DEVNULL)
    try:
        yield Prometheus(process, address, folder / 'log')
    finally:
        with contextlib.suppress(OSError):
            WEB.open(f'http://{address}/-/quit', data=b'', timeout=10).close()  # a signal would end `inside` alone
        try:
            process.wait(10)
        finally:
            process.kill()
