"""The cost of attaching: a step of Stable Diffusion with `CFG` and `EveryStep`, beside the untouched pipeline.

    python benchmarks/cost.py [--out benchmarks/results] [--rounds 15]

The UNet has random weights, since time does not depend on them. It has the published size
on a GPU, and is smaller on a CPU (it says so). It checks that the attached run is bit-equal, then times whole runs,
attached and untouched in turns. A whole run includes the identification at its first step. So runs of `STEPS` steps and
of twice as many give the cost of a step. Writes cost-<machine>.json.

On a CPU the seconds of the UNet vary by more than the cost, and attaching does not change them. So they
are subtracted on both sides and added back as their median.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import diffusers
import torch

from diffusers_guidance import CFG, EveryStep, attach
from diffusers_guidance.files import write
from diffusers_guidance.pipelines.support.machine import environment

STEPS = 10
WIDTH = 768


def pipeline(device: str) -> diffusers.StableDiffusionPipeline:
    small = {"block_out_channels": (64, 128, 256, 256), "sample_size": 32} if device == "cpu" else {"sample_size": 64}
    with torch.device(device):
        unet = diffusers.UNet2DConditionModel(cross_attention_dim=WIDTH, **small)
    pipe = diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL(block_out_channels=(32,) * 4, down_block_types=("DownEncoderBlock2D",) * 4,
                                    up_block_types=("UpDecoderBlock2D",) * 4),
        text_encoder=None, tokenizer=None, unet=unet, scheduler=diffusers.DDIMScheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device, torch.float32 if device == "cpu" else torch.float16)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results"))
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        print("No GPU: a small UNet on the CPU, where nothing queues and a step's fixed costs weigh more.")
    pipe = pipeline(device)
    cond, uncond = torch.randn(2, 1, 77, WIDTH, device=device, dtype=pipe.unet.dtype)

    network: list[float] = []
    forwards: list[float] = []
    if device == "cpu":
        forward = pipe.unet.forward

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            output = forward(*args, **kwargs)
            network.append(time.perf_counter() - began)
            return output

        pipe.unet.forward = timed

    def run(steps: int) -> tuple[float, torch.Tensor]:
        network.clear()
        generator = torch.Generator("cpu").manual_seed(0)
        began = time.perf_counter()
        latents = pipe(
            prompt_embeds=cond, negative_prompt_embeds=uncond, guidance_scale=7.5,
            num_inference_steps=steps, generator=generator, output_type="latent",
        ).images.cpu()  # fmt: skip
        taken = time.perf_counter() - began
        forwards.extend(network)
        return taken - sum(network), latents

    def attached(steps: int) -> tuple[float, torch.Tensor]:
        with attach(pipe, CFG(), EveryStep()):
            return run(steps)

    if not torch.equal(run(STEPS)[1], attached(STEPS)[1]):
        raise SystemExit("the attached run is not bit-equal to the untouched one")
    forwards.clear()
    seconds: dict[str, list[float]] = {"untouched": [], "attached": []}
    runs: dict[str, list[float]] = {"untouched": [], "attached": []}
    for i in range(options.rounds):
        taken = {}
        for name, call in sorted({"untouched": run, "attached": attached}.items(), reverse=bool(i % 2)):
            taken[name] = [call(steps)[0] for steps in (STEPS, 2 * STEPS)]
        step = {name: (long - short) / STEPS for name, (short, long) in taken.items()}
        for name in seconds:
            seconds[name].append(step[name])
            runs[name].append(taken[name][1])
    own = statistics.median(forwards) if forwards else 0.0
    seconds = {name: [own + s for s in values] for name, values in seconds.items()}
    runs = {name: [2 * STEPS * own + s for s in values] for name, values in runs.items()}
    added = {
        what: [a / u - 1 for a, u in zip(of["attached"], of["untouched"], strict=True)]
        for what, of in (("step", seconds), ("run", runs))
    }
    deciles = {name: statistics.quantiles(values, n=10) for name, values in (seconds | added).items()}
    result = {
        "environment": environment(pipe),
        "size": "published" if device == "cuda" else "small",
        "rounds": options.rounds,
        "seconds_a_step": {name: statistics.median(values) for name, values in seconds.items()},
        "added": {
            name: {"p20": deciles[name][1], "median": statistics.median(values), "p80": deciles[name][7]}
            for name, values in added.items()
        },
    }
    machine = result["environment"]["device"] if device == "cuda" else "small-cpu"
    file = options.out / f"cost-{machine.replace(' ', '-')}.json"
    write(file, json.dumps(result, indent=1).encode() + b"\n")
    for name, values in result["added"].items():
        print(f"a {name} takes {values['median']:+.2%} (20 to 80 %: {values['p20']:+.2%} to {values['p80']:+.2%})")
    print(f"wrote {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
