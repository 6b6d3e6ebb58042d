"""Measures APG alone at a high scale, and stopping guidance alone: docs/results/apart/*.json and .md.

    python benchmarks/apart.py [emoji] [emoji-flow] [--choosing 128] [--judging 48] [--coarse]

1. How well things are told at each scale of CFG: how often the nearest real picture is of the requested thing, and by
   how much it is nearer than the nearest other one. The scale w is the one at which the page starts (`suited.py`).
2. Where the burn comes from: the high scale, 3 w, in one third of the steps, w in the others.
3. What the cap does: the mean norm of the update d at each step of CFG at 3 w, in denoised space.
4. Settings of APG at 3 w with every step guided, chosen on calibration prompts.
5. The chosen settings and the preset beside CFG, each with every step guided and with AG, on held-out prompts.
6. The chosen settings between both scales, for the plot.

It takes 20 steps of the model's own kind of scheduler. It resumes after an interruption, and replaces the results of
another model or of other numbers of pictures. With `--coarse` the grid of 4. has 12 settings instead of 33.
"""

import argparse
import itertools
from dataclasses import dataclass, field
from pathlib import Path

import torch
from bundled import prompts
from matplotlib import pyplot
from rows import Rows
from torch import Tensor

from diffusers_guidance import APG, CFG, AdaptiveGuidance, EveryStep, Prediction, Rule, Step, samples
from diffusers_guidance.files import write
from diffusers_guidance.pipelines.app.suited import suited
from diffusers_guidance.pipelines.bench.metrics import Retrieval
from diffusers_guidance.pipelines.pictures.columns import Column
from diffusers_guidance.pipelines.pictures.make import Case, Result, make
from diffusers_guidance.pipelines.pictures.measures import contrast, saturation
from diffusers_guidance.pipelines.support.loading import fingerprint, load

OUT = Path(__file__).parents[1] / "docs" / "results" / "apart"
MODELS = {"emoji": "DPMSolverMultistepScheduler", "emoji-flow": None}
"""The bundled models, and the schedulers that replace their own."""
SCALES = (1, 2, 3, 4, 5, 6, 8, 10, 15)
STEPS, BATCH = 20, 16
CHOOSING, JUDGING = 1000, 2000
"""The first seeds; each further picture has the next one."""
ROOM = 0.05
"""How far the saturation may be from that at the scale w."""


@dataclass(frozen=True)
class Part(CFG):
    """CFG at `guidance_scale`, and at `other` outside the steps from `first` to `last`, shares of the run."""

    other: float = 5.0
    first: float = 0.0
    last: float = 1.0

    def at(self, step: Step) -> Rule:
        return CFG(step.w if self.first <= (step.index + 0.5) / step.count < self.last else self.other)

    @property
    def is_plain(self) -> bool:
        return False


@dataclass
class Norms:
    """An observer of the update's norm in denoised space at each step."""

    by_step: dict[int, list[float]] = field(default_factory=dict)

    def __call__(self, step: Step, prediction: Prediction | None, guided: Tensor) -> None:
        if prediction is not None and step.space is not None:
            norms = (prediction.cond - prediction.uncond).float().flatten(1).norm(dim=1) * abs(step.space.b)
            self.by_step.setdefault(step.index, []).extend(norms.tolist())


GRID = tuple(
    APG(eta=eta, momentum=momentum, norm_threshold=norm_threshold)
    for eta, momentum, norm_threshold in itertools.product((0.5, 1.0), (0.0, -0.25, -0.5), (1.5, 2.0, 2.25, 2.5, 3.0))
) + tuple(APG(eta=0.0, momentum=0.0, norm_threshold=norm_threshold) for norm_threshold in (2.5, 3.0, 4.0))


COARSE = tuple(
    APG(eta=eta, momentum=momentum, norm_threshold=norm_threshold)
    for eta, momentum, norm_threshold in itertools.product((0.5, 1.0), (0.0, -0.5), (1.5, 2.25, 3.0))
)


