"""Measures diffusers' own caches beside `Forecast`, alone and together: docs/results/caches.json, .md and .svg.

    python benchmarks/caches.py [--prompts 16] [--model emoji-flow] [--out docs/results/caches]

A cache replaces blocks of a transformer; `Forecast` replaces whole evaluations. Each contestant makes the pictures of
held-out prompts in 20 steps at scale 5, and takes turns with plain CFG, call by call: its time is the ratio of the two
sums of processor time. The PSNR is the mean over pictures, in dB to plain CFG with the same seeds. The caches run at
their authors' strengths, and at weaker and stronger ones. It writes each row at once, and keeps existing rows of the
same model.
"""

import argparse
import io
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from bundled import prompts
from diffusers import FasterCacheConfig, FirstBlockCacheConfig, TaylorSeerCacheConfig
from diffusers.hooks import MagCacheConfig, mag_cache
from matplotlib import pyplot
from rows import Rows
from torch import Tensor

from diffusers_guidance import CFG, Calibration, Forecast, Policy, attach, samples
from diffusers_guidance.files import write
from diffusers_guidance.pipelines.pictures.make import Case, pictures_of
from diffusers_guidance.pipelines.pictures.measures import psnr, tensor_of
from diffusers_guidance.pipelines.support.loading import fingerprint, load

SEED, STEPS, SCALE, BATCH = 97531, 20, 5.0, 4
OUT = Path(__file__).parents[1] / "docs" / "results" / "caches"
NOTES = (
    "Time is the ratio of processor times to plain CFG, in turns, on one thread. FasterCache is made for pipelines "
    "that evaluate both halves of guidance in one call. CogView 4 calls its transformer for each half. With one memory "
    "for both, FasterCache mixes them: beside its authors' weight there is one that holds each half's own attention. "
    "A cache keeps state from call to call, so beside one `Forecast` evaluates every step; the NFEs say so."
)


@dataclass(frozen=True)
class Contestant:
    """A cache of diffusers or none, under a policy or without a handle."""

    name: str
    family: str
    cache: Any = None
    """The cache's configuration."""
    policy: Policy | None = None
    steps: int = STEPS


