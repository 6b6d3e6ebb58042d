"""A rule of one's own: guidance along what is new in the conditional prediction alone.

With d = c - u, split along c instead of the denoised prediction as APG does, and keep the orthogonal part:

    g = c + (w - 1) (d - k c)        k = <d, c> / <c, c>

As a linear combination of (X, c, d, m) that is one line of algebra on inner products. It is written once: torch runs
it where there is no GPU, Triton compiles it into its kernels where there is one. Under any policy, on any pipeline.
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
    """Guidance without the part along the conditional prediction, of which `keep` stays: 0 none, 1 all (CFG)."""

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
