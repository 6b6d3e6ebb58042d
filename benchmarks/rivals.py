"""Measures other ways to forecast skipped evaluations beside `Forecast`: docs/results/rivals/*.json and summary.md.

    python benchmarks/rivals.py [ddim-20-5 ...]

Each rival is a few lines, from its paper. All forecast the guided prediction: a forecast that is linear in what the
network puts out gives the same from both predictions. Each is measured on the steps that `Forecast` evaluates, and on
evenly spaced ones, as their authors space them: the first step, the last, and every n-th. Prompts, seed, settings and
rows are those of `forecast.py`.
"""

import json
import math
import sys
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

import torch
from bundled import Bundled
from forecast import BUDGETS, SCHEDULERS, Setting
from torch import Tensor

from diffusers_guidance import EveryStep, Forecast, Handed, History, Step
from diffusers_guidance.files import write
from diffusers_guidance.pipelines.pictures.measures import PSNR
from diffusers_guidance.spaces import Space

OUT = Path(__file__).parents[1] / "docs" / "results" / "rivals"
NAMES = ("ddim-20-5", "dpm-20-5", "euler-20-5", "unipc-20-5", "ddim-20-7.5", "dpm-20-7.5", "ddim-50-5", "dpm-50-5")


@dataclass(frozen=True)
class Rival(Forecast):
    """Evaluates as many steps as `Forecast`, and repays nothing."""

    _: KW_ONLY
    is_even: bool = False
    """Whether the evaluated steps are spaced evenly."""

    def pattern(self, count: int, table: tuple[Space, ...] = (), branches: int = 2) -> tuple[bool, ...]:
        if not self.is_even:
            return super().pattern(count, table, branches)
        evaluations = sum(super().pattern(count, table, branches))
        chosen = {round(i * (count - 1) / (evaluations - 1)) for i in range(evaluations)}
        return tuple(i in chosen for i in range(count))

    def kept(self, step: Step, guided: Tensor) -> Tensor:
        """What is kept of an evaluated step."""
        return guided

    def estimate_of(self, step: Step, known: dict[int, Tensor]) -> Tensor:
        """The prediction of a skipped step, from what is kept."""
        raise NotImplementedError

    def hand(self, step: Step, history: History, guided: Tensor | None) -> Handed:
        history.is_denoised = bool(step.table)
        if guided is None:
            return Handed(self.estimate_of(step, history.guided))
        history.guided[step.index] = self.kept(step, guided.float()).clone()
        return Handed(guided)


@dataclass(frozen=True)
class Held(Rival):
    """The last prediction."""

    def estimate_of(self, step: Step, known: dict[int, Tensor]) -> Tensor:
        return known[max(known)]


@dataclass(frozen=True)
class TaylorSeer(Rival):
    """A Taylor series in the number of steps, by divided differences (arXiv 2503.06923; diffusers' lite mode)."""

    _: KW_ONLY
    order: int = 1

    def estimate_of(self, step: Step, known: dict[int, Tensor]) -> Tensor:
        factors: list[Tensor] = []
        before = None
        for i in sorted(known):
            new = [known[i]]
            for j, factor in enumerate(factors[: self.order]):
                new.append((new[j] - factor) / (i - before))  # type: ignore[operator]
            factors, before = new, i
        away = step.index - max(known)
        return sum(factor * away**j / math.factorial(j) for j, factor in enumerate(factors))  # type: ignore[return-value]


@dataclass(frozen=True)
class AdamsBashforth(Rival):
    """Two-step Adams-Bashforth: a line through the last two, over the noise level."""

    def estimate_of(self, step: Step, known: dict[int, Tensor]) -> Tensor:
        *others, last = sorted(known)
        if not others or step.sigma is None:
            return known[last]
        first, t0, t1 = others[-1], step.table[others[-1]].sigma, step.table[last].sigma
        return known[last] + (known[last] - known[first]) * (step.sigma - t1) / (t1 - t0)


