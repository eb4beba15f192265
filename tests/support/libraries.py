"""Small models of timm and Hugging Face, run by a Python that has PyTorch and them, never imported by a test.

    python libraries.py record ../data/names.npz      writes each one's weights, an image and what it makes of it
    python libraries.py check FOLDER                  loads FOLDER/MODEL.pth or FOLDER/MODEL/ strictly, and prints the
                                                      largest difference between its output and FOLDER/MODEL.npz
"""
import json
import sys
from pathlib import Path

import numpy as np
import torch
from timm.models.beit import Beit
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from transformers import (
    BeitConfig,
    BeitForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    SwinForMaskedImageModeling,
    ViTConfig,
    ViTForImageClassification,
    ViTForMaskedImageModeling,
)

VIT = dict(img_size=16, patch_size=4, embed_dim=12, depth=2, num_heads=2, num_classes=3)
SWIN = dict(img_size=16, patch_size=2, embed_dim=8, depths=[2, 1], num_heads=[1, 2], window_size=4)
HF_VIT = dict(image_size=16, patch_size=4, hidden_size=12, num_hidden_layers=2, num_attention_heads=2,
              intermediate_size=48, num_labels=3, layer_norm_eps=1e-6)
HF_SWIN = dict(image_size=16, patch_size=2, embed_dim=8, depths=[2, 1], num_heads=[1, 2], window_size=4, num_labels=3)
MODELS = {
    'timm_vit': lambda: VisionTransformer(**VIT, init_values=0.1),
    'timm_vit_mean': lambda: VisionTransformer(**VIT, global_pool='avg', no_embed_class=True),
    'timm_beit': lambda: Beit(**VIT, init_values=0.1, use_abs_pos_emb=False, use_shared_rel_pos_bias=True),
    'timm_swin': lambda: SwinTransformer(**SWIN, num_classes=3),
    'hf_vit': lambda: ViTForImageClassification(ViTConfig(**HF_VIT)),
    'hf_vit_simmim': lambda: ViTForMaskedImageModeling(ViTConfig(**HF_VIT, encoder_stride=4)),
    'hf_beit': lambda: BeitForImageClassification(BeitConfig(**HF_VIT, use_relative_position_bias=True)),
    'hf_swin': lambda: SwinForImageClassification(SwinConfig(**HF_SWIN)),
    'hf_swin_simmim': lambda: SwinForMaskedImageModeling(SwinConfig(**HF_SWIN, encoder_stride=4)),
}


def output(model: torch.nn.Module, image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Logits (B, classes), or the loss of masked image modelling (1,)."""
    image, mask = torch.tensor(image), torch.tensor(mask).flatten(1).bool()
    with torch.no_grad():
        if type(model).__name__.endswith('MaskedImageModeling'):
            return model(image, bool_masked_pos=mask).loss.reshape(1).numpy()
        made = model(image)
    return (made if isinstance(made, torch.Tensor) else made.logits).numpy()


def record(path: Path) -> None:
    rng, arrays = np.random.default_rng(4), {}
    for name, build in MODELS.items():
        torch.manual_seed(4)
        model = build().eval()
        for parameter in model.parameters():
            parameter.data.normal_(0, 0.3)
        side = 4 if 'vit' in name or 'beit' in name else 8
        image = rng.standard_normal((2, 3, 16, 16)).astype('float32')
        mask = np.kron(rng.random((2, 4, 4)) < 0.6, np.ones((side // 4,) * 2)).astype('uint8')
        if name.startswith('hf_'):  # the files' names, which are not those of the classes
            model.save_pretrained(path.parent / 'hf')
            from safetensors.numpy import load_file
            weights = load_file(path.parent / 'hf' / 'model.safetensors')
            renamed = {key: next(name for name, array in weights.items() if np.array_equal(array, value.numpy()))
                       for key, value in model.state_dict().items()}
            arrays[f'{name}/renamed'] = np.array(json.dumps(renamed))
        else:
            weights = {key: value.numpy() for key, value in model.state_dict().items()}
        arrays.update({f'{name}/weights/{key}': value for key, value in weights.items()})
        arrays.update({f'{name}/image': image, f'{name}/mask': mask, f'{name}/output': output(model, image, mask)})
    np.savez_compressed(path, **arrays)


def check(folder: Path) -> None:
    differences = {}
    for file in sorted(folder.glob('*.npz')):
        given, model = np.load(file), MODELS[file.stem]()
        if file.stem.startswith('hf_'):
            model.config.save_pretrained(folder / file.stem)
            model, info = type(model).from_pretrained(folder / file.stem, output_loading_info=True)
            assert not info['missing_keys'] and not info['unexpected_keys'], (file.stem, info)
        else:
            weights = torch.load(folder / f'{file.stem}.pth', weights_only=True)['model']
            model.load_state_dict(weights, strict=True)
        made = output(model.eval(), given['image'], given['mask'])
        differences[file.stem] = float(np.abs(made - given['output']).max())
    print(json.dumps(differences))


if __name__ == '__main__':
    {'record': record, 'check': check}[sys.argv[1]](Path(sys.argv[2]))
