"""The launcher as a user runs it, and a way to see whether anything of a job is left."""
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

LAUNCHER = Path(__file__).parents[2] / 'tools' / 'launch.py'


class Launcher:
    """Runs tools/launch.py in a folder of its own. Every process it starts on this machine inherits a mark."""

    def __init__(self, folder):
        self.folder, self.mark, self.started = folder, f'MXSIMMIM_TEST={uuid.uuid4()}', []
        name, _, value = self.mark.partition('=')
        self.environ = {**os.environ, name: value, 'OMPI_ALLOW_RUN_AS_ROOT': '1',
                        'OMPI_ALLOW_RUN_AS_ROOT_CONFIRM': '1', 'TMPDIR': str(folder)}

    def start(self, *words, **keys):
        """The launcher in the background, its output in the files `out` and `err`."""
        keys = {'cwd': self.folder, 'env': self.environ, 'stdin': subprocess.DEVNULL, 'start_new_session': True, **keys}
        with open(self.folder / 'out', 'wb') as out, open(self.folder / 'err', 'wb') as err:
            keys = {'stdout': out, 'stderr': err, **keys}
            process = subprocess.Popen([sys.executable, str(LAUNCHER), *map(str, words)], **keys)
        self.started.append(process)
        return process

    def run(self, *words, status=0, seconds=60, **keys):
        """The launcher to its end; returns its standard output and standard error. Nothing may be left."""
        process = self.start(*words, **keys)
        try:
            ended = process.wait(seconds)
        except subprocess.TimeoutExpired:
            logs = [f'{path.name}:\n{path.read_bytes().decode(errors="replace")[-2000:]}'
                    for path in sorted(self.folder.glob('logs/*.log'))]
            raise AssertionError('\n'.join([f'{words}: not done after {seconds} s', *logs])) from None
        assert ended == status, f'{words}\n{self.text("out")}\n{self.text("err")}'
        assert self.left() == [], words
        return self.text('out'), self.text('err')

    def text(self, name):
        return (self.folder / name).read_bytes().decode(errors='replace')

    def log(self, name):
        return self.text(f'logs/{name}.log')

    def left(self):
        """(process id, command line) of whatever bears the mark."""
        found = []
        for path in Path('/proc').glob('[0-9]*'):
            try:
                if self.mark.encode() in (path / 'environ').read_bytes().split(b'\0'):
                    found.append((int(path.name), (path / 'cmdline').read_bytes().replace(b'\0', b' ').decode()))
            except OSError:
                continue  # ended meanwhile
        return found

    def command_lines(self):
        """Of all processes of this machine, as anyone on it can read them."""
        found = []
        for path in Path('/proc').glob('[0-9]*/cmdline'):
            try:
                found.append(path.read_bytes().decode(errors='replace'))
            except OSError:
                continue  # ended meanwhile
        return '\n'.join(found)

    def find(self, *parts, seconds=30):
        """Ids of the processes of which each command line or environment holds all `parts`, once there are any."""
        def look():
            return [pid for pid, line in self.left() if all(part in line or part in self.environment(pid)
                                                            for part in parts)]
        return self.until(look, seconds, f'a process with {parts}')

    def environment(self, pid):
        try:
            return (Path('/proc') / str(pid) / 'environ').read_bytes().decode(errors='replace').split('\0')
        except OSError:
            return []

    def until(self, condition, seconds, what):
        """What `condition()` returns as soon as that is true; AssertionError after `seconds`."""
        end = time.monotonic() + seconds
        while True:
            result = condition()
            if result:
                return result
            assert time.monotonic() < end, f'not within {seconds} s: {what}\n{self.text("err")}\n{self.left()}'
            time.sleep(0.02)

    def gone(self, seconds):
        """Waits until nothing is left."""
        self.until(lambda: not self.left(), seconds, 'nothing is left')

    def close(self):
        for process in self.started:
            process.kill()
            process.wait()
        for pid, _ in self.left():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
