"""Failing commands, for `make soak`: each must end by itself, every time, also on a busy machine.

    PYTHONPATH=tests python tests/e2e/soak_errors.py [RUNS [WORD]]  # RUNS of each, of those whose words contain WORD
"""
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from support.images import noise
from support.running import BASE, DATA, DEADLINE, ROOT, command
from support.tiny import TINY

RUNS, SECONDS = 50, 600  # of each command at most; of all rounds together
ENDS = 20  # seconds that a command may still be there after its last word

PRETRAIN = ['pretrain', BASE, *TINY, 'train.length=4', 'optim.warmup=1']
FINETUNE = ['finetune', BASE, *TINY, 'model.use_mean_pooling=true', 'train.length=4', 'optim.warmup=1']
LAUNCH = [sys.executable, ROOT / 'tools' / 'launch.py', '-n', 2]

# What fails before MXNet is imported, after it, with a network, in loader threads, in the middle of training, in jobs.
COMMANDS = [
    [*PRETRAIN, 'train.lenght=3'],
    [*PRETRAIN, 'data.path=missing'],
    [*PRETRAIN, 'data.path=cut.rec'],
    [*PRETRAIN, 'data.path=few', 'data.val_fraction=0'],
    [*PRETRAIN, 'data.path=broken', 'data.max_broken=3', 'data.val_fraction=0'],
    [*PRETRAIN, 'devices=[gpu(9)]'],
    [*PRETRAIN, 'output=file'],
    [*PRETRAIN, 'name=bad', 'optim.base_lr=1e30', 'optim.warmup=0', 'train.max_bad_steps=2', 'optim.clip_grad=null'],
    [*PRETRAIN, 'name=run', 'resume=none'],
    [*PRETRAIN, 'name=run', 'seed=9'],
    [*PRETRAIN, 'name=torn'],
    [*PRETRAIN, 'name=new', 'resume=runs/torn/checkpoints/step-00000004'],
    [*FINETUNE, 'name=a', 'model.pretrained=runs/torn'],
    [*FINETUNE, 'name=a', 'model.pretrained=runs/none'],
    [*FINETUNE, 'name=a', 'model.pretrained=text.pth'],
    [*FINETUNE, 'name=a', 'model.pretrained=runs/run', 'model.embed_dim=24'],
    [*FINETUNE, 'name=torn', '--eval'],
    [*FINETUNE, 'name=a', 'data.path=few'],
    ['reconstruct', 'runs/torn', 'few'],
    ['reconstruct', 'runs/run', 'missing.png'],
    ['reconstruct', 'runs/run', 'few', '-o', 'nowhere/out.png'],
    ['features', 'runs/torn', 'few'],
    ['features', 'runs/run', 'broken'],
    ['probe', 'runs/torn'],
    ['predict', 'runs/torn', 'few'],
    ['predict', 'runs/run', 'few'],
    ['serve', 'runs/torn', '--port', 0],
    ['import', 'text.pth', 'made'],
    ['import', 'none.pth', 'made'],
    ['import', DATA / 'finetune_vit.pth', 'runs'],
    ['export', 'runs/torn', 'out.pth'],
    ['export', 'runs/run', 'nowhere/out.pth'],
    ['export', 'runs/torn', 'out', '--format', 'symbol'],
    ['plot', 'few'],
    [*LAUNCH, '-s', 1, '--', *command(*PRETRAIN, 'name=torn')],
    [*LAUNCH, '-s', 1, '--', *command(*PRETRAIN, 'name=job', 'data.path=broken', 'data.max_broken=3',
                                      'data.val_fraction=0')],
    [*LAUNCH, '--horovod', '--', *command(*PRETRAIN, 'name=torn')],
]


def prepare(folder):
    """Images, a run, and one whose only checkpoint is torn."""
    noise(folder / 'few', 5)
    for path in noise(folder / 'broken', 40).iterdir():
        path.write_bytes(path.read_bytes()[:60])
    (folder / 'text.pth').write_text('hello')
    (folder / 'cut.rec').write_bytes(b'\x0a\x23\xd7\xce\xff\xff\x00\x00abc')
    (folder / 'file').write_text('')
    subprocess.run(command(*PRETRAIN, 'name=run'), cwd=folder, check=True, timeout=DEADLINE,
                   stderr=subprocess.DEVNULL)
    shutil.copytree(folder / 'runs' / 'run', folder / 'runs' / 'torn')
    with open(folder / 'runs' / 'torn' / 'checkpoints' / 'step-00000004' / 'weights.safetensors', 'r+b') as file:
        file.truncate(1000)


def attempt(words, folder):
    """What is wrong with how the command fails, '' if nothing is; and its seconds."""
    words = list(map(str, words if words[0] == sys.executable else command(*words)))
    began = time.monotonic()
    # Output into a file: a pipe would also wait for processes that the command has left.
    with open(folder / 'said', 'w+b') as said:
        process = subprocess.Popen(words, cwd=folder, stdin=subprocess.DEVNULL, stdout=said, stderr=said,
                                   start_new_session=True)
        try:
            status = process.wait(DEADLINE)
        except subprocess.TimeoutExpired:
            return f'still there after {DEADLINE} s\n{threads(process.pid)}\n{text(said)}', DEADLINE
        finally:
            if process.poll() is None:
                os.killpg(process.pid, 9)
                process.wait()
        seconds, output = time.monotonic() - began, text(said)
        silent = time.time() - os.fstat(said.fileno()).st_mtime
    if status not in (1, 2) or 'Traceback' in output or 'rror: ' not in output:
        return f'status {status}\n{output}', seconds
    return (f'ended {silent:.0f} s after its last word\n{output}' if silent > ENDS else ''), seconds


def text(file):
    file.seek(0)
    return file.read().decode(errors='replace')[-3000:]


def threads(pid):
    """Where the threads of a process are, as far as a debugger is here to tell."""
    for debugger in (['py-spy', 'dump', '--native', '-p'], ['gdb', '-batch', '-ex', 'thread apply all bt 12', '-p']):
        if shutil.which(debugger[0]):
            result = subprocess.run(debugger + [str(pid)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                    universal_newlines=True, timeout=60)
            if result.returncode == 0:
                return result.stdout
    return ''


def soak(folder, runs, seconds, commands=COMMANDS):
    """Rounds of all commands beside work on every core; returns what went wrong."""
    prepare(folder)
    load = [subprocess.Popen(['nice', sys.executable, '-c', 'while True: pass'])
            for _ in range(2 * len(os.sched_getaffinity(0)))]
    wrong, end, done, longest = [], time.monotonic() + seconds, 0, 0.0
    try:
        for _ in range(runs):
            for words in commands:
                if time.monotonic() > end:
                    break
                complaint, took = attempt(words, folder)
                done, longest = done + 1, max(longest, took)
                if complaint:
                    wrong.append(f'{" ".join(map(str, words[-6:]))}: {complaint}')
                    print(wrong[-1], flush=True)
    finally:
        for process in load:
            process.kill()
            process.wait()
    print(f'{done} failures of {len(commands)} commands, the longest took {longest:.1f} s; {len(wrong)} were wrong')
    return wrong


def test_every_failing_command_ends(tmp_path):
    assert soak(tmp_path, RUNS, SECONDS) == []


if __name__ == '__main__':
    chosen = [words for words in COMMANDS if ' '.join(sys.argv[2:]) in ' '.join(map(str, words))]
    with tempfile.TemporaryDirectory() as made:
        sys.exit(bool(soak(Path(made), int((sys.argv[1:] or [RUNS])[0]), 1e9, chosen)))