class Model:
    """A bundled model, its prompts, and the rows measured so far.

    Args:
        choosing, judging: the most pictures of a row.
        grid: settings of APG to choose among.
    """

    def __init__(self, name: str, choosing: int, judging: int, grid: tuple[APG, ...]):
        torch.set_num_threads(1)
        self.name, self.pipe, self.grid = name, load(name, MODELS[name], "cpu"), grid
        self.suited = suited(name)
        self.retrieval = Retrieval.load(samples.MODEL / Retrieval.FILE)
        asked = (samples.CALIBRATION_PROMPTS, CHOOSING, choosing), (samples.HELDOUT_PROMPTS, JUDGING, judging)
        self.choosing, self.judging = (
            [Case(text, seed + i) for i, text in enumerate(spread(2 * self.known(file), count))]
            for file, seed, count in asked
        )
        about = {"steps": STEPS, "choosing": len(self.choosing), "judging": len(self.judging)}
        self.rows = Rows(OUT / f"{name}.json", model=fingerprint(name), **about)

    def known(self, file: Path) -> list[str]:
        """The file's prompts whose things the retrieval knows."""
        return [text for text in prompts(file) if self.retrieval.concept(text)]

    def run(self, column: Column, cases: list[Case], **more) -> Result:
        return make(self.pipe, cases, column, steps=STEPS, batch=BATCH, **more)

    def measure(self, label: str, column: Column, cases: list[Case]) -> dict:
        """Saturation, contrast, and the share of pictures whose nearest real one fits."""

        def row() -> dict[str, float]:
            result = self.run(column, cases)
            made = result.floats
            margin = self.retrieval.margin(made, [case.prompt for case in cases])
            return {
                "saturation": float(saturation(made).mean()),
                "contrast": float(contrast(made).mean()),
                "retrieval": float((margin > 0).float().mean()),
                "margin": float(margin.mean()),
                "nfe": result.nfe / len(cases),
            }

        return self.rows.once(label, row)

    def norms(self) -> dict[str, float]:
        """The mean norm of the update at each step of CFG at the high scale."""
        seen = Norms()
        self.run(Column("", CFG(), EveryStep(), self.suited.high), self.choosing[:32], observers=[seen])
        return {str(step): sum(each) / len(each) for step, each in seen.by_step.items()}

    def run_all(self) -> None:
        choose = {
            scale: self.measure(f"choose: CFG@{scale:g}", Column("", CFG(), EveryStep(), scale), self.choosing)
            for scale in SCALES
        }
        best, high = self.suited.scale, self.suited.high
        for which, (first, last) in {"first": (0, 1 / 3), "middle": (1 / 3, 2 / 3), "last": (2 / 3, 1)}.items():
            rule = Part(other=best, first=first, last=last)
            self.measure(f"where: {high:g} in the {which} third", Column("", rule, EveryStep(), high), self.choosing)
        self.measure(f"where: {high:g} in all", Column("", CFG(), EveryStep(), high), self.choosing)
        self.rows.once("norms", self.norms)
        grid = {
            rule: self.measure(f"grid: {told(rule)}@{high:g}", Column("", rule, EveryStep(), high), self.choosing)
            for rule in self.grid
        }
        wanted = choose[best]["saturation"]
        near = {rule: row for rule, row in grid.items() if abs(row["saturation"] / wanted - 1) <= ROOM} or grid
        rule = max(near, key=lambda rule: near[rule]["margin"])
        self.rows.once("chosen", lambda: {"scale": best, "APG": told(rule)})
        burnt = {"CFG": CFG(), told(rule): rule, told(self.suited.apg): self.suited.apg}
        for scale, rules in ((best, {"CFG": CFG()}), (high, burnt)):
            for (name, each), (suffix, policy) in itertools.product(
                rules.items(), (("", EveryStep()), ("+AG", AdaptiveGuidance()))
            ):
                self.measure(f"judge: {name}{suffix}@{scale:g}", Column("", each, policy, scale), self.judging)
        for scale in (best, 1.5 * best, 2 * best):
            self.measure(f"between: {told(rule)}@{scale:g}", Column("", rule, EveryStep(), scale), self.choosing)


