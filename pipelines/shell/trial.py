"""The subcommand `try` of `diffusers-guidance`."""

import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from diffusers_guidance import samples
from diffusers_guidance.pipelines.pictures.defaults import SAME
from diffusers_guidance.pipelines.shell.common import (
    SCALE,
    Device,
    Dtype,
    Scheduler,
    Seed,
    reporting,
    scale_of,
    written,
)

if TYPE_CHECKING:
    from diffusers_guidance.pipelines.pictures.trial import Trial


def try_command(
    model: Annotated[
        str,
        typer.Argument(
            help=f"A pipeline's folder, its name on the hub, or a bundled one's: {', '.join(samples.NAMES)}."
        ),
    ],
    prompt: Annotated[list[str], typer.Option(help="Repeatable. More pictures give a better answer.")],
    steps: Annotated[
        int | None, typer.Option(min=2, help="Denoising steps of a picture.", show_default="the pipeline's own")
    ] = None,
    scale: Annotated[str | None, typer.Option(help=SCALE % "", show_default="the pipeline's own")] = None,
    seed: Seed = 0,
    turns: Annotated[int, typer.Option(min=1, help="How often each way is timed.")] = 2,
    same: Annotated[
        float, typer.Option(min=0, help="From this many dB on, a picture counts as plain guidance's.")
    ] = SAME,
    height: Annotated[int | None, typer.Option(min=1, help="In pixels.", show_default="the pipeline's own")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="In pixels.", show_default="the pipeline's own")] = None,
    scheduler: Scheduler = None,
    device: Device = None,
    dtype: Dtype = None,
    out: Annotated[Path, typer.Option(help="Folder for side_by_side.png and try.json.")] = Path("out/try"),
) -> None:
    """Show what your own model gains: its picture plain, with the default, and with a learned Forecast.

    Prints seconds and likeness, a recommendation, and the lines of Python for it.

    If it is stopped, the same command goes on. OUT/unfinished keeps what is done until then.
    """
    sides = {name: value for name, value in (("height", height), ("width", width)) if value is not None}
    with reporting(goes_on=True) as progress:
        from diffusers_guidance.pipelines.pictures.kept import Kept
        from diffusers_guidance.pipelines.pictures.trial import try_out
        from diffusers_guidance.pipelines.support.loading import load

        out.mkdir(parents=True, exist_ok=True)  # fail now rather than after making the pictures
        kept = Kept(out / "unfinished")
        trial = try_out(
            load(model, scheduler, device, dtype), prompt, seed=seed, steps=steps,
            guidance_scale=None if scale is None else scale_of(scale), turns=turns, same=same, progress=progress,
            kept=kept, **sides,
        )  # fmt: skip
        files = _save(trial, out)
        kept.clear()
    _print(trial)
    written(files, f"look at {files[0]}; then put the lines above around your pipeline")


def _save(trial: "Trial", folder: Path) -> list[Path]:
    from diffusers_guidance.files import write
    from diffusers_guidance.pipelines.pictures.sheet import contact_sheet

    sheet = io.BytesIO()
    contact_sheet(trial.comparison, trial.notes).save(sheet, "PNG", optimize=True)
    about = trial.comparison.to_dict() | {"ratios": trial.ratios, "verdict": trial.verdict, "code": trial.code}
    text = json.dumps(about, indent=1, allow_nan=False, ensure_ascii=False)
    contents = {"side_by_side.png": sheet.getvalue(), "try.json": text.encode() + b"\n"}
    for name, content in contents.items():
        write(folder / name, content)
    return [folder / name for name in contents]


def _print(trial: "Trial") -> None:
    from diffusers_guidance.pipelines.pictures.trial import NAMES

    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("")
    for title in ("NFEs", "s/picture", "time to plain", "likeness to plain"):
        table.add_column(title, justify="right")
    for number, (result, psnr) in enumerate(zip(trial.comparison.results, trial.fidelity, strict=True)):
        table.add_row(
            NAMES[number],
            str(result.nfe),
            f"{result.seconds_per_picture:.2f}",
            "" if psnr is None else f"{trial.ratio(number):.0%}",
            "" if psnr is None else f"{psnr:.1f} dB",
        )
    Console().print(table)
    pictures = len(trial.comparison.prompts)
    turns = len(trial.ratios[0])
    typer.echo(
        f"{pictures} picture{'s' * (pictures > 1)}, timed in {turns} turn{'s' * (turns > 1)}. Learned from one more."
    )
    typer.echo(f"\n{trial.verdict[0].upper()}{trial.verdict[1:]}.\n\n{trial.code}\n")
