"""Leave half precision where rounding would tell, and take it where it pays."""

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """Return half-precision values in single precision, all others as they are.

    A uniform number is then neither 0 nor 1, and a loss of logits is not rounded again.
    """
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def bfloat16_pays(device: torch.device) -> bool:
    """Return whether bfloat16 is the faster choice: CUDA from Ampere on, or a CPU with AMX or AVX512_BF16."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    return device.type == "cpu" and (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())
