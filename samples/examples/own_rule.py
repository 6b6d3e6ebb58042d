"""A rule of one's own: guidance along what is new in the conditional prediction alone.

With d = c - u, split along c instead of the denoised prediction as APG does, and keep the orthogonal part:

    g = c + (w - 1) (d - k c)        k = <d, c> / <c, c>

As a linear combination of (X, c, d, m) that is one line of coefficients; the inner products come in `gram`, one
number per sample. Under any policy, on any pipeline, by Triton's two-pass kernels where there is a GPU.
"""

from dataclasses import dataclass

import torch
from diffusers import StableDiffusionPipeline

from diffusers_guidance import Coefficients, Gram, Hold, Rule, attach
from diffusers_guidance.samples import MODEL


@dataclass(frozen=True)
class Orthogonal(Rule):
    """g = c + (w - 1) (d - k c), with k c the projection of d on c."""

    def coefficients(self, gram: Gram, b: float) -> Coefficients:
        k = gram.cd / gram.cc
        return Coefficients(0.0, 1 - (self.w - 1) * k, self.w - 1, 0.0)


def main(steps: int = 20) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(MODEL, local_files_only=True)
    with attach(pipe, rule=Orthogonal(), policy=Hold(2)) as handle:
        generator = torch.Generator("cpu").manual_seed(0)
        pipe("a rocket", guidance_scale=6.0, num_inference_steps=steps, generator=generator)
    print(handle.report)


if __name__ == "__main__":
    main()
