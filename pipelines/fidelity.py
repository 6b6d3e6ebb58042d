"""How close a policy comes to full guidance: the same prompts and seeds with and without it, compared as pictures."""

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from diffusers_guidance.pipelines.attach import attach
from diffusers_guidance.policies import EveryStep, Policy
from diffusers_guidance.rules import CFG


class Score(NamedTuple):
    """Means over pictures; PSNR and SSIM to full guidance, NFEs of one sample."""

    nfe: float
    psnr: float
    ssim: float
    lpips: float | None = None


class Fidelity:
    """Pictures of full guidance, and any policy's distance to them.

    Args:
        pipe: a text-to-image pipeline.
        prompts, seeds: each prompt with each seed.
        num_inference_steps, guidance_scale, negative_prompt: of every run.
        batch_size: pictures made at once.
        arguments: more of the pipeline's own.
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
        perceptual: Any = None,
        **arguments: Any,
    ):
        self.pipe, self.batch_size, self.perceptual = pipe, batch_size, perceptual
        self.cases = [(prompt, seed) for seed in seeds for prompt in prompts]
        if not self.cases:
            raise ValueError("prompts and seeds: at least one of each")
        self.call = {
            "num_inference_steps": num_inference_steps,
            "negative_prompt": negative_prompt,
            **arguments,
        }
        self.guidance_scale = guidance_scale
        self.reference, self.nfe_full = self.pictures(EveryStep())

    def pictures(self, policy: Policy, **changed: Any) -> tuple[Tensor, float]:
        """(N, 3, H, W) from 0 to 1, and the NFEs of one of them."""
        found, nfe = [], 0
        call = self.call | changed
        # Solvers may carry history from one call to the next; each call gets a scheduler of its own.
        scheduler = copy.deepcopy(self.pipe.scheduler)
        try:
            with attach(self.pipe, CFG(guidance_scale=self.guidance_scale), policy) as handle:
                for start in range(0, len(self.cases), self.batch_size):
                    part = self.cases[start : start + self.batch_size]
                    texts = {
                        "prompt": [prompt for prompt, _ in part],
                        "negative_prompt": [call["negative_prompt"]] * len(part),
                    }
                    generators = [torch.Generator("cpu").manual_seed(seed) for _, seed in part]
                    output = self.pipe(**(call | texts), generator=generators, output_type="pt")
                    found.append(output.images.float().cpu())
                    nfe += handle.report.nfe
        finally:
            self.pipe.scheduler = scheduler
        return torch.cat(found), nfe / len(self.cases)

    def __call__(self, policy: Policy, **changed: Any) -> Score:
        """The score of a policy; `changed` are arguments other than the reference's, such as fewer steps."""
        pictures, nfe = self.pictures(policy, **changed)
        perceived = None
        if self.perceptual is not None:
            perceived = float(self.perceptual(2 * pictures - 1, 2 * self.reference - 1).mean())
        return Score(
            nfe, float(psnr(pictures, self.reference).mean()), float(ssim(pictures, self.reference).mean()), perceived
        )


def psnr(pictures: Tensor, reference: Tensor) -> Tensor:
    """(N,) peak signal to noise ratio in dB of pictures (N, C, H, W) from 0 to 1; at most 100, for equal ones."""
    error = (pictures - reference).square().flatten(1).mean(1)
    return -10 * error.clamp(min=1e-10).log10()


def ssim(pictures: Tensor, reference: Tensor) -> Tensor:
    """(N,) structural similarity (Wang et al. 2004): Gaussian window of 11 pixels, sigma 1.5, range 1."""
    at = torch.arange(11.0) - 5
    line = torch.exp(-(at**2) / (2 * 1.5**2))
    line = line / line.sum()
    channels = pictures.shape[1]
    window = (line[:, None] * line).expand(channels, 1, 11, 11).to(pictures)

    def mean(x: Tensor) -> Tensor:
        return torch.nn.functional.conv2d(x, window, groups=channels)

    x, y = pictures, reference
    mx, my = mean(x), mean(y)
    vx, vy, cov = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    similar = (2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    return similar.flatten(1).mean(1)


def perceptual() -> Any:
    """LPIPS (AlexNet), where its package and weights are installed; else None. Downloads nothing."""
    try:
        import lpips

        return lpips.LPIPS(net="alex", pnet_rand=False, verbose=False).eval()
    except Exception:  # no package, no torchvision, or no weights and no network
        return None
