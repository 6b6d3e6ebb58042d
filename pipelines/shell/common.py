"""What the subcommands of `diffusers-guidance` share: options, progress, one-line errors."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from diffusers_guidance import samples
from diffusers_guidance.errors import GuidanceError
from diffusers_guidance.pipelines.support.modules import HELP

MODEL = str(samples.MODEL)
Model = Annotated[
    str, typer.Option(help="A pipeline's folder or its name on the Hugging Face hub.", show_default="the bundled one")
]
Scheduler = Annotated[
    str | None,
    typer.Option(help="A scheduler class, such as DPMSolverMultistepScheduler.", show_default="the pipeline's own"),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, mps, ...", show_default="a GPU if there is one")]
With = Annotated[list[str] | None, typer.Option("--with", help=HELP, show_default="none")]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1)]
Seeds = Annotated[list[int] | None, typer.Option(min=0, max=2**63 - 1, help="Repeatable.", show_default="0")]
Dtype = Annotated[
    str | None, typer.Option(help="float32, bfloat16 or float16.", show_default="float32 on a CPU, else bfloat16")
]


class Bar:
    """A progress bar: a `Progress`."""

    def __enter__(self) -> "Bar":
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


@contextmanager
def reporting(goes_on: bool = False) -> Iterator[Bar]:
    """A progress bar while it runs; prints errors that the user can fix in one line, without a traceback.

    Args:
        goes_on: whether the same command resumes after an interruption.
    """
    try:
        with Bar() as bar:
            yield bar
    except KeyboardInterrupt:
        typer.echo("stopped; the same command resumes from here" if goes_on else "stopped", err=True)
        raise typer.Exit(130) from None
    except (ValueError, OSError, ImportError, GuidanceError) as error:
        typer.secho(f"Error: {error}", fg="red", err=True)
        raise typer.Exit(1) from None
