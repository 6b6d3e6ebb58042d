"""A rule of your own: guidance only along what is new in the conditional prediction.

Split d = c - u along c (APG splits it along the denoised prediction), and keep the orthogonal part:

    g = c + (w - 1) (d - k c)        k = <d, c> / <c, c>

As a linear combination of (X, c, d, m) this is one line of algebra on inner products. It is written once: torch runs it
on a CPU, and Triton compiles it into its kernels on a GPU. It works under any policy, on any pipeline.
"""

import os
from dataclasses import dataclass

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported: waiting threads leave their core free

import torch
from diffusers import StableDiffusionPipeline

from diffusers_guidance import Coefficients, Hold, Rule, attach
from diffusers_guidance.kernels.algebra import algebra
from diffusers_guidance.samples import MODEL


@algebra
def orthogonal(gram, b, w, keep, _2, _3):
    """c + (w - 1) (d - (1 - keep) k c), with k c the projection of d on c."""
    k = (1 - keep) * gram.cd / gram.cc
    return Coefficients(0.0 * k, 1 - (w - 1) * k, w - 1 + 0.0 * k, 0.0 * k)


@dataclass(frozen=True)
class Orthogonal(Rule):
    """Guidance that keeps the share `keep` of its part along the conditional prediction; 0 drops it, 1 is CFG."""

    keep: float = 0.0

    algebra = orthogonal

    def settings(self, numel: int) -> tuple[float, ...]:
        return self.w, self.keep


def main(steps: int = 20) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(MODEL, local_files_only=True)
    with attach(pipe, rule=Orthogonal(), policy=Hold(2)) as handle:
        generator = torch.Generator("cpu").manual_seed(0)
        pipe("a rocket", guidance_scale=6.0, num_inference_steps=steps, generator=generator)
    print(handle.report)


if __name__ == "__main__":
    main()
