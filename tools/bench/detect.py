#!/usr/bin/env python
"""Time of a training step of Mask R-CNN on Swin-T, forward and backward, beside torchvision's with the same sizes.

Both see random images with the same objects, and sample as many anchors, proposals and boxes. They are processes that
take turns, so that whatever else the machine does meets both alike; the ratio is the median over the turns. PyTorch and
torchvision may be installed elsewhere:

    python tools/bench/detect.py --torch-python ~/torch/bin/python

Prints a table for docs/benchmarks.md. Needs some 8 GB; takes some 5 minutes.
"""
import argparse
import contextlib
import json
import statistics
import sys
from typing import Any, Dict, List

from common import MODELS, OURS, PRECISIONS, Worker, describe, require_torch
from turns import Side, serve

THEIRS = 'torchvision'
SWIN_TINY = dict(MODELS['swin_base'], embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24), window_size=7)
CLASSES, WIDTH = 80, 256
OBJECTS = 8  # of an image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--side', type=int, default=512, help='height and width of the images, pixels (default: 512)')
    parser.add_argument('--batch', type=int, default=2, help='images a step (default: 2)')
    parser.add_argument('--precision', choices=PRECISIONS, nargs='+', default=[*PRECISIONS], metavar='PRECISION',
                        help=f'of our products, of {", ".join(PRECISIONS)} (default: both); torchvision: float32')
    parser.add_argument('--threads', type=int, default=0, help='of both programs (default: one a core)')
    parser.add_argument('--rounds', type=int, default=5, help='turns of each program (default: 5)')
    parser.add_argument('--torch-python', default=sys.executable, metavar='PATH',
                        help='interpreter that has PyTorch and torchvision (default: this one)')
    parser.add_argument('--worker', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        build = torch_worker if args.worker == THEIRS else our_worker
        return serve(build(json.loads(sys.stdin.readline())))
    from mxsimmim.runtime import facts
    require_torch(args.torch_python)
    machine = facts.collect()
    args.threads = args.threads or machine.cores
    print(f'{describe(machine, args.threads)}; median of {args.rounds} turns\n\n| Mask R-CNN, Swin-T, {args.side}, '
          f'batch {args.batch} | s/step | mxsimmim is | peak memory, GB |\n|---|--:|--:|--:|', flush=True)
    for line in measure(args):
        print(line)


def measure(args: argparse.Namespace) -> List[str]:
    """Let the programs take turns; return the lines of the table."""
    task = dict(side=args.side, objects=objects(args.batch, args.side), threads=args.threads)
    with contextlib.ExitStack() as stack:
        theirs = stack.enter_context(Side(THEIRS, args.torch_python, __file__, task, args.threads))
        ours = [stack.enter_context(Side(OURS, sys.executable, __file__, {**task, 'precision': precision},
                                         args.threads)) for precision in args.precision]
        seconds: List[List[float]] = [[each.run(1) for each in (theirs, *ours)] for _ in range(args.rounds)]
        lines = [f'| {theirs.version}, float32 | {statistics.median(row[0] for row in seconds):.2f} | '
                 f'| {theirs.peak:.1f} |']
        for number, (side, precision) in enumerate(zip(ours, args.precision), 1):
            ratio = statistics.median(row[0] / row[number] for row in seconds)
            lines.append(f'| mxsimmim ({side.version}), {precision} | '
                         f'{statistics.median(row[number] for row in seconds):.2f} | {ratio:.2f} times as fast '
                         f'| {side.peak:.1f} |')
    return lines


def objects(images: int, side: int) -> List[List[List[float]]]:
    """Boxes of objects in each image, of an eighth to a half of its side, and their classes: (B, OBJECTS, 5)."""
    import numpy as np
    rng = np.random.default_rng(0)
    sizes = side * rng.uniform(1 / 8, 1 / 2, (images, OBJECTS, 2))
    corners = rng.uniform(size=sizes.shape) * (side - sizes)
    classes = rng.integers(0, CLASSES, (images, OBJECTS, 1))
    return np.concatenate([corners, corners + sizes, classes], axis=2).tolist()


def our_worker(task: Dict[str, Any]) -> Worker:
    """The project's detector on one device, on the best operators of this machine."""
    from mxsimmim import config as cfg
    from mxsimmim.runtime import environment
    environment.prepare(cfg.RuntimeConfig(threads=task['threads']))
    import mxnet as mx
    import numpy as np

    from mxsimmim.data.loader import Batch
    from mxsimmim.models import build_detector, named_parameters
    from mxsimmim.ops import select_backend
    from mxsimmim.parallel.placement import Replicated

    model = cfg.ModelConfig(**{**SWIN_TINY, 'img_size': task['side'], 'head_channels': WIDTH})
    net = build_detector(model, CLASSES, 0, select_backend(task['precision'], [mx.cpu()]))
    placement, rng = Replicated(net, [mx.cpu()]), np.random.default_rng(0)
    known, most = np.array(task['objects']), cfg.model.OBJECTS
    fill = (0, 0), (0, most - OBJECTS)
    images = len(known)
    batch = Batch({
        'image': rng.integers(0, 256, (images, *model.size, 3), np.uint8),
        'boxes': np.pad(known[..., :4], (*fill, (0, 0))).astype('float32'),
        'classes': np.pad(known[..., 4], fill, constant_values=-1).astype('int32'),
        'crowd': np.zeros((images, most), np.uint8),
        'masks': np.ones((images, most, cfg.model.MASK_SIDE, cfg.model.MASK_SIDE), np.uint8),
        'priority': rng.random((images, model.candidates[0] + most), np.float32)}, 0, np.arange(images))

    def step() -> None:
        placement.forward_backward(batch, images)

    return Worker(step, mx.nd.waitall, sum(int(np.prod(p.shape)) for p in named_parameters(net).values()),
                  f'MXNet {mx.__version__}')


def torch_worker(task: Dict[str, Any]) -> Worker:
    """torchvision's Mask R-CNN on its own Swin-T, with our numbers of proposals."""
    import torch
    import torchvision
    from torchvision.models.detection import MaskRCNN
    from torchvision.models.swin_transformer import SwinTransformer
    from torchvision.ops import FeaturePyramidNetwork
    from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

    torch.set_num_threads(task['threads'])
    torch.manual_seed(0)
    widths = [96, 192, 384, 768]

    class Backbone(torch.nn.Module):
        out_channels = WIDTH

        def __init__(self) -> None:
            super().__init__()
            shape = [SWIN_TINY[key] for key in ('embed_dim', 'depths', 'num_heads')]
            self.body = SwinTransformer([4, 4], *shape, [7, 7], stochastic_depth_prob=0.0).features
            self.norms = torch.nn.ModuleList(torch.nn.LayerNorm(width) for width in widths)
            self.fpn = FeaturePyramidNetwork(widths, WIDTH, extra_blocks=LastLevelMaxPool())

        def forward(self, x: torch.Tensor) -> Dict[str, torch.Tensor]:
            maps = {}
            for number, layer in enumerate(self.body):
                x = layer(x)
                if number % 2:
                    maps[str(number // 2)] = self.norms[number // 2](x).permute(0, 3, 1, 2)
            return self.fpn(maps)

    side, rng = task['side'], torch.Generator().manual_seed(0)
    net = MaskRCNN(Backbone(), CLASSES + 1, min_size=side, max_size=side, rpn_pre_nms_top_n_train=1000,
                   rpn_post_nms_top_n_train=1000, rpn_anchor_generator=torchvision.models.detection.anchor_utils.
                   AnchorGenerator(tuple((8 * 4 * 2 ** level,) for level in range(5)), ((0.5, 1.0, 2.0),) * 5))
    net.train()
    images = [torch.rand(3, side, side, generator=rng) for _ in task['objects']]
    targets = []
    for known in torch.tensor(task['objects']):
        boxes = known[:, :4]
        x = torch.arange(side) + 0.5
        masks = (((x > boxes[:, :1]) & (x < boxes[:, 2:3])).unsqueeze(1)
                 & ((x > boxes[:, 1:2]) & (x < boxes[:, 3:4])).unsqueeze(2))
        targets.append(dict(boxes=boxes, labels=known[:, 4].long() + 1, masks=masks.to(torch.uint8)))

    def step() -> None:
        net.zero_grad(set_to_none=True)
        sum(net(images, targets).values()).backward()

    return Worker(step, lambda: None, sum(p.numel() for p in net.parameters()),
                  f'torchvision {torchvision.__version__}, PyTorch {torch.__version__}')


if __name__ == '__main__':
    main()
