"""Measures what `Forecast` gains from recorded runs of the model: docs/results/learning/*.json and summary.md.

    python benchmarks/learning.py [ddim-20-5 ...]

Held-out prompts and seed are those of benchmarks/forecast.py; the recorded runs are of calibration prompts. The rows
are: nothing known; some runs of the setting itself; one run of 50 steps of DPM-Solver++; and one at another scale. It
writes each row at once, and keeps existing rows. They have the mean PSNR in dB to full guidance. The runs are kept in
the folder for temporary files; a file with more runs contains those of the file with fewer.
"""

import sys
import tempfile
from pathlib import Path

import diffusers
from bundled import SCHEDULERS, Bundled, prompts
from forecast import BUDGETS, Setting
from rows import Rows

from diffusers_guidance import Calibration, Forecast, calibrate, samples
from diffusers_guidance.files import write
from diffusers_guidance.pipelines.attach.schedulers import spaces
from diffusers_guidance.pipelines.pictures.measures import PSNR

OUT = Path(__file__).parents[1] / "docs" / "results" / "learning"
RUNS = {"ddim-20-5": (1, 2, 4, 8, 16, 200), "dpm-20-5": (1, 2, 4, 8, 16), "euler-20-5": (1, 8)}
OTHERS = {"ddim-20-5": ("dpm-50-5", "dpm-20-7.5")}
NOTHING = "nothing"


def calibration(bundled: Bundled, name: str, runs: int) -> Calibration:
    """The calibration of the first runs of a setting. A file keeps it; further runs are added to it."""
    scheduler, steps, scale = name.split("-")
    before = bundled.pipe.scheduler
    bundled.pipe.scheduler = getattr(diffusers, SCHEDULERS[scheduler]).from_config(bundled.config)
    call = {"num_inference_steps": int(steps), "guidance_scale": float(scale), "trajectories": runs}
    path = Path(tempfile.gettempdir()) / "runs" / f"{name}-{runs}.safetensors"
    try:
        path.parent.mkdir(exist_ok=True)
        fewer = [n for n in RUNS.get(name, ()) if n < runs]
        if fewer and not path.is_file():
            calibration(bundled, name, fewer[-1]).save(path)
        return calibrate(bundled.pipe, prompts(samples.CALIBRATION_PROMPTS), path=path, **call)
    finally:
        bundled.pipe.scheduler = before


def measure(bundled: Bundled, name: str) -> None:
    setting = Setting(bundled, name, OUT)
    own = [(f"{n} run{'s' * (n > 1)}", (name, n)) for n in RUNS[name]]
    others = [(f"1 run of {other}", (other, 1)) for other in OTHERS.get(name, ())]
    wanted = [(NOTHING, None), own[0], *others, *own[1:]]
    for what, source in wanted:
        if all(f"{what}, {nfe}" in setting.rows for nfe in BUDGETS[setting.steps]):
            continue
        made = None if source is None else calibration(bundled, *source).portable
        bundled.pipe.scheduler.set_timesteps(setting.steps)
        table = spaces(bundled.pipe.scheduler)
        for nfe in BUDGETS[setting.steps]:
            policy = Forecast(nfe=nfe, calibration=made)
            # If it uses the power law after all, its pictures are those of nothing known.
            if made is not None and not policy._by(table, setting.scale).is_measured:
                setting.rows.once(f"{what}, {nfe}", lambda nfe=nfe: setting.rows[f"{NOTHING}, {nfe}"])
            setting.measure(what, nfe, policy)


def summary() -> str:
    lines = []
    for name in RUNS:
        rows = Rows(OUT / f"{name}.json")
        scheduler, steps, scale = name.split("-")
        budgets = BUDGETS[int(steps)]
        for what in dict.fromkeys(row.rpartition(", ")[0] for row in rows):
            found = {nfe: f"{rows[f'{what}, {nfe}']['psnr']:.1f}" for nfe in budgets if f"{what}, {nfe}" in rows}
            setting = f"{SCHEDULERS[scheduler].removesuffix('Scheduler')}, {steps}, {scale}"
            lines.append(f"| {setting} | {what} | {' | '.join(found.get(nfe, '') for nfe in budgets)} |")
    return "\n".join(
        ["| scheduler, steps, scale | known | 30 of 40 | 26 | 20 |", "|---|---|---:|---:|---:|", *lines, ""]
    )


def main() -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    bundled, names = Bundled(), sys.argv[1:] or [*RUNS]
    if wrong := {*names} - {*RUNS}:
        sys.exit(f"no settings {', '.join(sorted(wrong))}: choose among {', '.join(RUNS)}")
    for name in names:
        measure(bundled, name)
        write(
            OUT / "summary.md",
            f"# Forecast, with and without recorded runs\n\nMean PSNR in dB. {PSNR}.\n\n{summary()}".encode(),
        )


if __name__ == "__main__":
    main()