def spread(texts: list[str], count: int) -> list[str]:
    """So many of them, from all over the list."""
    count = min(count, len(texts))
    return [texts[i * len(texts) // count] for i in range(count)]


def told(rule: APG) -> str:
    return f"APG(eta={rule.eta:g}, momentum={rule.momentum:g}, norm_threshold={rule.norm_threshold:g})"


def page(model: Model) -> str:
    """The rows as tables."""
    rows, parts = model.rows, ("choose", "where", "grid", "between", "judge")
    best, high = model.suited.scale, model.suited.high
    lines = [f"# APG and stopping guidance, each by itself: {model.name}", "", ""]
    for part in parts:
        cases = model.judging if part == "judge" else model.choosing
        base = rows[f"{'judge' if part == 'judge' else 'choose'}: CFG@{best:g}"]
        lines += [
            f"| {part}: {len(cases)} pictures | saturation | of CFG@{best:g}'s | contrast | nearest fits | by | NFEs |",
            "|---|---:|---:|---:|---:|---:|---:|",
        ]
        for label, row in rows.items():
            if label.startswith(f"{part}: "):
                cells = f"{row['saturation']:.3f} | {row['saturation'] / base['saturation'] - 1:+.1%}"
                cells += f" | {row['contrast']:.3f} | {row['retrieval']:.1%} | {row['margin']:.3f} | {row['nfe']:.1f}"
                lines.append(f"| {label.removeprefix(part + ': ')} | {cells} |")
        lines.append("")
    norms = ", ".join(f"{value:.2f}" for value in rows["norms"].values())
    lines += [
        f"Mean norm of d by step, CFG@{high:g}: {norms}.",
        "",
        "Made by `python benchmarks/apart.py`.",
        "",
    ]
    return "\n".join(lines)


def draw(model: Model, path: Path) -> None:
    """Saturation and margin against the scale: CFG and the chosen APG with every step guided, and both with AG."""
    best, high, chosen = model.suited.scale, model.suited.high, model.rows["chosen"]["APG"]
    lines: dict[str, dict[float, dict]] = {}
    for label, row in model.rows.items():
        part, _, rest = label.partition(": ")
        name, _, scale = rest.rpartition("@")
        if part in ("choose", "between") or (part == "grid" and name == chosen):
            lines.setdefault("CFG" if name == "CFG" else "APG", {})[float(scale)] = row
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    for place, measure in zip(axes, ("saturation", "margin"), strict=True):
        for name, line in lines.items():
            place.plot(
                *zip(*sorted((scale, row[measure]) for scale, row in line.items()), strict=True), "o-", label=name
            )
        for name in ("CFG", chosen):
            row, short = model.rows[f"judge: {name}+AG@{high:g}"], "CFG" if name == "CFG" else "APG"
            place.plot(high, row[measure], "s" if short == "CFG" else "D", label=f"{short} + AG, other prompts")
        place.axvline(best, color="#94a3b8", ls=":")
        place.set(xlabel="guidance scale", ylabel=measure)
        place.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.suptitle(f"{model.name}: APG is {chosen}", fontsize="medium")
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", choices=[*MODELS, []], help="default: all")
    parser.add_argument("--choosing", type=int, default=128, help="the most pictures of a row that chooses")
    parser.add_argument("--judging", type=int, default=48, help="the most pictures of a row that judges")
    parser.add_argument("--coarse", action="store_true", help="fewer settings of APG")
    options = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    for name in options.models or MODELS:
        model = Model(name, options.choosing, options.judging, COARSE if options.coarse else GRID)
        model.run_all()
        write(OUT / f"{name}.md", page(model).encode())
        draw(model, OUT / f"{name}.svg")


if __name__ == "__main__":
    main()
