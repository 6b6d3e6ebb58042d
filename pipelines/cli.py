"""The command `diffusers-guidance`."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from diffusers_guidance import samples
from diffusers_guidance.errors import GuidanceError

try:
    import typer
except ImportError:  # the core install; `main` says what to do
    typer = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from diffusers_guidance.pipelines.compare import Comparison


def main() -> None:
    """Entry point of the console script."""
    if any(importlib.util.find_spec(name) is None for name in ("typer", "rich", "matplotlib")):
        print("this command needs a few more packages: pip install 'diffusers-guidance[cli]'", file=sys.stderr)
        sys.exit(1)
    make_app()()


def make_app() -> typer.Typer:
    """All subcommands."""
    from diffusers_guidance.pipelines.app import serve

    app = typer.Typer(
        help="Better guidance for diffusers pipelines.", no_args_is_help=True, pretty_exceptions_show_locals=False
    )
    app.command()(compare)
    app.command("app")(serve)
    return app


def compare(
    prompts: Annotated[
        list[str] | None, typer.Argument(help="One row of pictures each.", show_default="those of --prompts")
    ] = None,
    prompts_file: Annotated[
        Path, typer.Option("--prompts", help="Text file, one prompt a line.", show_default="the bundled ones")
    ] = samples.PROMPTS,
    model: Annotated[
        str,
        typer.Option(help="A pipeline's folder or its name on the Hugging Face hub.", show_default="the bundled one"),
    ] = str(samples.MODEL),
    column: Annotated[
        list[str] | None,
        typer.Option(
            help='Rule, policy or both, and a scale: "APG@15", "Hold", "APG(norm_threshold=5)+AG@12"; '
            '"default" is what attach(pipe) chooses. Repeatable.',
            show_default="CFG, CFG@15, APG@15, AG, LinearAG, Hold, default",
        ),
    ] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Repeatable.", show_default="0")] = None,
    steps: Annotated[int, typer.Option(min=1)] = 20,
    scale: Annotated[float, typer.Option(min=0, help="Guidance scale of columns that name none.")] = 5.0,
    negative: Annotated[str | None, typer.Option(help="Negative prompt of all pictures.")] = None,
    scheduler: Annotated[
        str | None,
        typer.Option(help="Its class, such as DPMSolverMultistepScheduler.", show_default="the pipeline's own"),
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Pictures made at once; fewer need less memory.", show_default="all")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for contact_sheet.png, similarity.png and compare.json.")] = Path(
        "out/compare"
    ),
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, mps, ...", show_default="a GPU if there is one")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16 or float16.", show_default="float32 on a CPU, else bfloat16"),
    ] = None,
) -> None:
    """The same prompts under several rules and policies, side by side: pictures, and what each column cost."""
    from diffusers_guidance.pipelines.compare import COLUMNS, Column
    from diffusers_guidance.pipelines.compare import compare as run

    try:
        columns = [Column.parse(text) for text in column or COLUMNS]
        texts = list(prompts or _read(prompts_file))
        out.mkdir(parents=True, exist_ok=True)  # now rather than after the pictures are made
        with _Bar() as bar:
            pipe = _load(model, device, dtype)
            _swap_scheduler(pipe, scheduler)
            comparison = run(
                pipe, texts, columns, seeds=seed or [0], steps=steps,
                guidance_scale=scale, negative=negative, batch=batch, progress=bar,
            )  # fmt: skip
        files = comparison.save(out)
    except (ValueError, OSError, GuidanceError) as error:
        typer.secho(f"Error: {error}", fg="red", err=True)
        raise typer.Exit(1) from None
    _print_table(comparison)
    for file in files:
        typer.echo(f"wrote {file}")


def _read(file: Path) -> list[str]:
    """The lines of a file that are neither empty nor comments."""
    lines = (line.strip() for line in file.read_text(encoding="utf-8").splitlines())
    found = [line for line in lines if line and not line.startswith("#")]
    if not found:
        raise ValueError(f"{file} holds no prompt; write one a line")
    return found


def _load(model: str, device: str | None, dtype: str | None) -> DiffusionPipeline:
    """The pipeline in a folder or, only where there is no such folder, of that name on the hub."""
    import diffusers
    import torch
    import transformers
    from packaging.version import Version

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    if device is None:
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        device = found.type if found else "cpu"
    known = ("float32", "bfloat16", "float16")
    if dtype not in (None, *known):
        raise ValueError(f"--dtype {dtype}: one of {', '.join(known)}")
    folder = Path(model).expanduser()
    if not folder.is_dir() and (model.count("/") != 1 or model[0] in "./~"):
        raise ValueError(f"--model {model}: no such folder, and a name on the hub has the form owner/name")
    torch_dtype = getattr(torch, dtype or ("float32" if device == "cpu" else "bfloat16"))
    name = "dtype" if Version(diffusers.__version__) >= Version("0.42") else "torch_dtype"  # each warns of the other
    pipe = diffusers.DiffusionPipeline.from_pretrained(
        folder if folder.is_dir() else model,
        **{name: torch_dtype},
        local_files_only=folder.is_dir(),
        use_safetensors=True,
        trust_remote_code=False,
    )
    pipe.set_progress_bar_config(disable=True)
    try:
        return pipe.to(device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device}: {error}") from None


def _swap_scheduler(pipe: Any, name: str | None) -> None:
    """Puts a scheduler of this class, configured as the pipeline's own, in its place."""
    import diffusers

    if name is None:
        return
    scheduler = getattr(diffusers, name, None)
    if not (isinstance(scheduler, type) and issubclass(scheduler, diffusers.SchedulerMixin)):
        fitting = sorted(c.__name__ for c in pipe.scheduler.compatibles)
        raise ValueError(f"--scheduler {name}: diffusers has none of that name; here fit {', '.join(fitting)}")
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)


class _Bar:
    """A progress bar, called with what is running, the steps done and the steps in all."""

    def __enter__(self) -> _Bar:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self.progress = Progress(
            TextColumn("{task.description:<12}"), BarColumn(), MofNCompleteColumn(), TextColumn("steps"),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), transient=True,
        )  # fmt: skip
        self.task = self.progress.add_task("loading", total=None)
        self.progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.progress.stop()

    def __call__(self, what: str, done: int, total: int) -> None:
        self.progress.update(self.task, description=what, completed=done, total=total)


def _print_table(comparison: Comparison) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("rule + policy")
    for title in ("scale", "NFEs", "saved", "s/image", "saturation", "PSNR to CFG"):
        table.add_column(title, justify="right")
    for result in comparison.results:
        psnr = comparison.psnr(result)
        table.add_row(
            result.label,
            f"{result.guidance_scale:g}",
            str(result.nfe),
            f"{result.saved:.0%}",
            f"{result.seconds_per_picture:.2f}",
            f"{result.saturation:.3f}",
            "" if psnr is None else f"{psnr:.1f} dB",
        )
    Console().print(table)
