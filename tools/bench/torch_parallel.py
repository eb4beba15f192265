"""`torch_simmim` divided between processes that PyTorch's Gloo joins: what `parallel.py` measures the project against.

A ViT's parts stay in the model that they are taken from; parameters that a process does not hold need no gradient.
"""
from typing import Any, Callable, List, NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch_simmim import SimMIM, replace_masked


class Part(NamedTuple):
    """What a process computes of a step, and the parameters whose gradients count in the norm here."""
    forward_backward: Callable[[], Any]
    counted: List[nn.Parameter]


def whole(model: SimMIM, image: Tensor, mask: Tensor) -> Part:
    """One process."""
    return Part(lambda: model(image, mask).backward(), list(model.parameters()))


def stage_of(model: SimMIM, image: Tensor, mask: Tensor, rank: int, micro_batches: int) -> Part:
    """One of two stages under 1F1B, the blocks cut in the middle; the shared table's gradient is summed over them."""
    side, grid, size = image.shape[-1], mask.shape[-1], 2
    table = model.encoder.rel_pos_bias.relative_position_bias_table

    def error(tokens: Tensor, target: Tensor) -> Tensor:
        """The loss of the model, whose encoder's tokens are there; target (B, 4, S, S) is image and mask."""
        model.encoder.forward = lambda *_: tokens
        scale = side // grid
        return model(target[:, :3], target[:, 3, ::scale, ::scale])

    stage = (_Last if rank else _First)(model)
    schedule = Schedule1F1B(PipelineStage(stage, rank, size, torch.device('cpu')), micro_batches, loss_fn=error)
    hidden = mask.float().repeat_interleave(side // grid, 1).repeat_interleave(side // grid, 2).unsqueeze(1)
    target = torch.cat([image, hidden], 1)
    kept = {id(p) for p in stage.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in kept:
            parameter.requires_grad_(False)
            parameter.data = torch.empty(0)

    def forward_backward() -> None:
        schedule.step(image, mask) if rank == 0 else schedule.step(target=target)
        distributed.all_reduce(table.grad)

    return Part(forward_backward, [p for p in stage.parameters() if p is not table or rank == 0])


class _First(nn.Module):
    """Embedding and the first half of the blocks."""

    def __init__(self, model: SimMIM) -> None:
        super().__init__()
        encoder = model.encoder
        self.patch_embed, self.cls_token, self.mask_token = encoder.patch_embed, encoder.cls_token, encoder.mask_token
        self.rel_pos_bias, self.blocks = encoder.rel_pos_bias, encoder.blocks[:len(encoder.blocks) // 2]

    def forward(self, image: Tensor, mask: Tensor) -> Tensor:
        x = replace_masked(self.patch_embed(image), mask.flatten(1).to(image.dtype), self.mask_token)
        x, bias = torch.cat((self.cls_token.expand(len(x), -1, -1), x), 1), self.rel_pos_bias()
        for block in self.blocks:
            x = block(x, bias)
        return x


class _Last(nn.Module):
    """The last half of the blocks and the norm; the decoder is used by the loss."""

    def __init__(self, model: SimMIM) -> None:
        super().__init__()
        encoder = model.encoder
        self.rel_pos_bias, self.blocks = encoder.rel_pos_bias, encoder.blocks[len(encoder.blocks) // 2:]
        self.norm, self.decoder = encoder.norm, model.decoder

    def forward(self, x: Tensor) -> Tensor:
        bias = self.rel_pos_bias()
        for block in self.blocks:
            x = block(x, bias)
        return self.norm(x)[:, 1:]


def part_of(model: SimMIM, image: Tensor, mask: Tensor, rank: int, size: int) -> Part:
    """Some heads and hidden channels of every block (Shoeybi et al. 2019, arXiv:1909.08053), the rest on all.

    Written by hand, as what `torch.distributed.tensor.parallel` does costs the same sums and more copies: sums are in
    place, and a bias that is added once is added in its product, by rank 0.
    """
    encoder = model.encoder
    cut = [encoder.rel_pos_bias.relative_position_bias_table]
    _keep(cut[0], cut[0].chunk(size, 1)[rank])
    for block in encoder.blocks:
        attention, mlp = block.attn, block.mlp
        attention.heads //= size
        qkv = attention.qkv.weight
        _keep(qkv, qkv.unflatten(0, (3, size, -1))[:, rank].flatten(0, 1))
        rows = [attention.q_bias, attention.v_bias, mlp.fc1.weight, mlp.fc1.bias]
        columns = [attention.proj.weight, mlp.fc2.weight]
        for parameter in rows:
            _keep(parameter, parameter.chunk(size)[rank])
        for parameter in columns:
            _keep(parameter, parameter.chunk(size, 1)[rank])
        cut += [qkv, *rows, *columns]
        for last in (attention.proj, mlp.fc2):
            if rank:
                last.bias = None
            last.register_forward_hook(lambda module, given, output: _Summed.apply(output))
        for norm in (block.norm1, block.norm2):
            norm.register_forward_hook(lambda module, given, output: _Copied.apply(output))
    return Part(lambda: model(image, mask).backward(), list(model.parameters()) if rank == 0 else cut)


class _Copied(torch.autograd.Function):
    """x; its gradient is the sum of all processes'."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        distributed.all_reduce(gradient)
        return gradient


class _Summed(torch.autograd.Function):
    """The sum of all processes' x, in its place; each gets the sum's gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        distributed.all_reduce(x)
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def _keep(parameter: nn.Parameter, part: Tensor) -> None:
    parameter.data = part.detach().clone()


def clip(counted: List[nn.Parameter], parameters: List[nn.Parameter], most: float) -> None:
    """Clip the norm of the whole model, which processes hold in parts."""
    squares = torch.stack(torch._foreach_norm([p.grad for p in counted])).square().sum()
    distributed.all_reduce(squares)
    torch._foreach_mul_([p.grad for p in parameters], (most / (squares.sqrt() + 1e-6)).clamp(max=1))
