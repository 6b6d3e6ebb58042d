"""What skipped evaluations save at real size: seconds of a run's denoiser calls under CFG and under policies.

    python benchmarks/wallclock.py [--out benchmarks/results] [--rounds 5]

It builds denoisers of the published configurations with random weights (time does not depend on them): the UNets of
Stable Diffusion 1.5 and SDXL, the transformers of Stable Diffusion 3 and Wan 2.1 1.3B. A run is the denoiser calls
of a pipeline's loop, and skips halves where the policy stops guidance: for a whole batch at once, or
sample by sample, each at its own step. Every policy takes turns with CFG, and its time is a ratio to CFG's. It writes
wallclock.json. Without a GPU it says so and times tiny denoisers, which only shows that it works.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import diffusers
import numpy as np
import torch

from diffusers_guidance.files import write

POLICIES = {
    # Where the published adaptive runs stop guidance, as a share of the steps.
    "AG, T=20 (10 of 20 steps guided)": 10 / 20,  # arXiv 2312.12487
    "AG on SDXL (18 of 50)": 18 / 50,  # AbstractEyes/comfy-cfg-megapack, x0 cosine 0.999
    "AG on Anima (25 of 50)": 25 / 50,  # the same
    "guidance off for the last 15 of 30 steps": 15 / 30,  # diffusers issue 5266
}
SPREAD = 0.15
"""Samples that stop separately do so up to this share of the steps earlier or later, evenly spread."""


def sd15(tiny: bool):
    """UNet of Stable Diffusion 1.5 at 512 pixels."""
    size = {"block_out_channels": (32, 64, 64, 64), "cross_attention_dim": 64} if tiny else {"cross_attention_dim": 768}
    unet = diffusers.UNet2DConditionModel(sample_size=64, **size)
    side = 16 if tiny else 64

    def inputs(rows):
        return (
            (torch.randn(rows, 4, side, side), torch.tensor(500)),
            {"encoder_hidden_states": torch.randn(rows, 77, size["cross_attention_dim"])},
        )

    return unet, inputs


def sdxl(tiny: bool):
    """UNet of SDXL at 1024 pixels."""
    width, projected, pooled = (64, 96, 32) if tiny else (2048, 2816, 1280)
    unet = diffusers.UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(32, 64, 64) if tiny else (320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2) if tiny else (1, 2, 10),
        attention_head_dim=(4, 8, 8) if tiny else (5, 10, 20),
        cross_attention_dim=width,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=(projected - pooled) // 6 if tiny else 256,
        projection_class_embeddings_input_dim=pooled + 6 * ((projected - pooled) // 6) if tiny else projected,
    )
    side = 16 if tiny else 128

    def inputs(rows):
        added = {"text_embeds": torch.randn(rows, pooled), "time_ids": torch.zeros(rows, 6)}
        return (
            (torch.randn(rows, 4, side, side), torch.tensor(500)),
            {"encoder_hidden_states": torch.randn(rows, 77, width), "added_cond_kwargs": added},
        )

    return unet, inputs


def sd3(tiny: bool):
    """Transformer of Stable Diffusion 3 Medium at 1024 pixels."""
    layers, heads, width, pooled = (2, 2, 64, 32) if tiny else (24, 24, 4096, 2048)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=128,
        patch_size=2,
        in_channels=16,
        num_layers=layers,
        attention_head_dim=64,
        num_attention_heads=heads,
        joint_attention_dim=width,
        caption_projection_dim=64 * heads,
        pooled_projection_dim=pooled,
        out_channels=16,
        pos_embed_max_size=192,
    )
    side = 16 if tiny else 128

    def inputs(rows):
        return (), {
            "hidden_states": torch.randn(rows, 16, side, side),
            "encoder_hidden_states": torch.randn(rows, 154 if tiny else 333, width),
            "pooled_projections": torch.randn(rows, pooled),
            "timestep": torch.full((rows,), 500.0),
        }

    return transformer, inputs


def wan(tiny: bool):
    """Transformer of Wan 2.1 1.3B at 480p, 81 frames."""
    heads, layers, text = (2, 2, 64) if tiny else (12, 30, 4096)
    transformer = diffusers.WanTransformer3DModel(
        num_attention_heads=heads,
        attention_head_dim=128,
        in_channels=16,
        out_channels=16,
        text_dim=text,
        ffn_dim=128 if tiny else 8960,
        num_layers=layers,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
    )
    shape = (16, 3, 8, 8) if tiny else (16, 21, 60, 104)

    def inputs(rows):
        return (), {
            "hidden_states": torch.randn(rows, *shape),
            "timestep": torch.full((rows,), 500.0),
            "encoder_hidden_states": torch.randn(rows, 32 if tiny else 512, text),
        }

    return transformer, inputs


DENOISERS = {
    "SD 1.5, 512x512": (sd15, "one call of both halves"),
    "SDXL, 1024x1024": (sdxl, "one call of both halves"),
    "SD 3, 1024x1024": (sd3, "one call of both halves"),
    "Wan 2.1 1.3B, 81x480x832": (wan, "a call for each half"),
}
"""The builder, and how that family's pipeline calls the denoiser."""


