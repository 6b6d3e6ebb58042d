"""What the closed-form search rests on, measured on the bundled model: docs/results/policies/objective-*.json and .md.

    python benchmarks/objective.py [dpm-20-5 ...]

* Three objectives: that of `predicted_error`, in which errors add up within a gap, and sums of squared residuals
  with and without gains. For each, the rank correlation with the PSNR of real runs over 48 random schedules, and the
  PSNR of the schedules that minimise it, beside even spacing.
* Fits: target, regressors, ridge, per channel.
* Negative prompts that were calibrated with, and one that was not.

12 prompts of those calibrated with, a seed of their own. Interrupted, it goes on with the first part not measured.
"""

import json
import random
from collections.abc import Callable

import torch
from bundled import OUT, Bundled, named, prompts, report

from diffusers_guidance import Calibration, EveryStep, Fit, Schedule, calibrate, samples, search
from diffusers_guidance.calibration import combinations
from diffusers_guidance.pipelines.fidelity import Fidelity
from diffusers_guidance.pipelines.files import write
from diffusers_guidance.schedules import even, pair_residuals, predicted_error, shortest

SEED = 77_000
BUDGETS = (10, 14, 20, 24, 30, 34)
COUNTS = (7, 10, 12, 15)
"""Full evaluations in the random schedules."""
GAPS, SQUARES, PLAIN = "errors add up within gaps", "squared residuals with gains", "squared residuals"


def errors_of(schedule: Schedule, gain: torch.Tensor) -> torch.Tensor:
    """(T,) norms of the error of each step's guided prediction, times `gain`, in the calibration's trajectories."""
    gram, steps = schedule.calibration.moments("").total, len(schedule.actions)
    off = combinations(gram, schedule.actions, schedule.fit) - torch.eye(2 * steps, dtype=gram.dtype)
    off = off[:steps] + (schedule.calibration.call["guidance_scale"] - 1) * off[steps:]
    return gain * ((off @ gram) * off).sum(-1).clamp(min=0).sqrt()


def gain_of(calibration: Calibration, objective: str) -> torch.Tensor:
    return torch.ones(calibration.steps, dtype=torch.float64) if objective == PLAIN else calibration.gains


def predictions(schedule: Schedule) -> dict[str, float]:
    squares = {
        name: float(errors_of(schedule, gain_of(schedule.calibration, name)).square().sum())
        for name in (SQUARES, PLAIN)
    }
    return {GAPS: predicted_error(schedule)} | squares


