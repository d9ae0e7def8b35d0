"""Make room for decoded images: in memory, or beyond a limit in a mapped file, so that a set may exceed the memory."""

import shutil
import tempfile
from math import prod

import numpy as np
import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from bitquorum.data.sources import data_root
from bitquorum.interface import DataError

LIMIT = 1 << 30
"""Bytes from which on images are mapped; the system then keeps in memory what is in use and has room."""


def room(shape: tuple[int, ...], dtype: torch.dtype = torch.uint8) -> Shaped[Tensor, "..."]:
    """Return a tensor whose content is undefined, or zero where it is mapped.

    The file lies where `$BITQUORUM_DATA` says, by default in `~/.cache/bitquorum/data`, has no name, and is gone when
    the tensor is.

    Args:
        shape: Of the tensor.
        dtype: `uint8` or `float32`.

    Raises:
        DataError: if the disk has less room than the images need.
    """
    size = prod(shape) * dtype.itemsize
    if size <= LIMIT:
        return torch.empty(shape, dtype=dtype)
    folder = data_root()
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < size:
        raise DataError(
            f"expected {size / 2**30:.1f} GiB free in {folder} to unpack the images to, got {free / 2**30:.1f}; "
            "let BITQUORUM_DATA name a folder on a larger disk"
        )
    with tempfile.TemporaryFile(dir=folder) as file:
        kind = np.uint8 if dtype == torch.uint8 else np.float32
        return torch.from_numpy(np.memmap(file, dtype=kind, mode="w+", shape=shape))


def gather(images: Shaped[Tensor, "examples ..."], rows: Int[Tensor, "count"]) -> Shaped[Tensor, "count ..."]:
    """Return a copy of some images, itself mapped where it is large."""
    size = len(rows) * prod(images.shape[1:]) * images.dtype.itemsize
    if size <= LIMIT or images.device.type != "cpu":
        return images[rows]
    return torch.index_select(images, 0, rows, out=room((len(rows), *images.shape[1:]), images.dtype))
