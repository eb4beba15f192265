"""Programs that are measured in turns: each is a process of its own that warms up, then takes steps as it is told."""
import contextlib
import json
import os
import subprocess
import sys
import time
from typing import Any, Dict

from common import WARM_UP, Worker, memory


class Side:
    """A worker process: takes a number of steps on its standard input, answers with the seconds they took."""

    def __init__(self, name: str, python: str, program: str, task: Dict[str, Any], threads: int):
        """Start `program` with `--worker NAME` in this interpreter, and give it `task` as a line of JSON."""
        self.name = name
        self.process = subprocess.Popen(
            [python, program, '--worker', name], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            universal_newlines=True, env={**os.environ, 'OMP_NUM_THREADS': str(threads)})
        try:
            self._send(json.dumps(task))
            about = self._answer()
        except BaseException:
            self.process.kill()
            raise
        self.parameters, self.version, self.peak = about['parameters'], about['version'], about['peak']

    def __enter__(self) -> 'Side':
        return self

    def __exit__(self, *_: Any) -> None:
        self.process.kill()
        self.process.wait()

    def run(self, steps: int) -> float:
        """Seconds a step."""
        self._send(str(steps))
        answer = self._answer()
        self.peak = answer['peak']
        return answer['seconds'] / steps

    def _send(self, line: str) -> None:
        with contextlib.suppress(BrokenPipeError):  # `_answer` says what became of it
            print(line, file=self.process.stdin, flush=True)

    def _answer(self) -> Dict[str, Any]:
        assert self.process.stdout
        for line in self.process.stdout:
            if line.startswith('{'):  # what else a library prints is not for us
                return json.loads(line)
        sys.exit(f'{self.name}: the worker ended with status {self.process.wait()}; its last words are above')


def serve(worker: Worker) -> None:
    """Answer a `Side` in its process, until it closes its end."""
    for _ in range(WARM_UP):
        worker.step()
    worker.wait()
    print(json.dumps(dict(parameters=worker.parameters, version=worker.version, peak=memory('VmHWM'))), flush=True)
    for line in sys.stdin:
        began = time.perf_counter()
        for _ in range(int(line)):
            worker.step()
        worker.wait()
        print(json.dumps(dict(seconds=time.perf_counter() - began, peak=memory('VmHWM'))), flush=True)
