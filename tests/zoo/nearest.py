"""Triton's interpreter, made to round to bfloat16 as a GPU does: it truncates, which is twice as far off."""

import torch
import triton.language as tl
from triton.runtime import interpreter

_convert = interpreter._convert_float


def _rounding(x, source, target, mode):
    if (source, target) != (tl.float32, tl.bfloat16):
        return _convert(x, source, target, mode)
    return torch.from_numpy(x).to(torch.bfloat16).view(torch.uint16).numpy()


def round_to_nearest():
    """For the rest of the process."""
    interpreter._convert_float = _rounding