def stops(share: float, steps: int, batch: int, each: bool) -> list[int]:
    """How many guided steps each sample has: all the same number, or different ones around the same mean."""
    if not each:
        return [round(share * steps)] * batch
    offsets = np.linspace(-SPREAD, SPREAD, batch) if batch > 1 else [0.0]
    return [min(steps, max(1, round((share + offset) * steps))) for offset in offsets]


def rows_of(guided: list[int], steps: int) -> list[int]:
    """Rows evaluated at every step."""
    return [len(guided) + sum(step < last for last in guided) for step in range(steps)]


def calls_of(rows: list[int], batch: int, how: str) -> list[int]:
    """The rows of each call of the denoiser."""
    if how == "one call of both halves":
        return rows
    return [part for count in rows for part in (batch, count - batch) if part]


def run(call: Callable[[int], None], calls: list[int], synchronize: Callable[[], None]) -> float:
    """Seconds of the calls."""
    synchronize()
    began = time.perf_counter()
    for rows in calls:
        call(rows)
    synchronize()
    return time.perf_counter() - began


def quantiles(values: list[float]) -> dict[str, float]:
    low, middle, high = np.quantile(values, [0.2, 0.5, 0.8])
    return {"p20": float(low), "median": float(middle), "p80": float(high)}


def moved(value, device, dtype):
    """Tensors of nested arguments on the device, floating ones as dtype."""
    if isinstance(value, torch.Tensor):
        return value.to(device, dtype if value.is_floating_point() else None)
    if isinstance(value, dict):
        return {name: moved(part, device, dtype) for name, part in value.items()}
    return tuple(moved(part, device, dtype) for part in value)


def measure(name: str, device: str, steps: int, batches: tuple[int, ...], rounds: int) -> list[dict]:
    """One row per policy and batch size, for one denoiser."""
    build, how = DENOISERS[name]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with torch.device(device):
        model, inputs = build(device == "cpu")
    model = model.to(device, dtype).eval()
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    rows = []
    for batch in batches:
        prepared: dict[int, tuple] = {}

        def call(count: int, prepared=prepared) -> None:
            if count not in prepared:
                prepared[count] = moved(inputs(count), device, dtype)
            args, kwargs = prepared[count]
            model(*args, **kwargs, return_dict=False)

        full = calls_of([2 * batch] * steps, batch, how)
        single = {
            count: statistics.median(run(call, [count], synchronize) for _ in range(4)) for count in {*full, batch}
        }
        rate = {str(count): count / seconds for count, seconds in single.items()}
        for policy, share in POLICIES.items():
            for each in (False, True) if batch > 1 else (False,):
                guided = stops(share, steps, batch, each)
                evaluated = rows_of(guided, steps)
                calls = calls_of(evaluated, batch, how)
                for count in {*calls}:
                    call(count)  # warms up every size, and lays out its memory
                taken: dict[str, list[float]] = {"policy": [], "cfg": []}
                for round in range(rounds):
                    pair = [("cfg", full), ("policy", calls)]
                    for kind, its in pair if round % 2 else reversed(pair):
                        taken[kind].append(run(call, its, synchronize))
                ratios = [own / other for own, other in zip(taken["policy"], taken["cfg"], strict=True)]
                row = {"denoiser": name, "calls": how, "batch": batch, "policy": policy, "per_sample": each}
                row |= {"steps": steps, "guided_steps": guided, "evaluations_per_second": rate}
                row |= {
                    "nfe_saved": 1 - sum(evaluated) / (2 * batch * steps),
                    "time_saved": 1 - statistics.median(ratios),
                }
                row |= {"ratio": quantiles(ratios), "cfg_seconds": quantiles(taken["cfg"])}
                rows.append(row)
                print(
                    f"{name:26} x{batch} {policy:42} {'per sample' if each else '':10} "
                    f"NFEs {row['nfe_saved']:5.1%}  time {row['time_saved']:6.1%}",
                    flush=True,
                )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", choices=list(DENOISERS), default=list(DENOISERS))
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    steps = 50 if device == "cuda" else 10
    if device == "cpu":
        print("No GPU: tiny denoisers on the CPU. This shows that the benchmark works, and nothing about real sizes.")
    rows = []
    with torch.inference_mode():
        for name in options.only:
            # A step of a video takes seconds, so fewer of them are enough.
            video = name.startswith("Wan") and device == "cuda"
            batches = (1,) if video else (1, 4, 8)
            rows += measure(name, device, 20 if video else steps, batches, options.rounds)
    machine = {
        "name": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine(),
        "device": device,
        "sizes": "published" if device == "cuda" else "tiny",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }
    file = options.out / f"wallclock-{'tiny-cpu' if device == 'cpu' else machine['name'].replace(' ', '-')}.json"
    write(file, json.dumps({"machine": machine, "rows": rows}, indent=1).encode() + b"\n")
    print(f"wrote {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
