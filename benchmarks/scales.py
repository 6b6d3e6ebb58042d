"""Measures `Forecast` where the guidance scale follows a schedule, beside CFG in fewer steps of the same schedule.

    python benchmarks/scales.py [ddim dpm]

It takes 20 steps, eight held-out prompts and one seed, and schedules whose mean is 5 or near it. It measures the mean
of the pictures' PSNR to guidance at every step, under the same schedule. It writes each row at once to
docs/results/scales/*.json, keeps existing rows, and writes summary.md.
"""

import sys
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import diffusers
from bundled import OUT, Bundled, prompts
from forecast import SCHEDULERS, SEED
from rows import Rows

from diffusers_guidance import CFG, EveryStep, Forecast, samples
from diffusers_guidance.files import write
from diffusers_guidance.pipelines.pictures.columns import Column
from diffusers_guidance.pipelines.pictures.fidelity import Fidelity
from diffusers_guidance.pipelines.pictures.measures import PSNR

STEPS, BUDGETS = 20, (30, 26, 20)
FOLDER = OUT.parent / "scales"
NAMES = ("ddim", "dpm")
SCALES = {
    "constant": lambda steps: 5.0,
    "linear, rising": lambda steps: "linear(2, 8)",
    "linear, falling": lambda steps: "linear(8, 2)",
    "cosine": lambda steps: "cosine(0, 10)",
    "pieces": lambda steps: f"3x{steps // 2}+7",
    "interval": lambda steps: f"1x{steps // 4}+7x{steps // 2}+1",
}
"""By name, the schedule of a run of so many steps."""


def cost(name: str, steps: int) -> int:
    """NFEs of CFG in so many steps: where a schedule rests at 1, a step makes one; the first makes two in any case."""
    return 2 * steps if name != "interval" else steps + steps // 2 + 1


def fewer(name: str, nfe: int) -> int:
    """In how many steps CFG of that schedule makes so many evaluations at most."""
    return max(steps for steps in range(1, STEPS + 1) if cost(name, steps) <= nfe)


def row(full: Callable[[], Fidelity], name: str, nfe: int) -> dict[str, Any]:
    """`Forecast` and CFG in fewer steps at a budget.

    Args:
        full: returns the pictures of full guidance.
    """
    fidelity, steps, scale = full(), fewer(name, nfe), SCALES[name]
    ours = fidelity(Forecast(nfe=nfe))
    theirs = fidelity(Column("", CFG(), EveryStep(), scale(steps)), steps) if steps < STEPS else None
    return {
        "scale": name, "given": scale(STEPS), "full": fidelity.full.nfe / len(fidelity.cases), "budget": nfe,
        "nfe": ours.nfe, "psnr": ours.psnr, "ssim": ours.ssim,
        "fewer": steps, "fewer_psnr": None if theirs is None else theirs.psnr,
    }  # fmt: skip


def measure(bundled: Bundled, scheduler: str) -> None:
    bundled.pipe.scheduler = getattr(diffusers, SCHEDULERS[scheduler]).from_config(bundled.config)
    rows, texts = Rows(FOLDER / f"{scheduler}.json"), prompts(samples.HELDOUT_PROMPTS)[8:16]
    for name, scale in SCALES.items():
        call = {"num_inference_steps": STEPS, "guidance_scale": scale(STEPS)}
        full = cache(partial(Fidelity, bundled.pipe, texts, (SEED,), **call))
        for nfe in BUDGETS:
            rows.once(f"{name}, {nfe}", partial(row, full, name, nfe))


def cell(row: dict) -> str:
    """Forecast, and CFG in fewer steps; with the NFEs where they are not those of the column."""

    def told(psnr: float, nfe: float, bold: str = "") -> str:
        return f"{bold}{psnr:.1f}{bold}{f' at {nfe:g}' if nfe != row['budget'] else ''}"

    other = "full" if row["fewer_psnr"] is None else told(row["fewer_psnr"], cost(row["scale"], row["fewer"]))
    return f"{told(row['psnr'], row['nfe'], '**')} / {other}"


def summary() -> str:
    """A table of all rows."""
    lines = [
        f"| scheduler | scale | full | {' | '.join(map(str, BUDGETS))} |",
        f"|---|---|---:|{'---:|' * len(BUDGETS)}",
    ]
    for scheduler in NAMES:
        rows = Rows(FOLDER / f"{scheduler}.json")
        for name in SCALES:
            found = {nfe: rows[f"{name}, {nfe}"] for nfe in BUDGETS if f"{name}, {nfe}" in rows}
            if not found:
                continue
            first = next(iter(found.values()))
            cells = []
            for nfe in BUDGETS:
                row = found.get(nfe)
                cells.append("" if row is None else cell(row))
            given = first["given"] if isinstance(first["given"], str) else f"{first['given']:g}"
            label = SCHEDULERS[scheduler].removesuffix("Scheduler")
            lines.append(f"| {label} | `{given}` | {first['full']:g} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    names = sys.argv[1:] or NAMES
    if wrong := {*names} - {*NAMES}:
        sys.exit(f"no schedulers {', '.join(sorted(wrong))}: choose among {', '.join(NAMES)}")
    bundled = Bundled()
    for name in names:
        measure(bundled, name)
        text = "Mean PSNR in dB to guidance at every step: `Forecast` / CFG in fewer steps, at so many NFEs"
        write(FOLDER / "summary.md", f"# Forecast under schedules\n\n{text}. {PSNR}.\n\n{summary()}".encode())


if __name__ == "__main__":
    main()
