"""Two lines around a pipeline: APG beside plain guidance at a high scale, and evaluations skipped at an ordinary one.

    python wrap.py                                              # the bundled model, nothing to download
    python wrap.py --model stabilityai/stable-diffusion-xl-base-1.0 --prompt "a raccoon in a space suit" --device cuda

Writes plain.png, apg.png, adaptive.png and adaptive_similarity.png to --out, and prints the last run's report.
"""

import argparse
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from diffusers_guidance import APG, CFG, AdaptiveGuidance, EveryStep, attach
from diffusers_guidance.samples import MODEL


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(MODEL), help="a folder, or a name on the Hugging Face hub")
    parser.add_argument("--prompt", default="a red apple")
    parser.add_argument("--high", type=float, default=15.0, help="a scale at which plain guidance burns")
    parser.add_argument("--scale", type=float, default=5.0, help="an ordinary one")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("out/wrap"))
    given = parser.parse_args(arguments)

    dtype = torch.float32 if given.device == "cpu" else torch.bfloat16
    pipe = DiffusionPipeline.from_pretrained(given.model, use_safetensors=True).to(given.device, dtype)
    given.out.mkdir(parents=True, exist_ok=True)

    def draw(name: str, guidance_scale: float) -> None:
        generator = torch.Generator("cpu").manual_seed(given.seed)
        made = pipe(
            given.prompt, guidance_scale=guidance_scale, num_inference_steps=given.steps, generator=generator
        )  # fmt: skip
        made.images[0].save(given.out / f"{name}.png")

    draw("plain", given.high)
    with attach(pipe, rule=APG.preset(pipe), policy=EveryStep()):
        draw("apg", given.high)
    with attach(pipe, rule=CFG(), policy=AdaptiveGuidance()) as handle:
        draw("adaptive", given.scale)
    print(handle.report)
    handle.report.plot(given.out / "adaptive_similarity.png")


if __name__ == "__main__":
    main()
