"""Signed commands, and where keys lie."""
import os

import pytest

from mxsimmim.parallel import protocol

KEY = bytes(range(32))


def test_a_command_comes_back():
    number, command = protocol.opened(protocol.sign({'updates': 7, 'name': 'ä'}, 3, KEY), 2, KEY)
    assert (number, command) == (3, {'updates': 7, 'name': 'ä'})


@pytest.mark.parametrize('body', [
    '', 'x', 'cos\nsystem\n(S"true"\ntR.', protocol.sign({}, 5, b'another key, as long as 16 bytes'),
    protocol.sign({}, 5, KEY)[:-1] + '0', '0' + protocol.sign({}, 5, KEY)[1:], '\udcff' * 70])
def test_what_is_not_signed_with_the_key_is_not_read(body):
    with pytest.raises(ValueError, match='not signed'):
        protocol.opened(body, 0, KEY)


def test_a_command_counts_once():
    body = protocol.sign({}, 5, KEY)
    last, _ = protocol.opened(body, 4, KEY)
    with pytest.raises(ValueError, match='number 5 came again'):
        protocol.opened(body, last, KEY)


@pytest.mark.parametrize('servers', [1, 2, 3, 7])
@pytest.mark.parametrize('weights', [1, 10, 151])
def test_a_weight_and_its_moments_lie_on_one_server(weights, servers):
    layout = protocol.Layout(weights, 2, servers)
    keys = [[kind * layout.stride + weight for kind in range(3)] for weight in range(weights)]
    assert len({key for group in keys for key in group} | {layout.board}) == 3 * weights + 1
    assert max(map(max, keys)) < layout.board < 1 << 20
    for group in keys:  # where MXNet puts an array that it does not cut up
        assert len({key * 9973 % servers for key in group}) == 1


def test_the_key_file(tmp_path):
    path = tmp_path / 'key'
    environ = {protocol.KEY_FILE: str(path)}
    with pytest.raises(ValueError, match='MXSIMMIM_KEY_FILE is not set.*tools/launch.py'):
        protocol.job_key({})
    with pytest.raises(ValueError, match=f'{path}: cannot be read: No such file'):
        protocol.job_key(environ)
    path.write_text(KEY.hex())
    os.chmod(path, 0o640)
    with pytest.raises(ValueError, match=f'chmod 600 {path}'):
        protocol.job_key(environ)
    os.chmod(path, 0o600)
    assert protocol.job_key(environ) == KEY
    path.write_text('abcd')
    with pytest.raises(ValueError, match='at least 16 bytes'):
        protocol.job_key(environ)
