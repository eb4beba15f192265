"""Every command in one process, so that MXNet is imported once; for the folder it starts in.

With the argument `detect` those that a detector has, as that alone imports GluonCV. Leaves missed.json: the names of
modules that nobody has, with the package that looked for each.
"""
import json
import os
import shutil
import signal
import socket
import sys
import threading
import time
from http.client import HTTPConnection
from pathlib import Path

from support.running import BASE, ROOT
from support.tiny import DETECTOR, SEGMENTER, TINY

missed = set()


class Last:
    """Asked for what no other finder has."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        frame = sys._getframe(1)
        while 'importlib' in frame.f_code.co_filename or frame.f_code.co_name == 'untraced':  # of measuring.py
            frame = frame.f_back
        if path is None:
            missed.add((name, frame.f_globals['__name__'].partition('.')[0]))


def free_port():
    with socket.socket() as one:
        one.bind(('127.0.0.1', 0))
        return one.getsockname()[1]


def ask_and_end(port, pictures):
    """Sends a picture as soon as the service is there, and then ends it."""
    while True:
        try:
            connection = HTTPConnection('127.0.0.1', port, timeout=60)
            connection.request('POST', '/predict', next(Path(pictures).iterdir()).read_bytes())
            break
        except (OSError, StopIteration):
            time.sleep(0.1)
    assert connection.getresponse().status == 200
    os.kill(os.getpid(), signal.SIGTERM)


def copies():
    """A folder of pictures; without Pillow, which looks for other packages where it is imported first."""
    Path('copies').mkdir()
    for number in range(9):
        shutil.copy(next(Path('runs/pre/pictures').iterdir()), f'copies/{number}.png')


def commands_of_maps(kind, keys):
    """Those of a run that is called as its network, a segmenter or a detector."""
    finetune = ['finetune', BASE, *keys, f'name={kind}']
    return [finetune, [*finetune, '--eval'], ['predict', f'runs/{kind}', f'runs/{kind}/pictures', '-o', 'found'],
            ['export', f'runs/{kind}', f'{kind}.onnx', '--format', 'onnx']]


def commands_of_encoders():
    tiny = [*TINY, 'train.length=4', 'optim.warmup=1', 'optim.milestones=[2]', 'validation.every=4', 'log.every=2']
    tuning = [text for text in tiny if not text.startswith(('mask.', 'validation.images', 'validation.pictures'))]
    return [
        ['config'], ['pretrain', ROOT / 'conf/digits.yaml', *tiny, 'name=pre'],
        ['finetune', ROOT / 'conf/finetune_digits.yaml', *tuning, 'name=fine', 'model.pretrained=runs/pre'],
        ['finetune', ROOT / 'conf/finetune_digits.yaml', *tuning, 'name=fine', 'model.pretrained=runs/pre', '--eval'],
        ['reconstruct', 'runs/pre', 'runs/pre/pictures'], ['predict', 'runs/fine', 'runs/pre/pictures'],
        ['features', 'runs/pre', 'copies', '--picture', 'copies.png'], ['probe', 'runs/pre', '--seeds', '1'],
        ['export', 'runs/pre', 'pre.pth'], ['import', 'pre.pth', 'runs/again'],
        ['export', 'runs/pre', 'pre.safetensors', '--names', 'timm'],
        ['export', 'runs/fine', 'fine', '--format', 'symbol'],
        ['export', 'runs/fine', 'fine8', '--format', 'symbol', '--int8', '--max-drop', '100'],
        ['export', 'runs/fine', 'fine.onnx', '--format', 'onnx'], ['plot', 'runs/pre'], ['doctor'],
        ['plan', ROOT / 'conf/vit_tiny.yaml', '--memory', '16GB']]


def main():
    from mxsimmim.__main__ import main as mxsimmim
    port = free_port()
    if sys.argv[1:] == ['detect']:
        run, pictures, commands = 'runs/detector', 'runs/detector/pictures', commands_of_maps('detector', DETECTOR)
    else:
        run, pictures = 'runs/fine', 'runs/pre/pictures'
        commands = [*commands_of_encoders(), *commands_of_maps('segmenter', SEGMENTER)]
    commands.append(['serve', run, '--port', port])
    threading.Thread(target=ask_and_end, args=[port, pictures], daemon=True).start()
    sys.meta_path.append(Last)
    for words in commands:
        if words[0] == 'features':
            copies()
        status = mxsimmim(list(map(str, words)))
        if status:
            sys.exit(f'{words} ended with {status}')
    sys.meta_path.remove(Last)
    Path('missed.json').write_text(json.dumps(sorted(missed)))


if __name__ == '__main__':
    main()
