"""runtime.precision and model.recompute, as a user sets them."""
import os
import subprocess

import pytest
from support import machine
from support.running import BASE, DEADLINE, DIGITS, command, metrics, rounds, weights
from support.tiny import TINY

pytestmark = pytest.mark.unmeasured

SHORT = [*TINY, 'train.length=20', 'optim.milestones=[15]']
WITHOUT = {**os.environ, 'MXSIMMIM_LIBRARY': '/nowhere/libmxsimmim.so'}


def pretrain(folder, *arguments, **keys):
    return subprocess.run(command('pretrain', *arguments), cwd=folder, timeout=4 * DEADLINE, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, universal_newlines=True, **keys)


@pytest.mark.soak
def test_digits_in_bf16_end_where_float32_does(tmp_path):
    """The demo, a fifth of its epochs (here two)."""
    losses = {}
    for precision in ('float32', 'bf16'):
        done = pretrain(tmp_path, DIGITS, f'name={precision}', f'runtime.precision={precision}',
                        f'train.length={rounds(2, 10)} epochs', 'optim.warmup=1 epochs', 'validation.pictures=1')
        if precision == 'bf16' and 'bf16' not in machine.PRECISIONS:  # a CPU without AVX-512 says so
            assert done.returncode == 1 and "key 'runtime.precision': bf16 needs " in done.stdout, done.stdout
            assert 'write runtime.precision=float32' in done.stdout and 'Traceback' not in done.stdout, done.stdout
            return
        assert done.returncode == 0, done.stdout
        assert f', {precision}' in done.stdout
        losses[precision] = metrics(tmp_path / 'runs' / precision)[-1]['val_loss']
    print(losses)
    assert abs(losses['bf16'] / losses['float32'] - 1) < 0.02, losses


@machine.natively
def test_recomputing_changes_nothing(tmp_path):
    for name in ('plain', 'recompute'):
        done = pretrain(tmp_path, BASE, *SHORT, f'name={name}', f'model.recompute={name == "recompute"}')
        assert done.returncode == 0, done.stdout
    assert weights(tmp_path / 'runs' / 'plain') == weights(tmp_path / 'runs' / 'recompute')


def test_without_the_library(tmp_path):
    """The same run to the last digits shown, and a word about why it is slower."""
    done = pretrain(tmp_path, BASE, *SHORT, 'name=without', env=WITHOUT)
    assert done.returncode == 0 and 'operators: reference' in done.stdout, done.stdout
    assert pretrain(tmp_path, BASE, *SHORT, 'name=with').returncode == 0
    without, with_it = (metrics(tmp_path / 'runs' / name) for name in ('without', 'with'))
    for a, b in zip(without, with_it):
        assert a.keys() == b.keys()
        assert all(a[key] == pytest.approx(b[key], rel=1e-4) for key in a), (a, b)


@pytest.mark.parametrize('asks, remedy', [('runtime.precision=bf16', 'runtime.precision=float32'),
                                          ('model.recompute=true', 'model.recompute=false')])
def test_what_only_the_library_can_do(tmp_path, asks, remedy):
    done = pretrain(tmp_path, BASE, *TINY, 'name=run', asks, env=WITHOUT)
    assert done.returncode and remedy in done.stdout and 'Traceback' not in done.stdout, done.stdout
