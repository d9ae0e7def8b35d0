"""View tensors in the order of their memory, so that a channels-last tensor is not copied."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

BLOCK = 1 << 16  # elements that a thread handles at once in plain code, so that scratch tensors stay in its cache


def memory_order(x: Tensor, first: int = 0) -> list[int]:
    """Return the dimensions from `first` on, from the largest stride to the smallest."""
    return sorted(range(first, x.dim()), key=x.stride, reverse=True)


def flatten(x: Tensor, first: int = 0) -> Tensor:
    """Return the dimensions from `first` on as one, in memory order: a view of a dense tensor, else a copy."""
    return x.permute(*range(first), *memory_order(x, first)).flatten(first)


def rows(x: Tensor) -> Tensor:
    """Return a row for each entry of the first dimension, in memory order: a view of a dense tensor, else a copy."""
    return flatten(x, 1) if x.dim() > 1 else x[:, None]


def unflatten(flat: Tensor, like: Tensor, first: int = 0) -> Tensor:
    """Return a view of `flat` with the shape and the memory order of the tensor it was flattened from."""
    order = memory_order(like, first)
    if not order:
        return flat.view(like.shape)
    back = [order.index(axis) + first for axis in range(first, like.dim())]
    return flat.unflatten(first, [like.shape[axis] for axis in order]).permute(*range(first), *back)


def like_layout(x: Tensor, like: Tensor) -> Tensor:
    """Return `x` in the memory order of another tensor of its shape: itself, or a copy."""
    return x if x.stride() == like.stride() else unflatten(x.new_empty(x.numel()), like).copy_(x)


def logical_index(shape: torch.Size, order: tuple[int, ...], device: torch.device) -> Int[Tensor, "count"]:
    """Return the logical (row-major) number of each element of a tensor, listed in memory order."""
    with torch.inference_mode(False):
        count = torch.arange(shape.numel(), dtype=torch.int32, device=device)
        return count.view(shape).permute(order).flatten()


def by_blocks(
    z: Float[Tensor, "*shape"], function: Callable[[Tensor], tuple[Tensor, ...]], count: int
) -> list[Float[Tensor, "*shape"]]:
    """Apply an elementwise function with `count` results, block by block on a CPU; keep the memory order."""
    flat = flatten(z.detach()) if z.dim() else z.detach().view(1)
    block = BLOCK * torch.get_num_threads()
    if z.device.type != "cpu" or flat.numel() <= block:
        return [unflatten(result, z) for result in function(flat)]
    results = [torch.empty_like(flat) for _ in range(count)]
    for start in range(0, flat.numel(), block):
        stop = start + block
        for result, part in zip(results, function(flat[start:stop]), strict=True):
            result[start:stop] = part
    return [unflatten(result, z) for result in results]
