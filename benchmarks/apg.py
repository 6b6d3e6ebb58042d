"""Finds the settings of APG that suit the bundled model at scale 15: docs/results/apg.json and .md.

    python benchmarks/apg.py

A grid of eta, momentum and norm_threshold, at every step and until both predictions agree (AG), measures saturation,
contrast, and how often the nearest real picture shows the requested thing. It uses 32 of the calibration's prompts with
a new seed, 20 steps of DPM-Solver++, and CFG at scales 5 and 15. The benchmark's suite takes its APG from here
and measures it on held-out prompts. It resumes after an interruption, and replaces another model's results.
"""

import hashlib
import itertools
from functools import partial

import torch
from bundled import OUT, Bundled, prompts
from rows import Rows

from diffusers_guidance import APG, CFG, AdaptiveGuidance, EveryStep, Policy, Rule, attach, samples
from diffusers_guidance.pipelines.bench.metrics import Retrieval, contrast, saturation

SCALE = 15.0
SEED = 1000
GRID = [
    APG(SCALE, momentum, norm_threshold, eta)
    for eta, momentum, norm_threshold in itertools.product((0.0, 0.5, 1.0), (0.0, -0.5), (1.0, 2.0, 3.0, 5.0, 6.0, 8.0))
]
POLICIES = {"": EveryStep(), "+AG": AdaptiveGuidance()}
PAIRS: dict[str, tuple[Rule, Policy]] = {f"CFG@{scale:g}": (CFG(scale), EveryStep()) for scale in (5.0, SCALE)}
for (_name, _policy), _rule in itertools.product(POLICIES.items(), GRID):
    _settings = f"eta={_rule.eta:g}, momentum={_rule.momentum:g}, norm_threshold={_rule.norm_threshold:g}"
    PAIRS[f"APG({_settings})@15{_name}"] = _rule, _policy


def pictures(bundled: Bundled, rule: Rule, policy: Policy, texts: list[str]) -> torch.Tensor:
    """(N, 3, H, W) from 0 to 1."""
    found = []
    with attach(bundled.pipe, rule, policy):
        for start in range(0, len(texts), 16):
            part = texts[start : start + 16]
            generators = [torch.Generator().manual_seed(SEED + start + i) for i in range(len(part))]
            call = {"num_inference_steps": 20, "guidance_scale": rule.guidance_scale, "output_type": "pt"}
            found.append(bundled.pipe(part, generator=generators, **call).images.float())
    return torch.cat(found)


def table(rows: dict[str, dict[str, float]]) -> str:
    lines = ["| rule + policy | saturation | of CFG@5's | contrast | nearest one fits |", "|---|---:|---:|---:|---:|"]
    of = rows["CFG@5"]["saturation"]
    for label in (label for label in PAIRS if label in rows):
        row = rows[label]
        seen = f"{row['saturation']:.3f} | {row['saturation'] / of - 1:+.1%} | {row['contrast']:.3f}"
        lines.append(f"| {label} | {seen} | {row['retrieval']:.1%} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    bundled = Bundled()
    bundled.set_up("dpm-20-5")
    retrieval = Retrieval.load(samples.MODEL / "retrieval.safetensors")
    texts = [text for text in prompts(samples.CALIBRATION_PROMPTS) if retrieval.concept(text)][::2][:32]
    weights = samples.MODEL / "unet" / "diffusion_pytorch_model.safetensors"
    unet = hashlib.sha256(weights.read_bytes()).hexdigest()[:16]
    rows = Rows(OUT.parent / "apg.json", prompts=texts, seed=SEED, unet=unet)

    def row(rule: Rule, policy: Policy) -> dict[str, float]:
        made = pictures(bundled, rule, policy, texts)
        return {
            "saturation": float(saturation(made).mean()),
            "contrast": float(contrast(made).mean()),
            "retrieval": float(retrieval(made, texts).float().mean()),
        }

    for label, pair in PAIRS.items():
        rows.once(label, partial(row, *pair))
    said = "32 of the calibration's prompts: a picture is 3.1 %. Made by `python benchmarks/apg.py`."
    (OUT.parent / "apg.md").write_text(f"# Settings of APG at scale 15, bundled model\n\n{said}\n\n{table(rows)}")
    print(table(rows))


if __name__ == "__main__":
    main()
