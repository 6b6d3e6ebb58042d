"""Measures the frontier of the bundled model with its calibrations: docs/results/policies/*.json, .md and .png.

    python benchmarks/policies.py [--quick] [dpm-20-5 ...]

It uses 16 held-out prompts, 8 at 50 steps, with a seed not used for calibrating. With --quick, and at 50 steps, it
takes only five budgets and no searches by real runs, which take minutes each. It resumes after an interruption, and
replaces results of another calibration. The summary covers all measured settings.
"""

import sys
from pathlib import Path

from bundled import NAMES, OUT, Bundled, named, prompts, report

from diffusers_guidance import Calibration, CalibrationMismatch, samples
from diffusers_guidance.pipelines.pictures.measures import PSNR
from diffusers_guidance.pipelines.search.frontier import (
    OTHERS,
    OURS,
    SEARCHED,
    best_at,
    cheapest,
    frontier,
    plot,
    read,
    table,
)

SEED = 4321
BUDGETS = (0.625, 0.75, 0.875)
"""Shares of the NFEs of full guidance: 25, 30 and 35 of 40."""
NEAR = 0.7
"""28 of 40: one more budget for policies close to full guidance."""
SEARCHES = {"dpm-20-5": {"refine": (0, 1, 2), "nas": (1,)}, "dpm-20-7.5": {"refine": (0,)}}
"""The budgets for searches by real runs, and for the paper's method."""
QUICK = "--quick" in sys.argv


def measure(bundled: Bundled, name: str) -> None:
    settings = bundled.set_up(name)
    calibration = Calibration.load(samples.CALIBRATIONS / f"{name}.safetensors")
    steps, full = settings["num_inference_steps"], 2 * calibration.steps
    budgets = [round(full * share) for share in BUDGETS]
    small = QUICK or steps > 20
    searches = {} if QUICK else SEARCHES.get(name, {})
    frontier(
        bundled.pipe,
        calibration,
        prompts(samples.HELDOUT_PROMPTS)[: pictures(name)],
        search_prompts=prompts(samples.CALIBRATION_PROMPTS)[::6],
        seeds=[SEED],
        nfes=[full // 2, round(NEAR * full), *budgets] if small else None,
        stops=[budget - calibration.steps for budget in budgets] if small else None,
        path=OUT / f"{name}.json",
        progress=report(name),
        **{method: [budgets[i] for i in which] for method, which in searches.items()},
    )


def pictures(name: str) -> int:
    return 16 if int(name.split("-")[1]) <= 20 else 8


def told(name: str) -> str:
    return f"Means over {pictures(name)} held-out prompts with one seed"


def summary() -> str:
    """The PSNR of the schedules and of the best other policies at three budgets, and the NFEs for 35 and 40 dB."""
    lines = [
        f"Mean PSNR in dB to full guidance over 16 held-out prompts (8 at 50 steps) and one seed. {PSNR}.",
        "",
        "| setting | NFEs | `search` | best of ours | best of all others | which |",
        "|---|---:|---:|---:|---:|---|",
    ]
    costs = ["| setting | cheapest of ours within 35 dB | within 40 dB | cheapest of the others within 35 dB |"]
    costs.append("|---|---:|---:|---:|")
    for name in (name for name in NAMES if (OUT / f"{name}.json").exists()):
        rows = read(OUT / f"{name}.json")
        full = 2 * int(name.split("-")[1])
        for nfe in [round(full * share) for share in BUDGETS]:
            found = [best_at(rows, series, nfe) for series in ([SEARCHED], OURS, OTHERS)]
            if all(found):
                cells = [f"{psnr:.1f} dB" for psnr, _ in found]
                lines.append(f"| {name} | {nfe} of {full} | {' | '.join(cells)} | {found[-1][1]} |")
        near = [
            cheapest([row for row in rows if row.series in series], psnr)
            for series, psnr in ((OURS, 35), (OURS, 40), (OTHERS, 35))
        ]
        if rows:
            least = {row.series: min(each.nfe for each in rows if each.series == row.series) for row in near if row}
            cells = [
                f"{'≤ ' if row.nfe == least[row.series] else ''}{row.nfe:g} ({row.label}: {row.psnr:.1f} dB)"
                if row
                else "none"
                for row in near
            ]
            costs.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *costs]) + "\n"


def _content(file: Path) -> bytes | None:
    return file.read_bytes() if file.exists() else None


def main() -> None:
    bundled = Bundled()
    for name in named():
        record, before = OUT / f"{name}.json", _content(OUT / f"{name}.json")
        try:
            measure(bundled, name)
        except CalibrationMismatch as error:
            print(f"{error}\nmeasuring it anew", flush=True)
            (OUT / f"{name}.json").unlink()
            measure(bundled, name)
        rows = read(record)
        (OUT / f"{name}.md").write_text(f"# Frontier, {name}\n\n{told(name)}; ours in bold.\n\n{table(rows)}")
        if _content(record) != before or not (OUT / f"{name}.png").exists():  # another matplotlib draws other bytes
            plot(rows, OUT / f"{name}.png", f"bundled model, {name} (scheduler, steps, guidance scale)")
        (OUT / "summary.md").write_text(f"# Frontiers in short\n\n{summary()}")
        print(table(rows))


if __name__ == "__main__":
    main()
