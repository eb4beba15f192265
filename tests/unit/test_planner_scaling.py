"""The page about scaling shows what the code computes, and the curves on it are those of closed forms."""
import importlib.util
import re
import shlex
from pathlib import Path

import pytest
from support.running import rounds

from mxsimmim import cli
from mxsimmim.planner import costs, model

pytestmark = pytest.mark.unmeasured

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / 'docs' / 'scaling.md').read_text()


@pytest.fixture
def scaling(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / 'tools' / 'bench'))
    spec = importlib.util.spec_from_file_location('bench_scaling', ROOT / 'tools' / 'bench' / 'scaling.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.soak
def test_tables_of_the_page(scaling, monkeypatch):
    """Lines of 8 and 4,096 devices; in `make soak` all."""
    monkeypatch.setattr(scaling, 'SIZES', rounds((8, 4096), scaling.SIZES))
    for lines in scaling.tables():
        for text in rounds(lines, ['\n'.join(lines)]):
            assert f'\n{text}\n' in PAGE, f'not on the page: {text}: run tools/bench/scaling.py docs/scaling.png'


def test_example_of_the_page(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    command, shown = re.search(r'^```sh\n(mxsimmim plan .*?)\n```\n\n```text\n(.*?)^```', PAGE, re.S | re.M).groups()
    assert cli.main(shlex.split(command)[1:]) == 0
    assert capsys.readouterr().out == shown


def test_published_curves_in_closed_form(scaling):
    rows = {row.name: row for row in scaling.PUBLISHED}
    row = rows['MXNet, ResNet-152, 256 GPUs']
    assert row.efficiency == pytest.approx(0.9008, abs=1e-4)
    alone, wire, late = scaling.data_parallel(row)
    inside, between = 2 * 15 / 16 * 240e6 / 0.625e9, 2 * 15 / 16 * 240e6 / 2.5e9
    assert alone == pytest.approx(32 / 20.08)
    assert wire == pytest.approx(inside + between, rel=1e-2)
    assert late == pytest.approx(wire / scaling.MESSAGES, rel=1e-6)  # the last message: all others are hidden
    _, wire, late = scaling.data_parallel(rows['Horovod, VGG-16, 512 GPUs'])
    assert wire == pytest.approx(2 * 511 / 512 * 553.44e6 / 3.125e9, rel=3e-1)  # and its messages' latencies
    backward = 2 / 3 * 64 / 154
    assert late == pytest.approx(wire - backward * 49 / 50, rel=1e-6)


def test_the_largest_network_on_paper(scaling):
    config = scaling.configured('ViT-22B/14', 4)
    parts = model.segments(config.model, config.mask, costs.form_of(config, scaling.machines(1)))
    assert model.parameters(parts) / 1e9 == pytest.approx(21.8, abs=0.05)
    assert f'{16 * model.parameters(parts) / 1e9:.0f} GB' in PAGE
    with pytest.raises(ValueError, match='no layout fits: a device has 80.0 GB, and the least that any needs is '):
        scaling.predicted('ViT-22B/14', 1, 4)
    kept = sum(part.kept() for part in model.segments(scaling.configured('ViT-L/16', 1).model, config.mask,
                                                      model.Form())[1])
    assert kept == 4 * 10 * 197 * 1024  # ten arrays of (tokens, width), as the page says
    network = scaling.configured('ViT-L/16', 1).model
    for rate, arrays in ((0.0, 26), (0.1, 28)):
        block = model.segments(network.model_copy(update={'drop_path': rate}), config.mask, model.Form(native=False))[1]
        inputs, scores = sum(part.inputs for part in block), 4 * 197 * 197 * 16
        inside = sum(part.kept() for part in block) - inputs
        assert inputs + inside / model.REFERENCE - scores == pytest.approx(4 * arrays * 197 * 1024)
