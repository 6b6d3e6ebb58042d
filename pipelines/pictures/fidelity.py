"""Compares pictures of the same prompts and seeds with full guidance and with less."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from diffusers import DiffusionPipeline
from torch import Tensor

from diffusers_guidance.pipelines.pictures.columns import Column, short
from diffusers_guidance.pipelines.pictures.make import Case, Result, make
from diffusers_guidance.pipelines.pictures.measures import lpips_network, psnr, ssim
from diffusers_guidance.pipelines.pictures.texts import prompts_of
from diffusers_guidance.pipelines.support.progress import Progress, silent
from diffusers_guidance.policies import EveryStep, Policy
from diffusers_guidance.rules import CFG


class Score(NamedTuple):
    """Means over pictures: NFEs and seconds; PSNR in dB, SSIM and LPIPS to full guidance, of decoded floats."""

    nfe: float
    psnr: float
    ssim: float
    lpips: float | None = None
    seconds: float | None = None


def likeness(pictures: Tensor, reference: Tensor) -> dict[str, Tensor]:
    """PSNR in dB and SSIM of each picture to its reference, both as decoded."""
    return {"psnr": psnr(pictures, reference), "ssim": ssim(pictures, reference)}


class Fidelity:
    """Pictures of full guidance, made once, and any policy's distance from them.

    Args:
        pipe: a text-to-image pipeline. A handle on it stays attached, but idle.
        prompts, seeds: each prompt is made with each seed.
        num_inference_steps, guidance_scale, negative_prompt: those of every run.
        batch_size: pictures per call.
        lpips: whether to measure LPIPS (AlexNet) too. Its weights are downloaded if missing.
        progress: gets the steps of the reference's calls.
        arguments: more arguments of the pipeline.

    Raises:
        ImportError: SSIM and LPIPS need torchmetrics, from the extra `cli`; LPIPS also needs torchvision.
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
        progress: Progress = silent,
        **arguments: Any,
    ):
        prompts = prompts_of(prompts)
        self.pipe, self.steps = pipe, num_inference_steps
        self.cases = [Case(prompt, seed, negative_prompt) for seed in seeds for prompt in prompts]
        if not self.cases:
            raise ValueError("prompts and seeds: at least one of each")
        self.call = {"guidance_scale": guidance_scale, "batch": batch_size, **arguments}
        self.lpips = lpips_network() if lpips else None
        self.full = self.run(EveryStep(), progress=progress)
        self.reference = self.full.floats

    def run(
        self, policy: Policy | Column, num_inference_steps: int | None = None, progress: Progress = silent
    ) -> Result:
        """The pictures of a policy, or of a whole column, for all prompts and seeds.

        Args:
            num_inference_steps: if it differs from the reference's.
            progress: gets the steps of all calls.
        """
        column = policy if isinstance(policy, Column) else Column(short(policy), CFG(), policy)
        steps = num_inference_steps or self.steps
        return make(self.pipe, self.cases, column, steps=steps, progress=progress, **self.call)

    def psnr(self, result: Result) -> float:
        """The mean over the pictures of their dB to full guidance."""
        return float(psnr(result.floats, self.reference).mean())

    def score(self, result: Result) -> Score:
        """All measures of the pictures that `run` made."""
        pictures = result.floats
        perceived = None if self.lpips is None else float(self.lpips(pictures, self.reference))
        means = {name: float(of.mean()) for name, of in likeness(pictures, self.reference).items()}
        nfe, seconds = result.nfe / len(self.cases), result.seconds_per_picture
        return Score(nfe, **means, lpips=perceived, seconds=seconds)

    def __call__(self, policy: Policy | Column, num_inference_steps: int | None = None) -> Score:
        """The score of a policy; `num_inference_steps` if it differs from the reference's."""
        return self.score(self.run(policy, num_inference_steps))
