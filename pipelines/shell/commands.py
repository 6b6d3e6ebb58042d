"""The subcommands `compare`, `calibrate`, `search`, `search-nas` and `frontier` of `diffusers-guidance`."""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from diffusers_guidance import samples
from diffusers_guidance.pipelines.pictures.defaults import COLUMNS, columns_of
from diffusers_guidance.pipelines.shell.common import (
    MODEL,
    SCALE,
    Calibrated,
    Device,
    Dtype,
    Model,
    Scheduler,
    Seed,
    Seeds,
    With,
    command,
    reporting,
    scale_of,
    seeds,
    written,
)
from diffusers_guidance.pipelines.support.modules import import_own

if TYPE_CHECKING:
    from diffusers_guidance.pipelines.pictures.compare import Comparison
    from diffusers_guidance.pipelines.search.frontier import Row
    from diffusers_guidance.policies import Schedule

Prompts = Annotated[Path, typer.Option(help="Text file, one prompt a line.", show_default="the bundled ones")]
Steps = Annotated[int, typer.Option(min=1, help="Denoising steps of a picture.")]
Kept = Annotated[Path, typer.Option("--keep", help="Folder from which a stopped search continues.")]


def compare_command(
    prompts: Annotated[
        list[str] | None, typer.Argument(help="Each prompt makes one row of pictures.", show_default="the bundled ones")
    ] = None,
    prompts_file: Annotated[
        Path | None, typer.Option("--prompts", help="Text file with more prompts, one a line.", show_default="none")
    ] = None,
    model: Model = MODEL,
    column: Annotated[
        list[str] | None,
        typer.Option(
            help='Rule, policy or both, and a scale: "APG@15", "Hold", "APG(norm_threshold=5)+AG@12", '
            '"search(25, calibration=FILE)"; "default" is what attach(pipe) chooses. Repeatable.',
            show_default=f"{', '.join(COLUMNS)}; a bundled model has its own preset",
        ),
    ] = None,
    own: With = None,
    seed: Seeds = None,
    steps: Steps = 20,
    scale: Annotated[str, typer.Option(help=SCALE % " for columns that name none")] = "5",
    negative: Annotated[str | None, typer.Option(help="Negative prompt of all pictures.")] = None,
    scheduler: Scheduler = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Pictures per call; fewer need less memory.", show_default="all")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for contact_sheet.png, similarity.png and compare.json.")] = Path(
        "out/compare"
    ),
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Make the same pictures in several ways, side by side, with the cost of each.

    If it is stopped, the same command goes on. OUT/unfinished keeps what is done until then.
    """
    with reporting(goes_on=True) as progress:
        from diffusers_guidance.pipelines.pictures.columns import Column
        from diffusers_guidance.pipelines.pictures.compare import compare
        from diffusers_guidance.pipelines.pictures.kept import Kept
        from diffusers_guidance.pipelines.pictures.sheet import save
        from diffusers_guidance.pipelines.support.files import read_lines
        from diffusers_guidance.pipelines.support.loading import load, located
        from diffusers_guidance.scales import stand_in

        import_own(own or ())
        columns = [Column.parse(text) for text in column or columns_of(located(model))]
        texts = [*(prompts or ()), *(read_lines(prompts_file) if prompts_file else ())] or read_lines(samples.PROMPTS)
        out.mkdir(parents=True, exist_ok=True)  # fail now rather than after making the pictures
        kept = Kept(out / "unfinished")
        comparison = compare(
            load(model, scheduler, device, dtype), texts, columns, seeds=seed or [0], steps=steps,
            guidance_scale=scale_of(scale), negative=negative, batch=batch, progress=progress, kept=kept,
        )  # fmt: skip
        files = save(comparison, out)
        kept.clear()
    _print_comparison(comparison)
    if any(stand_in(result.guidance_scale) <= 1 and not result.nfe < result.nfe_full for result in comparison.results):
        typer.echo("At a guidance scale of 1 or less there is nothing to guide, and nothing to save.")
    written(files, f"look at {files[0]}; the page lets you play: diffusers-guidance app")


def calibrate_command(
    out: Annotated[Path, typer.Argument(dir_okay=False, help="File to write; an existing calibration is continued.")],
    prompts: Prompts = samples.CALIBRATION_PROMPTS,
    model: Model = MODEL,
    scheduler: Scheduler = None,
    negative: Annotated[
        list[str] | None, typer.Option(help="A negative prompt that you will use. Repeatable.", show_default="none")
    ] = None,
    trajectories: Annotated[int, typer.Option(min=1, help="Full runs to record; more give a better estimate.")] = 16,
    steps: Steps = 20,
    scale: Annotated[str, typer.Option(help=SCALE % " of the runs")] = "5",
    seed: Seed = 0,
    batch: Annotated[int, typer.Option(min=1, help="Pictures per call.")] = 8,
    per_channel: Annotated[bool, typer.Option(help="Measure every latent channel by itself; a larger file.")] = False,
    ray: Annotated[int, typer.Option(min=0, help="Number of shares to make on a Ray cluster; 0 uses no cluster.")] = 0,
    ray_address: Annotated[
        str | None, typer.Option(help='Address of the cluster, such as "auto".', show_default="one on this machine")
    ] = None,
    ray_gpus: Annotated[float, typer.Option(min=0, help="GPUs for each share.")] = 0,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Measure how a model's predictions move, from full runs over prompts and seeds, for Forecast and search.

    If it is stopped, the same command goes on. OUT keeps what is done until then.
    """
    with reporting(goes_on=True) as progress:
        from diffusers_guidance.pipelines.search.calibrate import calibrate, calibrate_on_ray
        from diffusers_guidance.pipelines.support.files import read_lines
        from diffusers_guidance.pipelines.support.loading import load

        settings: dict[str, Any] = {
            "negative_prompts": negative or [""],
            "trajectories": trajectories,
            "num_inference_steps": steps,
            "guidance_scale": scale_of(scale, least=1),
            "seed": seed,
            "batch_size": batch,
            "per_channel": per_channel,
            "path": out,
            "progress": lambda _, done, total: progress("calibrating", done, total),  # the bar has its own time left
        }
        texts = read_lines(prompts)
        if ray:
            made = calibrate_on_ray(
                lambda: load(model, scheduler, device, dtype), texts, shares=ray, address=ray_address,
                resources={"num_gpus": ray_gpus} if ray_gpus else None, **settings,
            )  # fmt: skip
        else:
            made = calibrate(load(model, scheduler, device, dtype), texts, **settings)
    typer.echo(f"{made}, {out.stat().st_size / 1024:.0f} KiB")
    half = made.steps + made.steps % 2
    searched = command("search", out, nfe=half, model=model)
    written([out], f"{searched}; or Forecast(calibration={str(out)!r}) in Python")


