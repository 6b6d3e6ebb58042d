"""What carries over from one bundled model to the other, both ways: docs/results/carry/*.json and summary.md.

    python benchmarks/carry.py [--prompts 16] [ddim-20-5] [flow-20-5]

On each model it measures what was found on that model itself beside what was found on the other one, at 30, 26 and 20
of 40 NFEs: the pattern of steps that Forecast evaluates with nothing calibrated; how predictions move; the steps that
`search` chooses; the gains that it weighs them by; all of the other's calibration; AG's threshold. Models differ in
scheduler, network and what they predict, so nothing has to carry over. Calibrations are those in samples/calibrations.
Held-out prompts, one seed, mean PSNR to full guidance. Each row is written as it is made.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path

from bundled import Bundled, prompts, there
from diffusers import DiffusionPipeline
from rows import Rows

from diffusers_guidance import AdaptiveGuidance, Calibration, EveryStep, Forecast, Policy, Schedule, samples
from diffusers_guidance.calibration import RECENT
from diffusers_guidance.files import write
from diffusers_guidance.pipelines.attach.schedulers import spaces
from diffusers_guidance.pipelines.pictures.contest import FEWER, Row, Way
from diffusers_guidance.pipelines.pictures.fidelity import Fidelity
from diffusers_guidance.pipelines.search.search import search
from diffusers_guidance.spaces import Space

OUT = Path(__file__).parents[1] / "docs" / "results" / "carry"
BOTH = ("ddim-20-5", "flow-20-5")
SEED, BUDGETS, STEPS = 97531, (30, 26, 20), 20
SAVE = 0.25
"""What AG's threshold is set to save."""


@dataclass(frozen=True)
class Patterned(Forecast):
    """Forecast at given steps."""

    evaluated: tuple[bool, ...] = ()

    def pattern(self, count: int, table: tuple[Space, ...] = (), branches: int = 2) -> tuple[bool, ...]:
        return self.evaluated


@dataclass
class Found:
    """What was found on a model."""

    calibration: Calibration
    table: tuple[Space, ...]

    @classmethod
    def on(cls, pipe: DiffusionPipeline, name: str) -> "Found":
        pipe.scheduler.set_timesteps(STEPS)
        return cls(Calibration.load(samples.CALIBRATIONS / f"{name}.safetensors"), spaces(pipe.scheduler))

    def pattern(self, nfe: int) -> tuple[bool, ...]:
        return Forecast(nfe=nfe).pattern(STEPS, self.table)

    def given_to(self, other: "Found") -> Calibration:
        """Its moments, motions and gains, as if they had been measured on the other model."""
        (mine,), (name,) = self.calibration.denoisers.values(), other.calibration.denoisers
        setting = other.calibration.setting | {"gains": self.calibration.setting["gains"]}
        return replace(self.calibration, setting=setting, denoisers={name: mine})


def ways(own: Found, other: Found) -> Iterator[Way]:
    """What is measured on the model of `own`; "own" and "other" say where it was found."""
    mine, given = own.calibration, other.given_to(own)
    weighed = replace(mine, setting=given.setting)  # the other's gains alone
    for nfe in BUDGETS:

        def way(series: str, where: str, make: Callable[[], Policy], nfe: int = nfe) -> Way:
            return Way(series, f"{series}, {where}, {nfe}", make)

        yield Way(FEWER, f"{FEWER}, , {nfe}", EveryStep, nfe // 2)
        for where, found in (("own", own), ("other", other)):
            yield way("uncalibrated pattern", where, partial(Patterned, nfe=nfe, evaluated=found.pattern(nfe)))
        for where, calibration in (("own", mine), ("other", given)):
            if not calibration.motions:  # a file of the first format
                continue
            yield way("motion", where, partial(Forecast, nfe=nfe, calibration=calibration.portable))
        yield way("search", "own", partial(search, mine, nfe))
        yield way("search: steps", "other", partial(_schedule, given, nfe, mine))
        yield way("search: gains", "other", partial(search, weighed, nfe))
        yield way("search: all", "other", partial(search, given, nfe))
    for where, calibration in (("own", mine), ("other", given)):
        threshold = AdaptiveGuidance.from_calibration(calibration, SAVE)
        yield Way("AG threshold", f"AG threshold, {where}, {2 * STEPS * (1 - SAVE):g}", partial(replace, threshold))


def _schedule(chooses: Calibration, nfe: int, fits: Calibration) -> Schedule:
    """The steps that one calibration chooses, with the coefficients of another."""
    return Schedule(search(chooses, nfe).actions, fits, RECENT, repay=True)


def measure(bundled: Bundled, name: str, found: dict[str, Found], count: int) -> None:
    """All rows of a model that its file does not have."""
    call = bundled.set_up(name)
    (other,) = (each for each in BOTH if each != name)
    digests = {each: found[each].calibration.digest for each in BOTH}
    rows = Rows(OUT / f"{name}.json", calibrations=digests, prompts=count, seed=SEED)
    full = cache(partial(Fidelity, bundled.pipe, prompts(samples.HELDOUT_PROMPTS)[8 : 8 + count], (SEED,), **call))
    for way in ways(found[name], found[other]):
        rows.once(way.label, lambda way=way: asdict(way.measured(full())))


def summary() -> str:
    """By model and budget, each thing found there and on the other model."""
    lines = [
        "| measured on | what | found on | " + " | ".join(f"{nfe} NFEs" for nfe in BUDGETS) + " |",
        "|---|---|---|" + "---:|" * len(BUDGETS),
    ]
    for name in BOTH:
        rows = {label: Row(**row) for label, row in Rows(OUT / f"{name}.json").items()}
        kinds = dict.fromkeys(label.rpartition(", ")[0] for label in rows)
        (other,) = (each for each in BOTH if each != name)
        for kind in kinds:
            what, _, where = kind.rpartition(", ")
            cells = []
            for nfe in BUDGETS:
                row = rows.get(f"{kind}, {nfe}")
                spent = "" if row is None or row.nfe == nfe else f" at {row.nfe:.3g}"
                cells.append("" if row is None else f"{row.psnr:.1f}{spent}")
            where = {"own": name, "other": other}.get(where.strip(), "")
            lines.append(f"| {name} | {what} | {where} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("settings", nargs="*", choices=[*BOTH, []], help="default: both")
    parser.add_argument("--prompts", type=int, default=16, help="how many of the held-out ones")
    options = parser.parse_args()
    if missing := [name for name in BOTH if not there(name)]:
        parser.error(f"the model of {', '.join(missing)} is not on this machine")
    OUT.mkdir(parents=True, exist_ok=True)
    bundled, found = Bundled(), {}
    for name in BOTH:
        bundled.set_up(name)
        found[name] = Found.on(bundled.pipe, name)
    for name in options.settings or BOTH:
        measure(bundled, name, found, options.prompts)
        said = f"{options.prompts} held-out prompts, one seed, mean PSNR in dB to full guidance, 40 NFEs."
        text = f"# What carries over\n\n{said}\n\n{summary()}\nMade by `python benchmarks/carry.py`.\n"
        write(OUT / "summary.md", text.encode())


if __name__ == "__main__":
    main()
