"""The cost of attaching in host time: what a step adds to the processor time of the pipeline's own loop.

    python benchmarks/cost.py [--out benchmarks/results] [--rounds 9]

It runs Stable Diffusion's loop with Euler on a network that does almost nothing, so the processor time is that of the
loop. Runs of `STEPS` and of three times as many steps, attached and untouched in turns, give the time of a step without
the work that is done once a run (identification at its first step). On a GPU this time is hidden behind the network, if
the network takes longer. On a CPU it includes the arithmetic of both predictions, which a GPU does in a few launches.

The network counts as one of diffusers' own. The code of others on a network is watched by policies that skip something,
for what it may remember: `own network` is the cost with a class that is not known. It writes cost-<machine>.json.
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
from diffusers.configuration_utils import ConfigMixin, register_to_config

from diffusers_guidance import APG, CFG, AdaptiveGuidance, EveryStep, Forecast, Hold, attach
from diffusers_guidance.files import write
from diffusers_guidance.pipelines.attach import foreign, memory
from diffusers_guidance.pipelines.support.machine import environment

STEPS = 20
WIDTH = 32
PAIRS = {
    "CFG, EveryStep": (CFG(), EveryStep()),
    "APG, EveryStep": (APG(), EveryStep()),
    "CFG, Hold": (CFG(), Hold(2)),
    "CFG, AdaptiveGuidance": (CFG(), AdaptiveGuidance(0.999)),
    "CFG, Forecast": (CFG(), Forecast()),
    "CFG, Forecast, own network": (CFG(), Forecast()),
}
KNOWN = foreign.KNOWN


class Network(diffusers.ModelMixin, ConfigMixin):
    """A multiple of the sample, different for each prompt."""

    @register_to_config
    def __init__(self, in_channels: int = 4, sample_size: int = 8, time_cond_proj_dim: int | None = None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, sample: Any, timestep: Any, encoder_hidden_states: Any = None, **rest: Any) -> Any:
        return (sample * encoder_hidden_states[:, 0, :1, None, None],)


def pipeline(device: str) -> diffusers.StableDiffusionPipeline:
    with torch.device(device):
        vae = diffusers.AutoencoderKL(
            block_out_channels=(32,) * 4,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        )
    scheduler = diffusers.EulerDiscreteScheduler(steps_offset=1)
    pipe = diffusers.StableDiffusionPipeline(
        vae=vae, text_encoder=None, tokenizer=None, unet=Network(), scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results"))
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(1)
    pipe = pipeline(device)
    cond, uncond = 0.2 + 0.1 * torch.rand(2, 1, 77, WIDTH, device=device)

    def run(steps: int) -> float:
        generator = torch.Generator("cpu").manual_seed(0)
        began = time.process_time()
        pipe(
            prompt_embeds=cond, negative_prompt_embeds=uncond, guidance_scale=7.5, height=64, width=64,
            num_inference_steps=steps, generator=generator, output_type="latent",
        )  # fmt: skip
        return time.process_time() - began

    def a_step() -> float:
        short, long = run(STEPS), run(3 * STEPS)
        return 1e3 * (long - short) / (2 * STEPS)

    a_step()
    own: list[float] = []
    added: dict[str, list[float]] = {name: [] for name in PAIRS}
    for _ in range(options.rounds):
        for name, pair in PAIRS.items():
            untouched = a_step()
            foreign.KNOWN = memory.KNOWN = KNOWN | ({__name__} if "own network" not in name else set())
            with attach(pipe, *pair):
                attached = a_step()
            own.append(untouched)
            added[name].append(attached - untouched)
    result = {
        "environment": environment(pipe),
        "rounds": options.rounds,
        "own_ms_a_step": round(statistics.median(own), 3),
        "added_ms_a_step": {
            name: {"least": round(min(values), 3), "median": round(statistics.median(values), 3)}
            for name, values in added.items()
        },
    }
    machine = result["environment"]["device"]
    file = options.out / f"cost-{machine.replace(' ', '-')}.json"
    write(file, json.dumps(result, indent=1).encode() + b"\n")
    print(f"a step of the loop itself: {result['own_ms_a_step']} ms of processor time")
    for name, values in result["added_ms_a_step"].items():
        print(f"{name} adds {values['median']} ms (the least of {options.rounds}: {values['least']})")
    print(f"wrote {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