def search_command(
    calibration: Calibrated,
    nfe: Annotated[int | None, typer.Option(help="Network evaluations of one picture.")] = None,
    error: Annotated[float | None, typer.Option(help="Instead of --nfe: the largest predicted error.")] = None,
    skip: Annotated[bool, typer.Option(help="Whether steps may evaluate nothing.")] = True,
    refine: Annotated[bool, typer.Option(help="Let real runs on twelve of --prompts decide; needs --model.")] = False,
    runs: Annotated[int, typer.Option(min=1, help="Number of schedules that --refine measures.")] = 24,
    keep: Kept = Path("out/search"),
    prompts: Prompts = samples.CALIBRATION_PROMPTS,
    model: Model = MODEL,
    scheduler: Scheduler = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Find the best schedule for a budget, or the cheapest within an error, from a calibration."""
    with reporting(goes_on=refine) as progress:
        from diffusers_guidance.calibration import Calibration
        from diffusers_guidance.pipelines.pictures.columns import calibration_file
        from diffusers_guidance.pipelines.support.files import read_lines
        from diffusers_guidance.schedules import closed_form, predicted_error

        if nfe is None and error is None:
            raise ValueError("--nfe or --error: say how many network evaluations a picture may take, or its error")
        made = Calibration.load(calibration_file(calibration))
        if refine:
            from diffusers_guidance.pipelines.search.search import search
            from diffusers_guidance.pipelines.support.loading import load

            real = (load(model, scheduler, device, dtype), _dozen(read_lines(prompts)))
            path = _kept(keep, "json", made.digest, real[1])
            found = search(made, nfe, error=error, skip=skip, refine=real, runs=runs, path=path, progress=progress)
        else:  # without diffusers, which takes seconds to import
            found = closed_form(made, nfe, error=error, skip=skip)
    _print_schedule(found)
    typer.echo(f"predicted error: {predicted_error(found):.2%} of what guidance does")
    column = f"search({found.nfe}, calibration={json.dumps(calibration)})"
    scale = made.call["guidance_scale"]
    single = isinstance(scale, int | float)
    at = "" if single else f"@{json.dumps(scale)}"
    compared = command(
        "compare", column=[f"CFG{at}", f"{column}{at}"], scheduler=made.setting["scheduler"]["class"],
        steps=made.call["num_inference_steps"], scale=float(scale) if single else None, model=model,
    )  # fmt: skip
    written([], compared)


def search_nas_command(
    nfe: Annotated[int, typer.Option(help="Network evaluations of one picture.")] = 30,
    prompts: Prompts = samples.CALIBRATION_PROMPTS,
    model: Model = MODEL,
    scheduler: Scheduler = None,
    steps: Annotated[int, typer.Option(min=2, help="Denoising steps of a picture.")] = 20,
    scale: Annotated[str, typer.Option(help=SCALE % " of the runs")] = "5",
    iterations: Annotated[int, typer.Option(min=1, help="Gradient steps of the search.")] = 60,
    batch: Annotated[int, typer.Option(min=1, help="Pictures per iteration.")] = 2,
    keep: Kept = Path("out/search-nas"),
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Search for a policy like the Adaptive Guidance paper: by gradients through the sampler."""
    with reporting(goes_on=True) as progress:
        from diffusers_guidance.pipelines.search.nas import search_nas
        from diffusers_guidance.pipelines.support.files import read_lines
        from diffusers_guidance.pipelines.support.loading import load

        texts = read_lines(prompts)
        asked: dict[str, Any] = {
            "num_inference_steps": steps, "guidance_scale": scale_of(scale, least=1), "iterations": iterations,
            "batch_size": batch,
        }  # fmt: skip
        path = _kept(keep, "safetensors", model, scheduler, device, dtype, texts, nfe, asked)
        found = search_nas(load(model, scheduler, device, dtype), texts, nfe, **asked, path=path, progress=progress)
    _print_schedule(found)
    column = f"Schedule({json.dumps([str(action) for action in found.actions])})"
    compared = command("compare", column=["CFG", column], scheduler=scheduler, steps=steps, scale=scale, model=model)
    written([], compared)


def frontier_command(
    calibration: Calibrated,
    prompts: Annotated[
        Path, typer.Option(help="Held-out prompts, one a line.", show_default="the bundled ones")
    ] = samples.HELDOUT_PROMPTS,
    search_prompts: Annotated[
        Path,
        typer.Option(help="Prompts for searches with real runs, which use twelve.", show_default="the bundled ones"),
    ] = samples.CALIBRATION_PROMPTS,
    model: Model = MODEL,
    scheduler: Scheduler = None,
    seed: Annotated[
        list[int] | None, typer.Option(min=0, callback=seeds, help="Repeatable.", show_default="4321")
    ] = None,
    nfe: Annotated[
        list[int] | None,
        typer.Option(help="Network evaluations (NFEs) of a picture. Repeatable.", show_default="eight"),
    ] = None,
    refine: Annotated[
        list[int] | None, typer.Option(help="A number of NFEs to search with real runs too. Repeatable.")
    ] = None,
    nas: Annotated[
        list[int] | None, typer.Option(help="A number of NFEs for the search of the paper (search-nas). Repeatable.")
    ] = None,
    lpips: Annotated[bool, typer.Option(help="Measure LPIPS too; downloads its weights if missing.")] = False,
    batch: Annotated[int, typer.Option(min=1, help="Pictures per call.")] = 16,
    out: Annotated[Path, typer.Option(help="Folder for frontier.json, .md and .png.")] = Path("out/frontier"),
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Measure every policy on held-out prompts and seeds: likeness to full guidance against network evaluations.

    If it is stopped, the same command goes on. OUT/frontier.json keeps what is done until then.
    """
    with reporting(goes_on=True) as progress:
        from diffusers_guidance.calibration import Calibration
        from diffusers_guidance.files import write
        from diffusers_guidance.pipelines.pictures.columns import calibration_file
        from diffusers_guidance.pipelines.search.frontier import frontier, plot, table
        from diffusers_guidance.pipelines.support.files import read_lines
        from diffusers_guidance.pipelines.support.loading import load

        made = Calibration.load(calibration_file(calibration))
        for option, budgets in (("--nfe", nfe), ("--refine", refine), ("--nas", nas)):
            for budget in budgets or []:
                if not 2 * len(made.denoisers) <= budget <= 2 * made.steps:
                    least, most = 2 * len(made.denoisers), 2 * made.steps
                    raise ValueError(
                        f"{option} {budget}: from {least} to {most} network evaluations, as calibrated for"
                    )
        rows = frontier(
            load(model, scheduler, device, dtype), made, read_lines(prompts), seeds=seed or [4321],
            search_prompts=_dozen(read_lines(search_prompts)), nfes=nfe, refine=refine or [], nas=nas or [],
            batch_size=batch, lpips=lpips, path=out / "frontier.json", progress=progress,
        )  # fmt: skip
        plot(rows, out / "frontier.png", repr(made))
        write(out / "frontier.md", table(rows).encode())
    _print_frontier(rows)
    files = [out / f"frontier.{ending}" for ending in ("json", "md", "png")]
    written(files, f"look at {files[-1]}; up and to the left is better")


def _kept(folder: Path, ending: str, *about: object) -> Path:
    """A file of its own for every search."""
    return folder / f"{hashlib.sha256(repr(about).encode()).hexdigest()[:12]}.{ending}"


def _dozen(prompts: list[str]) -> list[str]:
    """Twelve of the prompts, evenly spread, since files tend to be sorted; all if there are fewer."""
    return [prompts[i * len(prompts) // 12] for i in range(12)] if len(prompts) > 12 else prompts


def _print_frontier(rows: "list[Row]") -> None:
    from diffusers_guidance.pipelines.pictures.measures import PSNR

    table = Table(box=None, header_style="bold", pad_edge=False)
    for title in ("NFEs", "mean PSNR", "SSIM"):
        table.add_column(title, justify="right")
    table.add_column("policy")
    for row in sorted(rows, key=lambda row: (row.nfe, -row.psnr)):
        nfe = f"{row.nfe:.2f}".removesuffix(".00")
        table.add_row(nfe, f"{row.psnr:.1f} dB", f"{row.ssim:.3f}", f"{row.series}: {row.label}")
    Console().print(table)
    typer.echo(f"{PSNR}.")


def _print_comparison(comparison: "Comparison") -> None:
    from diffusers_guidance.pipelines.pictures.measures import EQUAL, PSNR
    from diffusers_guidance.scales import text

    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("rule + policy")
    for title in ("scale", "NFEs", "saved", "s/image", "saturation", "PSNR to CFG"):
        table.add_column(title, justify="right")
    for result in comparison.results:
        psnr = comparison.psnr(result)
        table.add_row(
            result.label,
            text(result.guidance_scale),
            str(result.nfe),
            f"{result.saved:.0%}",
            f"{result.seconds_per_picture:.2f}",
            f"{result.saturation:.3f}",
            "" if psnr is None else "the same" if psnr >= EQUAL else f"{psnr:.1f} dB",
        )
    Console().print(table)
    typer.echo(f"{PSNR}.")


def _print_schedule(schedule: "Schedule") -> None:
    typer.echo(" ".join(f"{i}:{action}" for i, action in enumerate(schedule.actions)))
    typer.echo(f"{schedule.nfe} of {2 * len(schedule.actions)} NFEs")
    typer.echo(json.dumps([*schedule.actions]))