@dataclass(frozen=True)
class Spectrum(Rival):
    """Chebyshev polynomials of degree 4 with ridge 0.1 over all that was evaluated, half blended with a line
    (arXiv 2603.01623)."""

    _: KW_ONLY
    degree: int = 4
    ridge: float = 0.1

    def estimate_of(self, step: Step, known: dict[int, Tensor]) -> Tensor:
        steps = sorted(known)
        t = torch.tensor([*steps, step.index], dtype=torch.float64) / max(step.count - 1, 1) * 2 - 1
        basis = torch.stack([torch.cos(k * torch.arccos(t.clamp(-1, 1))) for k in range(self.degree + 1)], 1)
        fitted, wanted = basis[:-1], basis[-1]
        gram = fitted.T @ fitted + self.ridge * torch.eye(self.degree + 1, dtype=torch.float64)
        weights = fitted @ torch.linalg.solve(gram, wanted)
        curve = sum(float(w) * known[i] for w, i in zip(weights, steps, strict=True))
        line = TaylorSeer.estimate_of(TaylorSeer(nfe=self.nfe), step, known)
        return 0.5 * curve + 0.5 * line  # type: ignore[operator]


@dataclass(frozen=True)
class EasyCache(Rival):
    """What the network adds to its input is held (arXiv 2507.02860), on a fixed schedule."""

    def kept(self, step: Step, guided: Tensor) -> Tensor:
        return guided if step.sample is None else guided - step.sample

    def estimate_of(self, step: Step, known: dict[int, Tensor]) -> Tensor:
        last = known[max(known)]
        return last if step.sample is None else last + step.sample.float()


def rivals(nfe: int) -> dict[str, Forecast]:
    """By name, all with one budget."""
    found: dict[str, Forecast] = {"Forecast": Forecast(nfe=nfe)}
    for is_even, spaced in ((False, "Forecast's steps"), (True, "even steps")):
        found |= {
            f"held, {spaced}": Held(nfe=nfe, is_even=is_even),
            f"Adams-Bashforth 2, {spaced}": AdamsBashforth(nfe=nfe, is_even=is_even),
            f"TaylorSeer, order 1, {spaced}": TaylorSeer(nfe=nfe, is_even=is_even),
            f"TaylorSeer, order 2, {spaced}": TaylorSeer(nfe=nfe, is_even=is_even, order=2),
            f"Spectrum, {spaced}": Spectrum(nfe=nfe, is_even=is_even),
            f"EasyCache, {spaced}": EasyCache(nfe=nfe, is_even=is_even),
        }
    return found


class Contest(Setting):
    """A setting of `forecast.py`, with the rivals' rows."""

    def __init__(self, bundled: Bundled, name: str):
        super().__init__(bundled, name)
        self.path = OUT / f"{name}.json"
        self.rows = json.loads(self.path.read_text()) if self.path.is_file() else []

    def measure_all(self) -> None:
        for nfe in BUDGETS[self.steps]:
            for what, policy in rivals(nfe).items():
                self.measure(what, nfe, policy)
            self.measure("CFG in fewer steps", nfe, EveryStep(), num_inference_steps=nfe // 2)


def summary() -> str:
    """A table of all measured rows, by setting; dB."""
    lines = [
        "# Rivals",
        "",
        f"Mean PSNR in dB to full guidance; 16 held-out prompts, one seed. {PSNR}.",
        "",
    ]
    for name in NAMES:
        path = OUT / f"{name}.json"
        if not path.is_file():
            continue
        rows = json.loads(path.read_text())
        scheduler, steps, scale = name.split("-")
        budgets = BUDGETS[int(steps)]
        title = f"{SCHEDULERS[scheduler].removesuffix('Scheduler')}, {steps} steps, scale {scale}"
        lines += [
            f"| {title} | {' | '.join(f'{nfe} NFEs' for nfe in budgets)} |",
            "|---" + "|---:" * len(budgets) + "|",
        ]
        by = {(row["what"], row["budget"]): row["psnr"] for row in rows}
        for what in dict.fromkeys(row["what"] for row in rows):
            cells = [f"{by[what, nfe]:.1f}" if (what, nfe) in by else "" for nfe in budgets]
            lines.append(f"| {what} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    bundled, names = Bundled(), sys.argv[1:] or NAMES
    if wrong := {*names} - {*NAMES}:
        sys.exit(f"no settings {', '.join(sorted(wrong))}: choose among {', '.join(NAMES)}")
    for name in names:
        Contest(bundled, name).measure_all()
        write(OUT / "summary.md", summary().encode())


if __name__ == "__main__":
    main()
