"""The subcommands `bench` and `generate` of `diffusers-guidance`."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated

import typer

from diffusers_guidance import samples
from diffusers_guidance.pipelines.shell.common import (
    MODEL,
    SCALE,
    Device,
    Dtype,
    Model,
    Scheduler,
    With,
    command,
    reporting,
    scale_of,
    written,
)
from diffusers_guidance.pipelines.support.modules import import_own

Ray = Annotated[bool, typer.Option("--ray", help="Spread the work over a Ray cluster, started here if needed.")]
Address = Annotated[str | None, typer.Option(help='Ray cluster to use with --ray, such as "auto".')]


def bench_command(
    suite: Annotated[
        Path,
        typer.Option(
            help=f"YAML file that says what to measure, or a bundled one's name: {', '.join(samples.NAMES)}.",
            show_default=samples.NAMES[0],
        ),
    ] = samples.SUITE,
    own: With = None,
    out: Annotated[Path, typer.Option(help="Folder for results.jsonl, pictures and report.html.")] = Path("out/bench"),
    ray: Ray = False,
    ray_address: Address = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Measure what rules and policies save on a model, in evaluations and seconds, and what that costs in quality.

    If it is stopped, the same command goes on. OUT keeps what is done until then.
    """
    with reporting(goes_on=True) as progress, _cluster(ray, ray_address):
        from diffusers_guidance.pipelines.bench import report as bench_report
        from diffusers_guidance.pipelines.bench.metrics import summarise
        from diffusers_guidance.pipelines.bench.run import bench
        from diffusers_guidance.pipelines.bench.suite import Suite

        _import_own(own, ray)
        wanted = Suite.read(suite)
        lines = bench(wanted, out, device=device, dtype=dtype, on_ray=ray, progress=progress)
        summary = summarise(wanted, lines, out)
        files = bench_report.save(summary, out)
    for verdict in summary.verdicts:
        mark = {True: "met", False: "NOT MET", None: "-"}[verdict.met]
        typer.echo(f"{mark:8} {verdict.column}: {verdict.measure} {verdict.wanted}; found {verdict.found}")
    for name, why in summary.not_measured.items():
        typer.echo(f"not measured: {name} ({why})")
    written(files, f"open {next((file for file in files if file.suffix == '.html'), files[0])} in a browser")


def generate_command(
    jobs: Annotated[
        str,
        typer.Argument(
            help='A prompt; a text file, one prompt a line; or JSON lines: {"prompt": ..., "id"?, "seed"?, '
            '"negative_prompt"?}, and more for the call.'
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the pictures and their metadata.")] = Path("out/generate"),
    column: Annotated[
        str, typer.Option(help='Rule + policy @ scale, such as "APG@12+AG" or "search(25, calibration=FILE)".')
    ] = "default",
    own: With = None,
    model: Model = MODEL,
    scheduler: Scheduler = None,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps of a picture.")] = 20,
    scale: Annotated[str, typer.Option(help=SCALE % ", if --column names none")] = "5",
    batch: Annotated[int, typer.Option(min=1, help="Pictures per call.")] = 4,
    best_of: Annotated[
        int, typer.Option(min=1, help="Try so many seeds for a few steps each, and make the best (arXiv 2505.23343).")
    ] = 1,
    after: Annotated[
        int | None, typer.Option(min=1, help="Steps to try each seed for, with --best-of.", show_default="a fifth")
    ] = None,
    ray: Ray = False,
    ray_address: Address = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Make a picture for a prompt, or one for every line of a file, with its settings.

    If it is stopped, the same command goes on. It makes only the pictures that are not in OUT.
    """
    with reporting(goes_on=True) as progress, _cluster(ray, ray_address):
        from diffusers_guidance.pipelines.pictures.generate import generate, jobs_of

        _import_own(own, ray)
        wanted = jobs_of(jobs)
        made, had = generate(
            wanted, out, column, model=model, scheduler=scheduler, steps=steps, guidance_scale=scale_of(scale),
            batch=batch, best_of=best_of, after=after, device=device, dtype=dtype, on_ray=ray, progress=progress,
        )  # fmt: skip
    typer.echo(f"{made} picture{'s' * (made != 1)} made, {had} already existed")
    typer.echo("Each picture has its settings in it, and beside it as JSON.")
    first = wanted[0]
    compared = command(
        "compare", first.prompt, seed=first.seed or None, negative=first.negative_prompt,
        scheduler=scheduler, model=model,
    )  # fmt: skip
    file = out / f"{first.id}.png" if len(wanted) == 1 else out
    written([file] if made else [], f"look at {file}; to see a prompt in several ways: {compared}")


def _cluster(ray: bool, address: str | None) -> AbstractContextManager[None]:
    if not ray:
        return nullcontext()
    from diffusers_guidance.pipelines.support.ray import cluster

    return cluster(address)


def _import_own(own: list[str] | None, ray: bool) -> None:
    if own and ray:
        raise ValueError("--with and --ray: a cluster's workers do not have your modules; use one of both")
    import_own(own or ())
