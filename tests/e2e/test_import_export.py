"""Weights in and out by command, and what the run they make is good for."""
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

DATA = Path(__file__).parents[1] / 'data'


@pytest.mark.parametrize('kind, cell', [('vit', 16), ('swin', 32)])
def test_an_official_checkpoint_becomes_a_run_and_goes_out_again(here, tmp_path, kind, cell):
    file = DATA / f'finetune_{kind}.pth'
    said = here('import', file, 'runs/official', f'mask.patch_size={cell}').stdout
    assert said.startswith(f'runs/official: {kind}, pre-trained, ') and 'assumed' not in said
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (80, 70, 3), dtype='uint8')).save(tmp_path / 'a.png')
    here('reconstruct', 'runs/official', 'a.png', '-o', 'grid.png')
    assert Image.open(tmp_path / 'grid.png').width > 96
    assert here('export', 'runs/official', 'out.pth').stdout.startswith('out.pth: ')
    said = here('export', 'runs/official', 'timm.safetensors', '--names', 'timm').stdout
    assert 'left out, since timm has no counterpart: decoder.0.weight' in said
    here('import', 'out.pth', 'runs/again', f'mask.patch_size={cell}')
    weights = [tmp_path / 'runs' / run / 'checkpoints/step-00000000/weights.safetensors'
               for run in ('official', 'again')]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_the_fine_tuning_of_an_imported_run(mxsimmim):
    mxsimmim('import', DATA / 'finetune_vit.pth', 'runs/official', 'mask.patch_size=16')
    said = mxsimmim('finetune', DATA.parents[1] / 'conf' / 'finetune_digits.yaml', 'model.pretrained=runs/official',
                    'model.img_size=32', 'model.patch_size=8', 'model.embed_dim=36', 'model.depth=3',
                    'model.num_heads=3', 'model.use_ape=false', 'model.use_rpb=true', 'model.init_values=0.1',
                    'train.length=2', 'optim.warmup=1', 'train.batch_size=8',
                    'validation.images=16', 'runtime.threads=1')
    assert 'runs/official' in said.stdout + said.stderr


def test_errors_are_one_line_and_leave_nothing(here, tmp_path):
    file = DATA / 'finetune_vit.pth'
    (tmp_path / 'poisoned.pth').write_bytes(b'\x80\x02cos\nsystem\nX\x0c\x00\x00\x00touch marker\x85R.')
    (tmp_path / 'whole').mkdir()
    (tmp_path / 'whole' / 'notes.txt').write_text('mine')
    for arguments, status, words in [
            (['import', 'poisoned.pth', 'run'], 1, "poisoned.pth would run 'os.system'"),
            (['import', 'none.pth', 'run'], 1, 'none.pth: cannot be read: No such file'),
            (['import', file, 'whole'], 1, 'whole exists already: give a new folder'),
            (['import', file, 'run', 'model.heads=3'], 2, "unknown key 'model.heads'"),
            (['export', 'run', 'out.pth'], 1, 'run'), (['export', 'run', 'out.pth', '--int8'], 1, 'run')]:
        said = here(*arguments, status=status).stderr
        assert words in said and 'Traceback' not in said
    assert not (tmp_path / 'marker').exists() and not (tmp_path / 'run').exists()
    assert [path.name for path in (tmp_path / 'whole').iterdir()] == ['notes.txt']