def contestants(pipe: Any, ratios: Sequence[float], learned: Calibration | None) -> list[Contestant]:
    """All contestants.

    Args:
        pipe: the pipeline; FasterCache reads its current step.
        ratios: what MagCache has to know about the model.
        learned: what Forecast learned from a run of another prompt.
    """

    def taylor(interval: int, order: int = 1, **more: Any) -> Any:
        # By default it looks for modules named "attn", and does not find those named "attn1". Feed-forward layers are
        # called twice a step, for picture and text, which disturbs its count of steps.
        more = more or {"cache_identifiers": [r"transformer_blocks\.\d+\.attn1"]}
        return TaylorSeerCacheConfig(
            cache_interval=interval,
            max_order=order,
            disable_cache_before_step=3,
            taylor_factors_dtype=torch.float32,
            **more,
        )

    def mag(threshold: float) -> Any:
        return MagCacheConfig(threshold=threshold, num_inference_steps=STEPS, mag_ratios=list(ratios))

    def faster(reach: int, every: int = 2, weight: float = 0.5) -> Any:
        # "Distilled", since the pipeline calls the network for each half alone, so a call has no halves to separate.
        # But each layer has one memory, of its last two calls, for both halves. y_1 + weight (y_1 - y_2) is an output
        # of one half only if the weight is -1: y_2, the last of the same half. An odd `every` computes both in turn.
        return FasterCacheConfig(
            spatial_attention_block_skip_range=every,
            spatial_attention_timestep_skip_range=(-1, reach),
            attention_weight_callback=lambda _: weight,
            current_timestep_callback=lambda: pipe.current_timestep,
            tensor_format="BCHW",
            is_guidance_distilled=True,
        )

    caches = {
        **{f"TaylorSeer, order {o}, every {n}": taylor(n, order=o) for o in (1, 2) for n in (2, 3, 5)},
        **{f"TaylorSeer lite, every {n}": taylor(n, use_lite_mode=True) for n in (2, 3, 5)},
        **{f"FirstBlockCache, {x:g}": FirstBlockCacheConfig(threshold=x) for x in (0.02, 0.05, 0.1, 0.2)},
        **{f"MagCache, {x:g}": mag(x) for x in (0.03, 0.06, 0.12, 0.24)},
        **{f"FasterCache, as its authors weigh, below {n}": faster(n) for n in (341, 681)},
        **{f"FasterCache, held, every {k}, below {n}": faster(n, k, -1.0) for k, n in ((3, 341), (3, 681), (5, 681))},
    }
    family = {name: name.split(",")[0] for name in caches}
    found = [Contestant(name, family[name], cache) for name, cache in caches.items()]
    for nfe in (34, 30, 26, 22, 20, 18, 16):
        found.append(Contestant(f"Forecast, {nfe} NFEs", "Forecast", policy=Forecast(nfe=nfe)))
        if learned is not None:
            policy = Forecast(nfe=nfe, calibration=learned)
            found.append(
                Contestant(f"Forecast, one run learned, {nfe} NFEs", "Forecast, one run learned", None, policy)
            )
        found.append(Contestant(f"CFG, {nfe // 2} steps", "CFG in fewer steps", steps=nfe // 2))
    for weak in ("TaylorSeer, order 1, every 2", "FirstBlockCache, 0.1"):
        together = "Forecast with a cache"
        found.append(Contestant(f"{weak}, Forecast", together, caches[weak], Forecast(nfe=30)))
    return found


@contextmanager
def cached(pipe: Any, cache: Any) -> Iterator[None]:
    """The cache in the pipeline's transformer."""
    if cache is not None:
        pipe.transformer.enable_cache(cache)
    try:
        yield
    finally:
        if cache is not None:
            pipe.transformer.disable_cache()


def mag_ratios(pipe: Any, case: Case) -> list[float]:
    """The ratios that MagCache observes in a run and only prints; the mean of both halves."""
    found: dict[int, list[float]] = {}
    advance = mag_cache.MagCacheBlockHook._advance_step

    def watched(hook: Any, state: Any) -> None:
        found[id(state)] = list(state.calibration_ratios)
        advance(hook, state)

    mag_cache.MagCacheBlockHook._advance_step = watched
    try:
        with cached(pipe, MagCacheConfig(num_inference_steps=STEPS, calibrate=True)), redirect_stdout(io.StringIO()):
            pictures_of(pipe, [case], steps=STEPS, guidance_scale=SCALE)
    finally:
        mag_cache.MagCacheBlockHook._advance_step = advance
    return torch.tensor(list(found.values())).mean(0).tolist()


class Contest:
    """A pipeline, the cases, and the rows so far."""

    def __init__(self, model: str, path: Path, count: int):
        torch.set_num_threads(1)
        self.pipe = load(model, device="cpu")
        about = {"diffusers": diffusers.__version__, "seed": SEED, "steps": STEPS, "prompts": count}
        self.rows = Rows(path, model=fingerprint(model), **about)
        self.cases = [Case(prompt, SEED) for prompt in prompts(samples.HELDOUT_PROMPTS)[8 : 8 + count]]
        self.other = Case(prompts(samples.CALIBRATION_PROMPTS)[0], SEED)
        """A prompt that caches and Forecast may learn from."""

    def timed(self, part: list[Case], steps: int = STEPS) -> tuple[Tensor, float]:
        """Pictures, and the seconds of processor time that they took."""
        began = time.process_time()
        made = pictures_of(self.pipe, part, steps=steps, guidance_scale=SCALE, output_type="pt")
        return tensor_of(made), time.process_time() - began

    def measure(self, contestant: Contestant) -> dict[str, Any]:
        """dB to plain CFG, and the share of its time, over all cases in turns; or why a cache does not fit."""
        try:
            return self.compared(contestant)
        except Exception as error:
            if contestant.cache is None:
                raise
            return {"family": contestant.family, "error": f"{type(error).__name__}: {error}"}

    def compared(self, contestant: Contestant) -> dict[str, Any]:
        found: list[Tensor] = []
        times = []
        for start in range(0, len(self.cases), BATCH):
            part = self.cases[start : start + BATCH]
            full, plain = self.timed(part)
            with ExitStack() as stack:
                stack.enter_context(cached(self.pipe, contestant.cache))
                handle = None
                if contestant.policy is not None:
                    handle = stack.enter_context(attach(self.pipe, CFG(), contestant.policy))
                made, seconds = self.timed(part, contestant.steps)
                nfe = None if handle is None else handle.report.nfe / len(part)
            found.append(psnr(made, full))
            times.append((plain, seconds))
        plain, seconds = map(sum, zip(*times, strict=True))
        each = torch.cat(found)
        row = {"family": contestant.family, "psnr": float(each.mean()), "sem": float(each.std() / len(each) ** 0.5)}
        return row | {"time": seconds / plain, "seconds": seconds / len(self.cases), "nfe": nfe}

    def learned(self) -> Calibration | None:
        """What Forecast learns from one run."""
        with attach(self.pipe, CFG(), Forecast(learn=True)) as handle:
            self.timed([self.other])
            return handle.calibration

    def run(self) -> None:
        """Measures what is missing."""
        for contestant in contestants(self.pipe, mag_ratios(self.pipe, self.other), self.learned()):
            self.rows.once(contestant.name, partial(self.measure, contestant))


def table(rows: dict[str, dict[str, Any]]) -> str:
    """All rows, the fastest last."""
    lines = ["| | NFEs | time | dB to plain CFG |", "|---|---:|---:|---:|"]
    measured = {name: row for name, row in rows.items() if "error" not in row}
    for name, row in sorted(measured.items(), key=lambda item: -item[1]["time"]):
        nfe = f"{row['nfe']:g}" if row["nfe"] else ""
        lines.append(f"| {name} | {nfe} | {row['time']:.2f} | {row['psnr']:.1f} ± {row['sem']:.1f} |")
    lines += [f"| {name} | | {row['error'].splitlines()[0]} | |" for name, row in rows.items() if "error" in row]
    return "\n".join(lines) + "\n"


def draw(rows: dict[str, dict[str, Any]], path: Path) -> None:
    """Time against dB, a line for each family."""
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    measured = [row for row in rows.values() if "error" not in row]
    for family in dict.fromkeys(row["family"] for row in measured):
        points = sorted((row["time"], row["psnr"]) for row in measured if row["family"] == family)
        ours = family.startswith("Forecast")
        axes.plot(*zip(*points, strict=True), "o-" if ours else ".--", label=family, zorder=3 if ours else 2)
    axes.set(xlabel="time, plain CFG = 1", ylabel="PSNR to plain CFG, dB", title="Forecast and diffusers' caches")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path)


def publish(contest: Contest, to: Path) -> None:
    """Table and plot of the rows so far."""
    said = f"{STEPS} steps, scale {SCALE:g}, {len(contest.cases)} held-out prompts. {NOTES}"
    text = (
        f"# Forecast and diffusers' caches\n\n{said}\n\n{table(contest.rows)}\nMade by `python benchmarks/caches.py`.\n"
    )
    write(to.with_suffix(".md"), text.encode())
    if any("error" not in row for row in contest.rows.values()):
        draw(contest.rows, to.with_suffix(".svg"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="emoji-flow", help="a pipeline with a transformer")
    parser.add_argument("--out", type=Path, default=OUT, help="the results, without their ending")
    parser.add_argument("--prompts", type=int, default=16, help="how many of the held-out ones")
    options = parser.parse_args()
    contest = Contest(options.model, options.out.with_suffix(".json"), options.prompts)
    try:
        contest.run()
    finally:  # what there is of them, if it is interrupted
        publish(contest, options.out)


if __name__ == "__main__":
    main()
