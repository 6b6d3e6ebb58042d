"""The subcommands `calibrate`, `search`, `search-nas` and `frontier` of `diffusers-guidance`."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffusers_guidance import samples
from diffusers_guidance.errors import GuidanceError

if TYPE_CHECKING:
    from diffusers_guidance.policies import Schedule

Model = Annotated[
    str, typer.Option(help="A pipeline's folder or its name on the Hugging Face hub.", show_default="the bundled one")
]
Scheduler = Annotated[
    str | None,
    typer.Option(help="Its class, such as DPMSolverMultistepScheduler.", show_default="the pipeline's own"),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, mps, ...", show_default="a GPU if there is one")]
Dtype = Annotated[
    str | None, typer.Option(help="float32, bfloat16 or float16.", show_default="float32 on a CPU, else bfloat16")
]
Calibrated = Annotated[Path, typer.Argument(help="A file made by `calibrate`.")]
Prompts = Annotated[Path, typer.Option(help="Text file, one prompt a line.", show_default="the bundled ones")]
MODEL = str(samples.MODEL)


def calibrate_command(
    out: Annotated[Path, typer.Argument(help="File to write; what is there already is gone on with.")],
    prompts: Prompts = samples.CALIBRATION_PROMPTS,
    model: Model = MODEL,
    scheduler: Scheduler = None,
    negative: Annotated[
        list[str] | None, typer.Option(help="Negative prompts to be ready for; repeatable.", show_default="none")
    ] = None,
    trajectories: Annotated[int, typer.Option(min=1)] = 200,
    steps: Annotated[int, typer.Option(min=1)] = 20,
    scale: Annotated[float, typer.Option(min=1)] = 5.0,
    seed: int = 0,
    batch: Annotated[int, typer.Option(min=1, help="Pictures made at once.")] = 8,
    per_channel: Annotated[bool, typer.Option(help="A Gram matrix for each channel.")] = False,
    ray: Annotated[int, typer.Option(min=0, help="Share the work among so many Ray workers; 0 is without Ray.")] = 0,
    ray_address: Annotated[str | None, typer.Option(help='Of the cluster: "auto", say.')] = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Runs full guidance over prompts and seeds, and keeps how its predictions go together."""
    from diffusers_guidance.pipelines.calibrate import calibrate, calibrate_on_ray
    from diffusers_guidance.pipelines.cli import _load, _read, _swap_scheduler

    def load() -> Any:
        pipe = _load(model, device, dtype)
        _swap_scheduler(pipe, scheduler)
        return pipe

    with _reporting() as progress:
        settings: dict[str, Any] = {
            "negative_prompts": negative or [""],
            "trajectories": trajectories,
            "num_inference_steps": steps,
            "guidance_scale": scale,
            "seed": seed,
            "batch_size": batch,
            "per_channel": per_channel,
            "path": out,
            "progress": progress,
        }
        if ray:
            made = calibrate_on_ray(load, _read(prompts), workers=ray, address=ray_address, **settings)
        else:
            made = calibrate(load(), _read(prompts), **settings)
    typer.echo(f"{made}\nwrote {out}, {out.stat().st_size / 1024:.0f} KiB")


