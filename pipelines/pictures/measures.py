"""Measures of pictures: they take tensors (N, C, H, W) from 0 to 1 and return (N,)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

EQUAL = 100.0
"""The dB of a picture that equals its reference. Infinity would spoil a mean."""

PSNR = "PSNR is the mean of the pictures' dB; they are compared as decoded, in floats"
"""The sentence under every table of PSNR."""


def tensor_of(pictures: Sequence[Any]) -> Tensor:
    """(N, 3, H, W) from 0 to 1, from images, or from tensors (3, H, W) already in this form."""
    if isinstance(pictures[0], Tensor):
        return torch.stack([picture.float().cpu() for picture in pictures])
    whole = np.stack([np.asarray(picture.convert("RGB")) for picture in pictures])
    return torch.from_numpy(whole).permute(0, 3, 1, 2).float() / 255


# Against a reference


def psnr(pictures: Tensor, reference: Tensor) -> Tensor:
    """Peak signal to noise ratio in dB; at most `EQUAL`.

    It is measured on floats as the pipeline decoded them, before they are rounded to 8 bits. The PSNR of several
    pictures is the mean of these numbers, so that one very different picture does not drown the others.
    """
    error = (pictures - reference).square().flatten(1).mean(1)
    return -10 * error.clamp(min=10 ** (-EQUAL / 10)).log10()


def ssim(pictures: Tensor, reference: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004)."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    found = structural_similarity_index_measure(pictures, reference, data_range=1.0, reduction="none")
    return torch.as_tensor(found)


def lpips_network() -> Any:
    """LPIPS (Zhang et al. 2018), the mean over a batch. Its weights are downloaded if missing."""
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    return LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True).eval()


# Without a reference


def saturation(pictures: Tensor) -> Tensor:
    """HSV saturation."""
    high, low = pictures.amax(1), pictures.amin(1)
    return ((high - low) / high.clamp(min=1e-8)).flatten(1).mean(1)


def contrast(pictures: Tensor) -> Tensor:
    """Standard deviation of the luma."""
    luma = torch.einsum("nchw,c->nhw", pictures, torch.tensor([0.299, 0.587, 0.114]))
    return luma.flatten(1).std(1, correction=0)


def clipped(pictures: Tensor) -> Tensor:
    """The share of pixels with a channel at 0 or 1, without white and black ones (a plain background)."""
    at_end = (pictures <= 0.25 / 255) | (pictures >= 1 - 0.25 / 255)
    plain = (pictures <= 0.25 / 255).all(1) | (pictures >= 1 - 0.25 / 255).all(1)
    return (at_end.any(1) & ~plain).flatten(1).float().mean(1)
