"""Measures APG alone at a high scale, and stopping guidance alone: docs/results/apart/*.json and .md.

    python benchmarks/apart.py [emoji] [emoji-flow]

1. The scale of CFG at which the nearest real picture shows the requested thing most often: the best scale, w.
2. Where the burn comes from: 3 w in one third of the steps, w in the others.
3. What the cap does: the mean norm of the update d at each step of CFG at 3 w, in denoised space.
4. Settings of APG at 3 w with every step guided, chosen on calibration prompts.
5. The chosen settings beside CFG, each with every step guided and with AG, on things that no calibration prompt names.

It takes 20 steps of the model's own kind of scheduler. It resumes after an interruption, and replaces another model's
results.
"""

import itertools
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from bundled import prompts
from torch import Tensor

from diffusers_guidance import APG, CFG, AdaptiveGuidance, EveryStep, Prediction, Rule, Step, samples
from diffusers_guidance.files import write
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
"""How far the saturation may be from that at the best scale."""


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


class Model:
    """A bundled model, its prompts, and the rows measured so far."""

    def __init__(self, name: str):
        torch.set_num_threads(1)
        folder = samples.MODEL.parent / name
        self.name, self.pipe = name, load(str(folder), MODELS[name], "cpu")
        self.retrieval = Retrieval.load(samples.MODEL / Retrieval.FILE)
        chosen = [text for text in prompts(samples.CALIBRATION_PROMPTS) if self.retrieval.concept(text)]
        named = {self.retrieval.concept(text) for text in chosen}
        others = sorted({*self.retrieval.concepts} - named)
        self.choosing = [Case(text, CHOOSING + i) for i, text in enumerate(chosen * 2)]
        self.judging = [Case(f"an emoji of {concept}", JUDGING + i) for i, concept in enumerate(others)]
        self.path, self.about = OUT / f"{name}.json", {"model": fingerprint(str(folder)), "steps": STEPS}
        found = json.loads(self.path.read_text()) if self.path.is_file() else {}
        self.rows: dict[str, dict] = found["rows"] if found.get("about") == self.about else {}

    def run(self, column: Column, cases: list[Case], **more) -> Result:
        return make(self.pipe, cases, column, steps=STEPS, batch=BATCH, **more)

    def keep(self, label: str, row: dict) -> dict:
        self.rows[label] = row
        write(self.path, (json.dumps({"about": self.about, "rows": self.rows}, indent=1) + "\n").encode())
        print(self.name, label, row, flush=True)
        return row

    def measure(self, label: str, column: Column, cases: list[Case]) -> dict:
        """Saturation, contrast, and the share of pictures whose nearest real one fits."""
        if label in self.rows:
            return self.rows[label]
        result = self.run(column, cases)
        made = result.floats
        fits = self.retrieval(made, [case.prompt for case in cases])
        return self.keep(
            label,
            {
                "saturation": float(saturation(made).mean()),
                "contrast": float(contrast(made).mean()),
                "retrieval": float(fits.nanmean()),
                "nfe": result.nfe / len(cases),
            },
        )

    def run_all(self) -> None:
        choose = {
            scale: self.measure(f"choose: CFG@{scale}", Column("", CFG(), EveryStep(), scale), self.choosing)
            for scale in SCALES
        }
        best = max(choose, key=lambda scale: choose[scale]["retrieval"])
        high = 3 * best
        for which, (first, last) in {"first": (0, 1 / 3), "middle": (1 / 3, 2 / 3), "last": (2 / 3, 1)}.items():
            rule = Part(other=best, first=first, last=last)
            self.measure(f"where: {high} in the {which} third", Column("", rule, EveryStep(), high), self.choosing)
        self.measure(f"where: {high} in all", Column("", CFG(), EveryStep(), high), self.choosing)
        if "norms" not in self.rows:
            seen = Norms()
            self.run(Column("", CFG(), EveryStep(), high), self.choosing[:32], observers=[seen])
            self.keep("norms", {str(step): sum(each) / len(each) for step, each in seen.by_step.items()})
        grid = {
            rule: self.measure(f"grid: {told(rule)}@{high}", Column("", rule, EveryStep(), high), self.choosing)
            for rule in GRID
        }
        wanted = choose[best]["saturation"]
        near = {rule: row for rule, row in grid.items() if abs(row["saturation"] / wanted - 1) <= ROOM} or grid
        rule = max(near, key=lambda rule: near[rule]["retrieval"])
        self.keep("chosen", {"best scale": best, "APG": told(rule)})
        for scale, rules in ((best, {"CFG": CFG()}), (high, {"CFG": CFG(), told(rule): rule})):
            for (name, each), (suffix, policy) in itertools.product(
                rules.items(), (("", EveryStep()), ("+AG", AdaptiveGuidance()))
            ):
                self.measure(f"judge: {name}{suffix}@{scale}", Column("", each, policy, scale), self.judging)


def told(rule: APG) -> str:
    return f"APG(eta={rule.eta:g}, momentum={rule.momentum:g}, norm_threshold={rule.norm_threshold:g})"


def page(model: Model) -> str:
    """The rows as tables."""
    rows, parts = model.rows, ("choose", "where", "grid", "judge")
    best = rows["chosen"]["best scale"]
    lines = [f"# APG and stopping guidance, each by itself: {model.name}", "", ""]
    for part in parts:
        cases = model.judging if part == "judge" else model.choosing
        base = rows[f"{'judge' if part == 'judge' else 'choose'}: CFG@{best}"]
        lines += [
            f"| {part}: {len(cases)} pictures | saturation | of CFG@{best}'s | contrast | nearest one fits | NFEs |",
            "|---|---:|---:|---:|---:|---:|",
        ]
        for label, row in rows.items():
            if label.startswith(f"{part}: "):
                cells = f"{row['saturation']:.3f} | {row['saturation'] / base['saturation'] - 1:+.1%}"
                cells += f" | {row['contrast']:.3f} | {row['retrieval']:.1%} | {row['nfe']:.1f}"
                lines.append(f"| {label.removeprefix(part + ': ')} | {cells} |")
        lines.append("")
    norms = ", ".join(f"{value:.2f}" for value in rows["norms"].values())
    lines += [f"Mean norm of d by step, CFG@{3 * best}: {norms}.", "", "Made by `python benchmarks/apart.py`.", ""]
    return "\n".join(lines)


def main() -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    names = sys.argv[1:] or [*MODELS]
    if wrong := {*names} - {*MODELS}:
        sys.exit(f"no models {', '.join(sorted(wrong))}: choose among {', '.join(MODELS)}")
    for name in names:
        model = Model(name)
        model.run_all()
        write(OUT / f"{name}.md", page(model).encode())


if __name__ == "__main__":
    main()