def search_command(
    calibration: Calibrated,
    nfe: Annotated[int | None, typer.Option(help="Network evaluations of one picture.")] = None,
    error: Annotated[float | None, typer.Option(help="Instead: the most error predicted, 0.05 say.")] = None,
    skip: Annotated[bool, typer.Option(help="Whether steps may evaluate nothing at all.")] = True,
    refine: Annotated[bool, typer.Option(help="Let real runs on --prompts decide; needs --model.")] = False,
    runs: Annotated[int, typer.Option(min=1, help="Schedules that --refine measures.")] = 24,
    prompts: Prompts = samples.CALIBRATION_PROMPTS,
    model: Model = MODEL,
    scheduler: Scheduler = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """The best schedule of evaluations for a budget, or the cheapest for an error, from a calibration."""
    from diffusers_guidance.calibration import Calibration
    from diffusers_guidance.pipelines.cli import _load, _read, _swap_scheduler
    from diffusers_guidance.pipelines.searching import search
    from diffusers_guidance.search import predicted_error

    with _reporting() as progress:
        made = Calibration.load(calibration)
        real = None
        if refine:
            pipe = _load(model, device, dtype)
            _swap_scheduler(pipe, scheduler)
            real = (pipe, _read(prompts)[:12])
        found = search(made, nfe, error=error, skip=skip, refine=real, runs=runs, progress=progress)
    _show(found)
    typer.echo(f"predicted error: {predicted_error(found):.2%} of what guidance does")


def search_nas_command(
    nfe: Annotated[int, typer.Option(help="Network evaluations of one picture.")] = 30,
    prompts: Prompts = samples.CALIBRATION_PROMPTS,
    model: Model = MODEL,
    scheduler: Scheduler = None,
    steps: Annotated[int, typer.Option(min=2)] = 20,
    scale: Annotated[float, typer.Option(min=1)] = 5.0,
    iterations: Annotated[int, typer.Option(min=1)] = 60,
    batch: Annotated[int, typer.Option(min=1, help="Pictures of an iteration.")] = 2,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """The policy search of the Adaptive Guidance paper, by gradients through the sampler."""
    from diffusers_guidance.pipelines.cli import _load, _read, _swap_scheduler
    from diffusers_guidance.pipelines.nas import search_nas

    with _reporting() as progress:
        pipe = _load(model, device, dtype)
        _swap_scheduler(pipe, scheduler)
        found = search_nas(
            pipe,
            _read(prompts),
            nfe,
            num_inference_steps=steps,
            guidance_scale=scale,
            iterations=iterations,
            batch_size=batch,
            progress=progress,
        )
    _show(found)


def frontier_command(
    calibration: Calibrated,
    prompts: Annotated[
        Path, typer.Option(help="Held-out prompts, one a line.", show_default="the bundled ones")
    ] = samples.HELDOUT_PROMPTS,
    search_prompts: Prompts = samples.CALIBRATION_PROMPTS,
    model: Model = MODEL,
    scheduler: Scheduler = None,
    seed: Annotated[list[int] | None, typer.Option(help="Repeatable.", show_default="4321")] = None,
    nfe: Annotated[list[int] | None, typer.Option(help="Budgets; repeatable.", show_default="eight of them")] = None,
    refine: Annotated[list[int] | None, typer.Option(help="Budgets to search by real runs too; repeatable.")] = None,
    nas: Annotated[list[int] | None, typer.Option(help="Budgets for the paper's search; repeatable.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Pictures made at once.")] = 16,
    out: Annotated[Path, typer.Option(help="Folder for frontier.json and frontier.png.")] = Path("out/frontier"),
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Fidelity to full guidance against NFEs, for every policy, on held-out prompts and seeds."""
    from diffusers_guidance.calibration import Calibration
    from diffusers_guidance.pipelines.cli import _load, _read, _swap_scheduler
    from diffusers_guidance.pipelines.frontier import frontier, plot

    with _reporting() as progress:
        made = Calibration.load(calibration)
        pipe = _load(model, device, dtype)
        _swap_scheduler(pipe, scheduler)
        full = 2 * made.steps
        chosen = {"budgets": [n / full for n in nfe]} if nfe else {}
        rows = frontier(
            pipe,
            made,
            _read(prompts),
            search_prompts=_read(search_prompts)[::6],
            seeds=seed or [4321],
            refine=[n / full for n in refine or []],
            nas=[n / full for n in nas or []],
            batch_size=batch,
            path=out / "frontier.json",
            progress=progress,
            **chosen,
        )
        plot(rows, out / "frontier.png", repr(made))
    for row in sorted(rows, key=lambda row: (row.nfe, -row.psnr)):
        typer.echo(f"{row.nfe:6.2f} NFEs  {row.psnr:6.2f} dB  SSIM {row.ssim:.4f}  {row.series}: {row.label}")
    typer.echo(f"wrote {out / 'frontier.json'}\nwrote {out / 'frontier.png'}")


@contextmanager
def _reporting() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar; what goes wrong is said in a line."""
    from diffusers_guidance.pipelines.cli import _Bar

    try:
        with _Bar() as bar:
            yield bar
    except (ValueError, OSError, ImportError, GuidanceError) as error:
        typer.secho(f"Error: {error}", fg="red", err=True)
        raise typer.Exit(1) from None


def _show(schedule: "Schedule") -> None:
    typer.echo(" ".join(f"{i}:{action}" for i, action in enumerate(schedule.actions)))
    typer.echo(f"{schedule.nfe} of {2 * len(schedule.actions)} NFEs")
    typer.echo(json.dumps(list(schedule.actions)))
