"""A policy of your own: evaluate both predictions while their difference still turns, and hold it once it is steady.

A policy plans a step for every sample of the batch separately, from what the run has seen: here from the similarities
of the last two steps evaluated in full. It keeps no state, so a run never sees an earlier one.
"""

import os
from dataclasses import dataclass

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported: waiting threads leave their core free

import torch
from diffusers import StableDiffusionPipeline

from diffusers_guidance import Decision, History, Policy, Step, attach
from diffusers_guidance.samples import MODEL


@dataclass(frozen=True)
class HoldWhileSteady(Policy):
    """Holds a sample's difference for the next step if its similarity moved by less than `change`."""

    change: float = 0.005

    needs_denoised = True

    def plan(self, step: Step, history: History) -> list[Decision]:
        seen = history.agreement("denoised")  # (steps so far, rows), NaN where it was not evaluated
        if len(seen) < 2:
            return [Decision("both")] * history.rows
        moved = (seen[-1] - seen[-2]).abs()  # NaN right after a held step: evaluate again
        return [
            Decision("extrapolate", f"moved by {m:.4f}") if m < self.change else Decision("both")
            for m in moved.tolist()
        ]  # fmt: skip


def main(steps: int = 20) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(MODEL, local_files_only=True)
    prompts = ["a red apple", "a rocket"]
    with attach(pipe, policy=HoldWhileSteady()) as handle:
        generators = [torch.Generator("cpu").manual_seed(i) for i in range(len(prompts))]
        pipe(prompts, guidance_scale=5.0, num_inference_steps=steps, generator=generators)
    print(handle.report)


if __name__ == "__main__":
    main()
