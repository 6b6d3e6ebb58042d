"""Tests run offline, on the installed package: the checkout itself is kept off the import path.

Started as `python -m pytest`, Python would find the checkout's folder `kernels/` before Hugging Face's package
of that name, which diffusers and transformers import where it is installed.
"""

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

_CHECKOUT = Path(__file__).resolve().parents[1]
sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != _CHECKOUT]

import pytest  # noqa: E402 (may load the wrong folder before the path is set)
import torch  # noqa: E402


@pytest.fixture
def seed() -> int:
    """A fresh seed, printed where a test fails; torch is seeded with it."""
    value = int(torch.randint(2**31, ()))
    print("seed", value)
    torch.manual_seed(value)
    return value
