"""What the subcommands of `diffusers-guidance` share: options, loading a pipeline, progress, errors in a line."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import diffusers
import torch
import transformers
import typer
from diffusers import DiffusionPipeline
from packaging.version import Version
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from diffusers_guidance import samples
from diffusers_guidance.errors import GuidanceError
from diffusers_guidance.pipelines.pictures.solvers import scheduler_of
from diffusers_guidance.pipelines.support.files import read_text
from diffusers_guidance.pipelines.support.loading import load_whole

MODEL = str(samples.MODEL)
Model = Annotated[
    str, typer.Option(help="A pipeline's folder or its name on the Hugging Face hub.", show_default="the bundled one")
]
Scheduler = Annotated[
    str | None,
    typer.Option(help="Its class, such as DPMSolverMultistepScheduler.", show_default="the pipeline's own"),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, mps, ...", show_default="a GPU if there is one")]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1)]
Seeds = Annotated[list[int] | None, typer.Option(min=0, max=2**63 - 1, help="Repeatable.", show_default="0")]
Dtype = Annotated[
    str | None, typer.Option(help="float32, bfloat16 or float16.", show_default="float32 on a CPU, else bfloat16")
]


def read_lines(file: Path) -> list[str]:
    """The lines of a file that are neither empty nor comments."""
    lines = (line.strip() for line in read_text(file).splitlines())
    found = [line for line in lines if line and not line.startswith("#")]
    if not found:
        raise ValueError(f"{file} holds no prompt; write one a line")
    return found


def quiet() -> None:
    """Keeps the libraries' advice to programmers, and their own progress bars, off the terminal."""
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def load(model: str, scheduler: str | None, device: str | None, dtype: str | None) -> DiffusionPipeline:
    """The pipeline in a folder or, only where there is no such folder, of that name on the hub.

    Args:
        scheduler: a class of diffusers to put, configured as the pipeline's own, in its place.
    """
    quiet()
    if device is None:
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        device = found.type if found else "cpu"
    known = ("float32", "bfloat16", "float16")
    if dtype not in (None, *known):
        raise ValueError(f"--dtype {dtype}: one of {', '.join(known)}")
    if not model:
        raise ValueError("--model is empty: a pipeline's folder, or its name on the hub")
    folder = Path(model).expanduser()
    if not folder.is_dir() and (model.count("/") != 1 or model[0] in "./~"):
        raise ValueError(f"--model {model}: no such folder, and a name on the hub has the form owner/name")
    torch_dtype = getattr(torch, dtype or ("float32" if device == "cpu" else "bfloat16"))
    name = "dtype" if Version(diffusers.__version__) >= Version("0.42") else "torch_dtype"  # each warns of the other
    try:
        pipe = load_whole(
            DiffusionPipeline,
            folder if folder.is_dir() else model,
            **{name: torch_dtype},
            local_files_only=folder.is_dir(),
            use_safetensors=True,
            trust_remote_code=False,
        )
    except OSError as error:
        if folder.is_dir():
            raise
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise ValueError(f"--model {model}: neither on this machine nor to be had from the hub ({cause})") from error
    pipe.set_progress_bar_config(disable=True)
    try:
        pipe.to(device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device}: {error}") from None
    if scheduler is not None:
        pipe.scheduler = scheduler_of(pipe.scheduler, scheduler)
    return pipe


class Bar:
    """A progress bar, called with what is running, the steps done and the steps in all."""

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
    """A progress bar while it runs; an error that the user can mend is said in a line, without a traceback.

    Args:
        goes_on: whether the same command, given again, goes on where it was interrupted.
    """
    try:
        with Bar() as bar:
            yield bar
    except KeyboardInterrupt:
        typer.echo("stopped; the same command goes on from here" if goes_on else "stopped", err=True)
        raise typer.Exit(130) from None
    except (ValueError, OSError, ImportError, GuidanceError) as error:
        typer.secho(f"Error: {error}", fg="red", err=True)
        raise typer.Exit(1) from None