def minimiser(calibration: Calibration, objective: str, nfe: int) -> Schedule:
    """The schedule with the least of an objective; for sums of squares by the same shortest path."""
    if objective == GAPS:
        return search(calibration, nfe)
    gram, steps = calibration.moments("").total, calibration.steps
    unit = torch.eye(2 * steps, dtype=torch.float64)
    c, d = unit[:steps], unit[steps:]
    scale = calibration.call["guidance_scale"]
    residuals = pair_residuals(gram, torch.stack([c, d], 1), c + (scale - 1) * d)
    later = torch.arange(steps) > torch.arange(steps)[:, None]
    squares = torch.where(later, (residuals * gain_of(calibration, objective)).square(), 0.0)
    cost = torch.nn.functional.pad(squares.cumsum(-1), (1, 0))
    chosen = shortest(cost)[nfe // 2 - 1][1]
    return Schedule(["both" if t in chosen else "neither" for t in range(steps)], calibration)


def ranked(calibration: Calibration, fidelity: Fidelity, progress: Callable) -> dict:
    """Random schedules, half of them denser at the start."""
    draw = random.Random(1)
    rows = []
    for i in range(48):
        progress("random schedules", i, 48)
        count = COUNTS[i % 4]
        keys = {t: draw.random() ** (2.718 ** (t / 8 * (i % 8 < 4))) for t in range(1, calibration.steps)}
        chosen = {0, *sorted(keys, key=lambda t: -keys[t])[: count - 1]}
        schedule = Schedule(["both" if t in chosen else "neither" for t in range(calibration.steps)], calibration)
        rows.append({"evaluated": sorted(chosen), "psnr": fidelity(schedule).psnr} | predictions(schedule))
    return {
        "correlation": {name: spearman(rows, name) for name in (GAPS, SQUARES, PLAIN)},
        "within a budget": {
            name: sum(spearman([row for row in rows if len(row["evaluated"]) == n], name) for n in COUNTS) / len(COUNTS)
            for name in (GAPS, SQUARES, PLAIN)
        },
        "rows": rows,
    }


def spearman(rows: list[dict], objective: str) -> float:
    """Rank correlation of small predictions with high PSNR."""
    ranks = [torch.tensor([row[key] for row in rows]).argsort().argsort().double() for key in (objective, "psnr")]
    return -float(torch.corrcoef(torch.stack(ranks))[0, 1])


def minimisers(calibration: Calibration, fidelity: Fidelity, progress: Callable) -> list:
    rows = []
    for i, nfe in enumerate(BUDGETS):
        progress("minimisers", i, len(BUDGETS))
        chosen = {name: minimiser(calibration, name, nfe) for name in (GAPS, SQUARES, PLAIN)}
        chosen["even spacing"] = Schedule(even(calibration.steps, nfe // 2, "neither"), calibration)
        rows.append({"nfe": nfe} | {name: fidelity(schedule).psnr for name, schedule in chosen.items()})
    return rows


def fits(calibration: Calibration, fidelity: Fidelity, progress: Callable, channels: Calibration) -> list:
    steps = calibration.steps
    schedules = {
        "25 NFEs, conditional always, evenly": even(steps, 5),
        "30 NFEs, conditional always, evenly": even(steps, 10),
        "16 NFEs, search": search(calibration, 16).actions,
        "24 NFEs, search": search(calibration, 24).actions,
    }
    rows = []
    for i, (label, actions) in enumerate(schedules.items()):
        progress("fits", i, len(schedules))
        row: dict = {"schedule": label}
        for name, made, fit in (
            ("Fit()", calibration, Fit()),
            ('Fit("recent")', calibration, Fit("recent")),
            ('Fit(target="uncond"), as published', calibration, Fit(target="uncond")),
            ("Fit(ridge=1e-3)", calibration, Fit(ridge=1e-3)),
            (f"Fit(), {channels.trajectories} trajectories", channels, Fit()),
            (f"Fit(per_channel=True), {channels.trajectories} trajectories", channels, Fit(per_channel=True)),
        ):
            row[name] = fidelity(Schedule(actions, made, fit)).psnr
        rows.append(row)
    return rows


def negatives(calibration: Calibration, fidelity_of: Callable, progress: Callable) -> list:
    rows = []
    for i, negative in enumerate(("", "noto emoji", "flat emoji")):
        progress("negative prompts", i, 3)
        fidelity = fidelity_of(negative_prompt=negative)
        for nfe in (16, 24, 30):
            rows.append(
                {
                    "negative prompt": negative,
                    "calibrated with, of 200": calibration.prompts.get(negative, 0),
                    "nfe": nfe,
                    "search": fidelity(search(calibration, nfe)).psnr,
                    "CFG, fewer steps": fidelity(EveryStep(), num_inference_steps=nfe // 2).psnr,
                }
            )
    return rows


def markdown(name: str, found: dict) -> str:
    def table(rows: list[dict]) -> str:
        lines = [f"| {' | '.join(rows[0])} |", "|---" * len(rows[0]) + "|"]
        for row in rows:
            cells = (f"{value:.2f}" if isinstance(value, float) else repr(value).strip("'") for value in row.values())
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join(lines)

    random_rows = found["random schedules"]
    correlations = [
        {"objective": objective, "all budgets": random_rows["correlation"][objective]}
        | {"mean within a budget": random_rows["within a budget"][objective]}
        for objective in (GAPS, SQUARES, PLAIN)
    ]
    return "\n\n".join(
        [
            f"# The objective of the search, {name}",
            f"PSNR in dB to full guidance; 12 prompts. {found['calibration']}.",
            f"Rank correlation with PSNR over {len(random_rows['rows'])} random schedules:",
            table(correlations),
            "What the minimisers measure:",
            table(found["minimisers"]),
            "Fits:",
            table(found["fits"]),
            "Negative prompts:",
            table(found["negative prompts"]) + "\n",
        ]
    )


def main() -> None:
    bundled = Bundled()
    texts = prompts(samples.CALIBRATION_PROMPTS)
    for name in named() if len(named()) < 5 else ["dpm-20-5"]:
        settings = bundled.set_up(name)
        calibration = Calibration.load(samples.CALIBRATIONS / f"{name}.safetensors")
        path = OUT / f"objective-{name}.json"
        about = {"calibration": repr(calibration), "digest": calibration.digest}
        found = json.loads(path.read_text()) if path.is_file() else about
        if found["digest"] != about["digest"]:
            found = about

        def fidelity_of(settings: dict = settings, **changed: str) -> Fidelity:
            return Fidelity(bundled.pipe, texts[::5][:12], [SEED], **settings, **changed)

        def channels(settings: dict = settings) -> Calibration:
            return calibrate(bundled.pipe, texts, trajectories=48, batch_size=16, per_channel=True, **settings)

        progress = report(name)
        parts = {
            "random schedules": lambda c=calibration, p=progress: ranked(c, fidelity_of(), p),
            "minimisers": lambda c=calibration, p=progress: minimisers(c, fidelity_of(), p),
            "negative prompts": lambda c=calibration, p=progress: negatives(c, fidelity_of, p),
            "fits": lambda c=calibration, p=progress: fits(c, fidelity_of(), p, channels()),
        }
        for part, measure in parts.items():
            if part not in found:
                found[part] = measure()
                write(path, (json.dumps(found, indent=1) + "\n").encode())
        (OUT / f"objective-{name}.md").write_text(markdown(name, found))
        print(markdown(name, found), flush=True)


if __name__ == "__main__":
    main()
