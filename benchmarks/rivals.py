"""Measures other ways to forecast skipped evaluations beside `Forecast`: docs/results/rivals, and docs/forecast.md.

    python benchmarks/rivals.py [ddim-20-5 ...]

The rivals are in `pipelines/pictures/rivals.py`. Each is measured on the steps that `Forecast` evaluates, and on
evenly spaced ones, as its authors space them: the first step, the last, and every n-th. DPCache chooses its own
steps. Adaptive Guidance and LinearAG skip only the unconditional prediction. Rivals that need a calibration get eight
runs of calibration prompts. Prompts, settings and budgets are those of `forecast.py`. There are two seeds; the second
one starts when all settings have the first. It writes each row at once, with the PSNR of each picture, and keeps
existing rows: what does not rest on the steps that `Forecast` evaluates comes first. Intervals are for the mean over
prompts (95 %, by Student's t), where each prompt has the mean of its seeds.
"""

import itertools
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from bundled import SCHEDULERS, Bundled, prompts, there
from forecast import BUDGETS, SEED, Setting
from rows import Rows

from diffusers_guidance import (
    AdaptiveGuidance,
    Calibration,
    EveryStep,
    Forecast,
    LinearAG,
    Policy,
    calibrate,
    samples,
)
from diffusers_guidance.files import write
from diffusers_guidance.pipelines.pictures.fidelity import Fidelity
from diffusers_guidance.pipelines.pictures.measures import PSNR, psnr
from diffusers_guidance.pipelines.pictures.rivals import (
    AdamsBashforth,
    EasyCache,
    FoCa,
    Held,
    Rival,
    Spectrum,
    TaylorSeer,
)
from diffusers_guidance.schedules import shortest
from diffusers_guidance.spaces import Space

OUT = Path(__file__).parents[1] / "docs" / "results" / "rivals"
PAGE = OUT.parents[1] / "forecast.md"
PART = re.compile(r"(<!-- by benchmarks/rivals.py -->\n).*?(?=<!-- end -->)", re.DOTALL)
NAMES = (
    "ddim-20-5", "euler-20-5", "dpm-20-5", "unipc-20-5", "ddim-20-7.5", "euler-20-7.5", "dpm-20-7.5", "unipc-20-7.5",
    "ddim-50-5", "euler-50-5", "dpm-50-5", "unipc-50-5", "ddim-50-7.5", "euler-50-7.5", "dpm-50-7.5", "unipc-50-7.5",
    "flow-20-5", "flow-50-5",
)  # fmt: skip
SEEDS = (SEED, 86420)
T_95 = 2.131
"""Student's t of a two-sided interval of 95 % with 15 degrees of freedom."""


