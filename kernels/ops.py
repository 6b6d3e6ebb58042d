"""The functions that a rule's algebra may use besides operators, for torch; Triton compiles its own instead.

Each takes tensors and plain numbers.
"""

from typing import Any

import torch
from torch import Tensor


def sqrt(x: Any) -> Any:
    return x.sqrt() if isinstance(x, Tensor) else x**0.5


def exp(x: Any) -> Any:
    return torch.exp(torch.as_tensor(x))


def log(x: Any) -> Any:
    return torch.log(torch.as_tensor(x))


def minimum(x: Any, y: Any) -> Any:
    if isinstance(x, Tensor) and isinstance(y, Tensor):
        return torch.minimum(x, y)
    if isinstance(x, Tensor):
        return x.clamp(max=y)
    return y.clamp(max=x) if isinstance(y, Tensor) else min(x, y)


def maximum(x: Any, y: Any) -> Any:
    return -minimum(-x, -y)


def where(condition: Any, x: Any, y: Any) -> Any:
    return torch.where(condition, x, y) if isinstance(condition, Tensor) else x if condition else y
