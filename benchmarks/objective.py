"""Measures the closed-form search's premises on the bundled model: docs/results/policies/objective-*.json and .md.

    python benchmarks/objective.py [dpm-20-5 ...]

* Objectives. That of `predicted_error` is the squared sum of each gap's errors times gains, after repayment. The others
  have no gains, or other powers of rho in the gains, or sum squared errors. For each it measures the rank correlation
  with the PSNR of real runs over 48 random schedules, and the PSNR of the schedules that minimise it, beside even
  spacing. All schedules repay.
* The gains themselves: how much a single skipped step changes the picture, relative to its prediction's error.
* Fits: target, regressors, ridge, per channel.
* Negative prompts inside the calibration, and one outside.

It uses 12 of the calibration's prompts with a new seed. It resumes at the first part that is not measured.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from bundled import OUT, Bundled, named, prompts, report
from diffusers import DiffusionPipeline
from rows import Rows

from diffusers_guidance import Calibration, EveryStep, Fit, Schedule, calibrate, samples, search
from diffusers_guidance.calibration import RECENT, combinations, least_squares, repayments
from diffusers_guidance.pipelines.attach.schedulers import spaces
from diffusers_guidance.pipelines.pictures.fidelity import Fidelity
from diffusers_guidance.pipelines.pictures.measures import PSNR
from diffusers_guidance.schedules import errors_of, even, gap_costs, shortest

SEED = 77_000
BUDGETS = (10, 14, 20, 24, 30, 34)
COUNTS = (7, 10, 12, 15)
"""Full evaluations in the random schedules."""
OURS, SQUARES, LESS, MORE, MOST, PLAIN = OBJECTIVES = (
    "sums, gains with rho^-1/2 (ours)",
    "squares, gains with rho^-1/2",
    "sums, gains with rho^0",
    "sums, gains with rho^-3/4",
    "sums, gains with rho^-1",
    "sums, no gains",
)


def noise_levels(pipe: DiffusionPipeline) -> torch.Tensor:
    """(T,) noise over signal at each step."""
    return torch.tensor([space.noise / space.signal for space in spaces(pipe.scheduler)], dtype=torch.float64)


class Objective:
    """One of OBJECTIVES: smaller is better.

    Args:
        name: which.
        rho: noise over signal at each step.
    """

    def __init__(self, name: str, calibration: Calibration, rho: torch.Tensor):
        self.name, self.calibration = name, calibration
        gains = calibration.gains
        powers = {LESS: 0.5, MORE: -0.25, MOST: -0.5}
        self.gain = torch.ones_like(gains) if name == PLAIN else gains * rho ** powers.get(name, 0.0)

    def __call__(self, schedule: Schedule) -> float:
        if self.name == SQUARES:
            return float((self.gain * errors(schedule)).square().sum())
        gram, w = self.calibration.moments("").total, self.calibration.call["guidance_scale"]
        _, left = repayments(gram, schedule.actions, self.gain.tolist(), w)
        return float(((left @ gram) * left).sum())

    def minimiser(self, nfe: int) -> Schedule:
        """The best schedule of steps evaluated in full or not at all, by a shortest path."""
        gram, steps = self.calibration.moments("").total, self.calibration.steps
        unit = torch.eye(2 * steps, dtype=torch.float64)
        c, d = unit[:steps], unit[steps:]
        guided, both = c + (self.calibration.call["guidance_scale"] - 1) * d, torch.stack([c, d], 1)
        if self.name == SQUARES:
            costs = torch.full((steps + 1, steps, steps + 1), torch.inf, dtype=torch.float64)
            for j in range(steps):
                for i in range(-1, j):
                    known = torch.cat([both[k] for k in (i, j) if k >= 0])
                    off = [each - least_squares(gram, known, each, 1e-6) for each in guided[j + 1 :]]
                    squares = torch.stack([each @ gram @ each for each in off] or [torch.zeros(())]).double()
                    moved = (self.gain[j + 1 :].square() * squares[: steps - j - 1]).cumsum(0)
                    costs[i + 1, j, j + 1 :] = torch.nn.functional.pad(moved, (1, 0))
        else:
            costs = gap_costs(gram, both, guided, self.gain)
        chosen = shortest(costs)[nfe // 2 - 1][1]
        return repaying(["both" if t in chosen else "neither" for t in range(steps)], self.calibration)


def repaying(actions: Sequence[str], calibration: Calibration, fit: Fit = RECENT) -> Schedule:
    return Schedule(actions, calibration, fit, repay=True)


def errors(schedule: Schedule) -> torch.Tensor:
    """(T,) norms of the error of each step's guided prediction, in the calibration's trajectories."""
    moments = schedule.calibration.moments("")
    made = combinations(moments.total, schedule.actions, schedule.fit)
    return errors_of(moments.total[None], schedule.calibration.call["guidance_scale"], made[None])


def ranked(calibration: Calibration, fidelity: Fidelity, rho: torch.Tensor, progress: Callable) -> dict:
    """Random schedules, half of them denser at the start."""
    draw = random.Random(1)
    objectives = [Objective(name, calibration, rho) for name in OBJECTIVES]
    rows: list[dict] = []
    for i in range(48):
        progress("random schedules", i, 48)
        count = COUNTS[i % 4]
        keys = {t: draw.random() ** (2.718 ** (t / 8 * (i % 8 < 4))) for t in range(1, calibration.steps)}
        chosen = {0, *sorted(keys, key=lambda t: -keys[t])[: count - 1]}
        schedule = repaying(["both" if t in chosen else "neither" for t in range(calibration.steps)], calibration)
        predicted = {objective.name: objective(schedule) for objective in objectives}
        rows.append({"evaluated": sorted(chosen), "psnr": fidelity(schedule).psnr} | predicted)
    return {
        "correlation": {name: spearman(rows, name) for name in OBJECTIVES},
        "within a budget": {
            name: sum(spearman([row for row in rows if len(row["evaluated"]) == n], name) for n in COUNTS) / len(COUNTS)
            for name in OBJECTIVES
        },
        "rows": rows,
    }


def spearman(rows: list[dict], objective: str) -> float:
    """Rank correlation of small predictions with high PSNR."""
    ranks = [torch.tensor([row[key] for row in rows]).argsort().argsort().double() for key in (objective, "psnr")]
    return -float(torch.corrcoef(torch.stack(ranks))[0, 1])


def minimisers(calibration: Calibration, fidelity: Fidelity, rho: torch.Tensor, progress: Callable) -> list:
    rows = []
    measured: dict[tuple, float] = {}
    for i, nfe in enumerate(BUDGETS):
        progress("minimisers", i, len(BUDGETS))
        chosen = {name: Objective(name, calibration, rho).minimiser(nfe) for name in OBJECTIVES}
        chosen["even spacing"] = repaying(even(calibration.steps, nfe // 2, "neither"), calibration)
        for schedule in chosen.values():
            if schedule.actions not in measured:
                measured[schedule.actions] = fidelity(schedule).psnr
        rows.append({"nfe": nfe} | {name: measured[schedule.actions] for name, schedule in chosen.items()})
    return rows


def singles(calibration: Calibration, fidelity: Fidelity, rho: torch.Tensor, progress: Callable) -> list:
    """Skips each step alone: the root mean square error of the picture over that of the step's prediction."""
    rows, steps = [], calibration.steps
    for t in range(1, steps):
        progress("single steps", t, steps)
        schedule = Schedule(["neither" if i == t else "both" for i in range(steps)], calibration)
        error = float(errors(schedule)[t]) / calibration.trajectories**0.5
        psnr = fidelity(schedule).psnr
        rows.append({"step": t, "rho": float(rho[t]), "psnr": psnr, "measured gain": 10 ** (-psnr / 20) / error})
    formula = calibration.gains[1:]
    measured = torch.tensor([row["measured gain"] for row in rows], dtype=torch.float64)
    unit = float((formula.log() - measured.log()).mean().exp())  # pictures have their own units
    for row, gain in zip(rows, formula.tolist(), strict=True):
        row["measured gain"] *= unit
        row["gain by the formula"] = gain
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
            row[name] = fidelity(repaying(actions, made, fit)).psnr
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
        for objective in OBJECTIVES
    ]
    return "\n\n".join(
        [
            f"# The objective of the search, {name}",
            f"Mean PSNR in dB to full guidance; 12 prompts. {found['calibration']}. {PSNR}.",
            f"Rank correlation with PSNR over {len(random_rows['rows'])} random schedules:",
            table(correlations),
            "PSNR of the schedules that minimise each objective:",
            table(found["minimisers"]),
            "Gains, measured by skipping one step; scaled so that both columns have the same mean:",
            table(found["single steps"]),
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
        bundled.pipe.scheduler.set_timesteps(settings["num_inference_steps"])
        levels = noise_levels(bundled.pipe)
        calibration = replace(Calibration.load(samples.CALIBRATIONS / f"{name}.safetensors"), source="")
        about = {"digest": calibration.digest, "gains": calibration.gains.tolist()}
        found = Rows(OUT / f"objective-{name}.json", calibration=repr(calibration), **about)

        def fidelity_of(settings: dict = settings, **changed: str) -> Fidelity:
            return Fidelity(bundled.pipe, texts[::5][:12], [SEED], **settings, **changed)

        def channels(settings: dict = settings) -> Calibration:
            return calibrate(bundled.pipe, texts, trajectories=48, batch_size=16, per_channel=True, **settings)

        progress = report(name)
        parts = {
            "random schedules": lambda c=calibration, p=progress, r=levels: ranked(c, fidelity_of(), r, p),
            "minimisers": lambda c=calibration, p=progress, r=levels: minimisers(c, fidelity_of(), r, p),
            "single steps": lambda c=calibration, p=progress, r=levels: singles(c, fidelity_of(), r, p),
            "negative prompts": lambda c=calibration, p=progress: negatives(c, fidelity_of, p),
            "fits": lambda c=calibration, p=progress: fits(c, fidelity_of(), p, channels()),
        }
        for part, measure in parts.items():
            found.once(part, measure)
        text = markdown(name, found | {"calibration": repr(calibration)})
        (OUT / f"objective-{name}.md").write_text(text)
        print(text, flush=True)


if __name__ == "__main__":
    main()