@dataclass(frozen=True)
class DPCache(TaylorSeer):
    """A Taylor series of order 1, on the steps with the least sum of its calibrated errors (arXiv 2602.22654).

    The error of a skipped step is the norm of its distance from the line through the two evaluated steps before it.
    """

    _: KW_ONLY
    chosen: Sequence[int] = ()

    def pattern(self, count: int, table: tuple[Space, ...] = (), branches: int = 2) -> tuple[bool, ...]:
        return tuple(i in self.chosen for i in range(count))

    @classmethod
    def planned(cls, calibration: Calibration, nfe: int) -> "DPCache":
        """By dynamic programming over the calibration's Gram matrix; as in the paper, the last step is evaluated."""
        moments, w = calibration.moments(""), calibration.call["guidance_scale"]
        steps, gram = moments.steps, moments.total
        mix = torch.cat([torch.eye(steps), (w - 1) * torch.eye(steps)], 1).double()
        guided = mix @ gram @ mix.T  # (T, T) inner products of guided predictions
        costs = torch.full((steps + 1, steps, steps + 1), math.inf, dtype=torch.float64)
        for j in range(steps):
            for i in range(-1, j):
                missed = [0.0]
                for t in range(j + 1, steps):
                    off = torch.zeros(steps, dtype=torch.float64)
                    slope = 0.0 if i < 0 else (t - j) / (j - i)
                    off[t] += 1
                    off[j] -= 1 + slope
                    off[i] += slope
                    missed.append(float((off @ guided @ off).clamp(min=0).sqrt()))
                costs[i + 1, j, j + 1 :] = torch.tensor(missed, dtype=torch.float64).cumsum(0)
        costs[:, : steps - 1, steps] = math.inf  # no path ends before the last step
        return cls(nfe=nfe, chosen=shortest(costs)[nfe // 2 - 1][1])


KINDS: dict[str, type[Rival] | partial[Rival]] = {
    "Adams-Bashforth 2": AdamsBashforth,
    "TaylorSeer, order 1": TaylorSeer,
    "Spectrum": Spectrum,
    "EasyCache": EasyCache,
    "TaylorSeer, order 2": partial(TaylorSeer, order=2),
    "held": Held,
    "FoCa": FoCa,
}
"""The rivals that need no calibration."""
OURS, EVEN = "Forecast's steps", "even steps"
OWN, AG, PUBLISHED = "DPCache, its own steps", "Adaptive Guidance", "LinearAG as published, 25 NFEs"
FEWER = "CFG in fewer steps"
SPACED = tuple(f"{kind}, {spaced}" for spaced in (OURS, EVEN) for kind in KINDS)
ORDER = ("Forecast", *SPACED, OWN, AG, PUBLISHED, FEWER)
"""The rows of a table."""


class Contest(Setting):
    """A setting of `forecast.py` at one seed, and the rivals' rows."""

    def __init__(self, bundled: Bundled, name: str, seed: int):
        super().__init__(bundled, name, OUT)
        self.seed = seed

    @cached_property
    def fidelity(self) -> Fidelity:
        return Fidelity(self.bundled.pipe, prompts(samples.HELDOUT_PROMPTS)[8:], (self.seed,), **self.call)

    @cached_property
    def calibration(self) -> Calibration:
        return calibrate(self.bundled.pipe, prompts(samples.CALIBRATION_PROMPTS), trajectories=8, **self.call)

    def measure(self, what: str, nfe: int, make: Callable[[], Policy], **changed: int) -> None:
        def row() -> dict[str, Any]:
            made = self.fidelity.run(make(), **changed)
            each = psnr(made.floats, self.fidelity.reference)
            about = {"what": what, "budget": nfe, "seed": self.seed, "nfe": made.nfe / len(each)}
            return about | {"psnr": float(each.mean()), "pictures": [round(float(picture), 3) for picture in each]}

        self.rows.once(f"{what}, {nfe}, {self.seed}", row)

    def measure_all(self) -> None:
        budgets = BUDGETS[self.steps]
        for nfe in budgets:
            self.measure(FEWER, nfe, EveryStep, num_inference_steps=nfe // 2)
        self.measure_rivals(EVEN)
        for nfe in budgets:
            self.measure(OWN, nfe, lambda nfe=nfe: DPCache.planned(self.calibration, nfe))
            if (share := 1 - nfe / (2 * self.steps)) < 0.5:
                adaptive = partial(AdaptiveGuidance.from_calibration, save=share)
                self.measure(AG, nfe, lambda adaptive=adaptive: adaptive(self.calibration))
        if self.steps == 20:
            self.measure(PUBLISHED, 26, lambda: LinearAG(self.calibration))
        for nfe in budgets:
            self.measure("Forecast", nfe, partial(Forecast, nfe=nfe))
        self.measure_rivals(OURS)

    def measure_rivals(self, spaced: str) -> None:
        for (kind, make), nfe in itertools.product(KINDS.items(), BUDGETS[self.steps]):
            self.measure(f"{kind}, {spaced}", nfe, partial(make, nfe=nfe, is_even=spaced == EVEN))


def interval(numbers: Sequence[Sequence[float]]) -> float:
    """Half the interval of the mean over prompts; numbers by seed, then by prompt."""
    by_prompt = torch.tensor(numbers, dtype=torch.float64).mean(0)
    return T_95 * float(by_prompt.std()) / math.sqrt(len(by_prompt))


def of(rows: list[dict], what: str, nfe: int) -> list[dict]:
    """What was measured at a budget, by seed."""
    return [row for row in rows if (row["what"], row["budget"]) == (what, nfe)]


def mean(rows: list[dict], what: str, nfe: int) -> float:
    """The dB of its seeds on average."""
    found = of(rows, what, nfe)
    return sum(row["psnr"] for row in found) / len(found)


def told(rows: list[dict], what: str, nfe: int) -> str:
    """A row's cell: the mean of its seeds."""
    if not (found := of(rows, what, nfe)):
        return ""
    dB = f"{mean(rows, what, nfe):.1f}"
    kept = [row["pictures"] for row in found if row["pictures"]]
    return f"{dB} ± {interval(kept):.1f}" if kept else dB


def ahead(rows: list[dict], nfe: int) -> str:
    """How far `Forecast` is ahead of the best other row at a budget, over the same pictures."""
    by: dict[str, dict[int, list[float]]] = {}
    for row in rows:
        if row["budget"] == nfe and row["pictures"]:
            by.setdefault(row["what"], {})[row["seed"]] = row["pictures"]
    ours = by.pop("Forecast", {})
    leads = []
    for theirs in by.values():
        if shared := ours.keys() & theirs.keys():
            apart = [[a - b for a, b in zip(ours[seed], theirs[seed], strict=True)] for seed in shared]
            leads.append((float(torch.tensor(apart).mean()), interval(apart)))
    return "{:+.1f} ± {:.1f}".format(*min(leads)) if leads else ""


def ordered(rows: list[dict]) -> list[str]:
    """What was measured, in the order of a table."""
    return sorted({row["what"] for row in rows}, key=ORDER.index)


def summary() -> str:
    """A table in dB of all measured rows, for each setting."""
    lines = [
        "# Rivals",
        "",
        "Mean PSNR in dB to full guidance; 16 held-out prompts. ±: 95 %, over prompts. The last row is the mean of the",
        f"pictures' differences to the best other row. {PSNR}.",
        "",
    ]
    for name in NAMES:
        if not (rows := [*Rows(OUT / f"{name}.json").values()]):
            continue
        scheduler, steps, scale = name.split("-")
        budgets, seeds = BUDGETS[int(steps)], len({row["seed"] for row in rows})
        title = f"{SCHEDULERS[scheduler].removesuffix('Scheduler')}, {steps} steps, scale {scale}, {seeds} seed"
        lines += [
            f"| {title}{'s' * (seeds > 1)} | {' | '.join(f'{nfe} NFEs' for nfe in budgets)} |",
            "|---" + "|---:" * len(budgets) + "|",
        ]
        for what in ordered(rows):
            lines.append(f"| {what} | {' | '.join(told(rows, what, nfe) for nfe in budgets)} |")
        leads = [ahead(rows, nfe) for nfe in budgets]
        lines += [f"| **`Forecast` ahead by** | {' | '.join(leads)} |"] * any(leads) + [""]
    return "\n".join(lines)


KINDS_IN_SHORT: dict[str, tuple[str, ...]] = {
    "**`Forecast`**": ("Forecast",),
    "best rival on the same steps": tuple(what for what in SPACED if what.endswith(OURS)),
    "on evenly spaced steps": tuple(what for what in SPACED if what.endswith(EVEN)),
    "DPCache": (OWN,),
    "CFG in fewer steps": (FEWER,),
}
"""The columns of the table in docs/forecast.md: each has the best of these rows."""


def in_short() -> str:
    """For each setting with a seed that has all rows: the best of each kind at each budget, and `Forecast`'s lead."""
    lines = []
    for steps, budgets in BUDGETS.items():
        lines += [
            "",
            f"| {steps} steps: {' / '.join(map(str, budgets))} of {2 * steps} NFEs | {' | '.join(KINDS_IN_SHORT)} "
            "| ahead by |",
            "|---" * (len(KINDS_IN_SHORT) + 2) + "|",
        ]
        for name in (name for name in NAMES if name.split("-")[1] == str(steps)):
            rows, count = whole([*Rows(OUT / f"{name}.json").values()], budgets)
            if not count:
                continue
            best = [
                [max(mean(rows, what, nfe) for what in kind) for nfe in budgets] for kind in KINDS_IN_SHORT.values()
            ]
            tops = [max(column) for column in zip(*best, strict=True)]
            cells = [
                " / ".join(f"**{dB:.1f}**" if dB == top else f"{dB:.1f}" for dB, top in zip(row, tops, strict=True))
                for row in best
            ]
            scheduler, _, scale = name.split("-")
            title = "`emoji-flow`" if scheduler == "flow" else SCHEDULERS[scheduler].removesuffix("Scheduler")
            title += f", {scale}" + ", one seed" * (count == 1)
            leads = " / ".join(ahead(rows, nfe) for nfe in budgets)
            lines.append(f"| {title} | {' | '.join(cells)} | {leads} |")
    return "\n".join([*lines, "", ""])


def whole(rows: list[dict], budgets: Sequence[int]) -> tuple[list[dict], int]:
    """The rows of those seeds that have all of them, and the number of these seeds."""
    wanted = {(what, nfe) for kind in KINDS_IN_SHORT.values() for what in kind for nfe in budgets}
    found = {
        seed
        for seed in {row["seed"] for row in rows}
        if wanted <= {(row["what"], row["budget"]) for row in rows if row["seed"] == seed}
    }
    return [row for row in rows if row["seed"] in found], len(found)


def plot(name: str) -> None:
    """Plots a setting's rows over NFEs into a file; rivals on evenly spaced steps are dashed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.8), layout="constrained")
    axes = figure.add_subplot(xlabel="network evaluations of one picture", ylabel="PSNR to full guidance (dB)")
    axes.set_title(name)
    rows = [*Rows(OUT / f"{name}.json").values()]
    kinds = list(dict.fromkeys(what.rsplit(",", 1)[0] for what in ordered(rows)))
    for what in ordered(rows):
        line: dict[float, list[float]] = {}
        for row in rows:
            if row["what"] == what:
                line.setdefault(row["nfe"], []).append(row["psnr"])
        points = sorted((nfe, sum(each) / len(each)) for nfe, each in line.items())
        is_ours, color = what == "Forecast", f"C{kinds.index(what.rsplit(',', 1)[0]) % 10}"
        axes.plot(
            *zip(*points, strict=True), label=what, color="black" if is_ours else color, marker="o", markersize=4,
            linewidth=2.6 if is_ours else 1.2, linestyle="--" if "even steps" in what else "-",
        )  # fmt: skip
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    figure.savefig(OUT / f"{name}.png", dpi=110)


def main() -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    bundled, names = Bundled(), sys.argv[1:] or [*filter(there, NAMES)]
    if wrong := {*names} - {*NAMES}:
        sys.exit(f"no settings {', '.join(sorted(wrong))}: choose among {', '.join(NAMES)}")
    for seed, name in itertools.product(SEEDS, names):
        Contest(bundled, name, seed).measure_all()
        write(OUT / "summary.md", summary().encode())
        page = PAGE.read_text(encoding="utf-8")
        write(PAGE, PART.sub(lambda found: found[1] + in_short(), page).encode())
        plot(name)


if __name__ == "__main__":
    main()
