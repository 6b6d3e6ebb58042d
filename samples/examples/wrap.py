"""Two lines around a pipeline: the same picture in less time, a high scale without burn, each beside plain guidance.

    python wrap.py                                              # the bundled model, nothing to download
    python wrap.py --model stabilityai/stable-diffusion-xl-base-1.0 --prompt "a raccoon in a space suit" --device cuda

Writes plain.png, forecast.png, high_plain.png, high.png and high_similarity.png to --out, and prints what each saved.
"""

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported: waiting threads leave their core free

import torch
from diffusers import DiffusionPipeline

from diffusers_guidance import APG, AdaptiveGuidance, GuidanceError, attach
from diffusers_guidance.samples import MODEL


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(MODEL), help="a folder, or a name on the Hugging Face hub")
    parser.add_argument("--prompt", default="a red apple, flat style")
    parser.add_argument("--scale", type=float, default=5.0, help="an ordinary one")
    parser.add_argument("--high", type=float, default=15.0, help="a scale at which plain guidance burns")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("out/wrap"))
    given = parser.parse_args(arguments)

    options = {"use_safetensors": True, "torch_dtype": torch.float32 if given.device == "cpu" else torch.bfloat16}
    try:
        pipe = DiffusionPipeline.from_pretrained(given.model, **options).to(given.device)
        given.out.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        sys.exit(f"--model {given.model}, --out {given.out}: {' '.join(str(error).split())[:300]}")

    def draw(name: str, guidance_scale: float) -> None:
        generator = torch.Generator("cpu").manual_seed(given.seed)
        made = pipe(
            given.prompt, guidance_scale=guidance_scale, num_inference_steps=given.steps, generator=generator
        )  # fmt: skip
        made.images[0].save(given.out / f"{name}.png")

    try:
        draw("plain", given.scale)
        with attach(pipe) as handle:  # the default: plain guidance, a quarter of the evaluations skipped
            draw("forecast", given.scale)
        print("forecast.png:", handle.report.summary())
        draw("high_plain", given.high)
        with attach(pipe, rule=APG.preset(pipe), policy=AdaptiveGuidance()) as handle:
            draw("high", given.high)
    except GuidanceError as error:
        sys.exit(f"{type(pipe).__name__}: {error}")
    print("high.png:", handle.report.summary())
    handle.report.plot(given.out / "high_similarity.png")


if __name__ == "__main__":
    main()
