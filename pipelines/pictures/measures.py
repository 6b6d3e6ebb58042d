"""How close a policy comes to full guidance: the same prompts and seeds with and without it, compared as pictures."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from diffusers_guidance.pipelines.attach.attach import borrowed
from diffusers_guidance.pipelines.pictures.texts import negatives_of, prompts_of
from diffusers_guidance.policies import EveryStep, Policy
from diffusers_guidance.rules import CFG

EQUAL = 100.0
"""dB of a picture that is its reference: what would be infinite has no part in a mean."""


class Score(NamedTuple):
    """Means over pictures; PSNR in dB, SSIM and LPIPS to full guidance, NFEs of one sample."""

    nfe: float
    psnr: float
    ssim: float
    lpips: float | None = None


class Fidelity:
    """Pictures of full guidance, made once, and any policy's distance to them.

    Args:
        pipe: a text-to-image pipeline; what is attached to it stays so, idle.
        prompts, seeds: each prompt with each seed.
        num_inference_steps, guidance_scale, negative_prompt: of every run.
        batch_size: pictures made at once.
        lpips: whether to measure LPIPS (AlexNet) too. Its weights are downloaded unless they are there already.
        arguments: more of the pipeline's own.

    Raises:
        ImportError: SSIM and LPIPS are torchmetrics', of the extra `cli`; LPIPS needs torchvision besides.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        prompts: Sequence[str],
        seeds: Sequence[int] = (0,),
        *,
        num_inference_steps: int = 20,
        guidance_scale: float = 5.0,
        negative_prompt: str = "",
        batch_size: int = 16,
        lpips: bool = False,
        **arguments: Any,
    ):
        self.pipe, self.guidance_scale, self.batch_size = pipe, guidance_scale, batch_size
        self.negative_prompt = negative_prompt
        prompts = prompts_of(prompts)
        self.cases = [(prompt, seed) for seed in seeds for prompt in prompts]
        if not self.cases:
            raise ValueError("prompts and seeds: at least one of each")
        self.call = {"num_inference_steps": num_inference_steps, **arguments}
        self.lpips = _lpips() if lpips else None
        self.reference, self.nfe_full = self.pictures(EveryStep())

    def pictures(self, policy: Policy, **changed: Any) -> tuple[Tensor, float]:
        """(N, 3, H, W) from 0 to 1, and the NFEs of one of them."""
        found, nfe = [], 0
        call = self.call | changed
        with borrowed(self.pipe, CFG(guidance_scale=self.guidance_scale), policy) as handle:
            for start in range(0, len(self.cases), self.batch_size):
                part = self.cases[start : start + self.batch_size]
                texts = {"prompt": [prompt for prompt, _ in part]}
                texts |= negatives_of(self.pipe, [self.negative_prompt] * len(part))
                generators = [torch.Generator("cpu").manual_seed(seed) for _, seed in part]
                output = self.pipe(**(call | texts), generator=generators, output_type="pt")
                found.append(output.images.float().cpu())
                nfe += handle.report.nfe
        return torch.cat(found), nfe / len(self.cases)

    def __call__(self, policy: Policy, **changed: Any) -> Score:
        """The score of a policy; `changed` are arguments other than the reference's, such as fewer steps."""
        pictures, nfe = self.pictures(policy, **changed)
        perceived = None if self.lpips is None else float(self.lpips(pictures, self.reference))
        return Score(
            nfe, float(psnr(pictures, self.reference).mean()), float(ssim(pictures, self.reference).mean()), perceived
        )


def psnr(pictures: Tensor, reference: Tensor) -> Tensor:
    """(N,) peak signal to noise ratio in dB of pictures (N, C, H, W) from 0 to 1; at most `EQUAL`.

    That of several pictures is the mean of these, everywhere: one that differs much does not drown the others.
    """
    error = (pictures - reference).square().flatten(1).mean(1)
    return -10 * error.clamp(min=10 ** (-EQUAL / 10)).log10()


def ssim(pictures: Tensor, reference: Tensor) -> Tensor:
    """(N,) structural similarity (Wang et al. 2004) of pictures (N, C, H, W) from 0 to 1."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    found = structural_similarity_index_measure(pictures, reference, data_range=1.0, reduction="none")
    return torch.as_tensor(found)


def _lpips() -> Any:
    """LPIPS (Zhang et al. 2018) of pictures from 0 to 1, the mean over a batch."""
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    return LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True).eval()
