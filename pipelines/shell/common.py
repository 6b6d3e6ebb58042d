"""What the subcommands of `diffusers-guidance` share: options, progress, one-line errors, and how they end.

Nothing here or in the subcommands' signatures imports torch, so that `--help` comes at once.
"""

import errno
import re
import shlex
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from typer.core import TyperGroup

from diffusers_guidance import samples
from diffusers_guidance.errors import GuidanceError
from diffusers_guidance.pipelines.support.ending import status
from diffusers_guidance.pipelines.support.files import sentence
from diffusers_guidance.pipelines.support.modules import HELP

if TYPE_CHECKING:
    from diffusers_guidance.scales import Given

MODEL = str(samples.MODEL)
Model = Annotated[
    str,
    typer.Option(
        help=f"A pipeline's folder, its name on the hub, or a bundled one's: {', '.join(samples.NAMES)}.",
        show_default=samples.NAMES[0],
    ),
]
Scheduler = Annotated[
    str | None,
    typer.Option(help="A scheduler class, such as DPMSolverMultistepScheduler.", show_default="the pipeline's own"),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, mps, ...", show_default="a GPU if there is one")]
With = Annotated[list[str] | None, typer.Option("--with", help=HELP, show_default="none")]


def seeds(value: Any) -> Any:
    """Checks seeds here, so that `--help` does not show a limit of nineteen digits."""
    for each in value if isinstance(value, list) else [value or 0]:
        if each >= 2**63:
            raise typer.BadParameter(f"{each} is too large: a whole number below 2**63, please")
    return value


Seed = Annotated[int, typer.Option(min=0, callback=seeds, help="Where the random numbers start.")]
Seeds = Annotated[list[int] | None, typer.Option(min=0, callback=seeds, help="Repeatable.", show_default="0")]
Dtype = Annotated[
    str | None, typer.Option(help="float32, bfloat16 or float16.", show_default="float32 on a CPU, else bfloat16")
]

SCALE = 'Guidance scale%s: a number, or one that changes, such as "linear(9, 3)" or "3x3+7x17".'

Calibrated = Annotated[
    str, typer.Argument(help="A file made by `calibrate`, or the name of a bundled one, such as dpm-20-5.")
]


def options(
    version: Annotated[bool, typer.Option("--version", is_eager=True, help="Show the version and exit.")] = False,
) -> None:
    """Better guidance for diffusers pipelines: the same picture in less time, and high scales without burn."""
    if version:
        typer.echo(f"diffusers-guidance {metadata.version('diffusers-guidance')}")
        raise typer.Exit


class Bar:
    """A `Progress` as a bar with the time left. If the output is not a terminal, it prints a line every ten seconds."""

    every = 10.0

    def __enter__(self) -> "Bar":
        self.console = Console(stderr=True)
        quiet = not self.console.is_terminal
        self.loading = Progress(
            TextColumn("{task.description}"), TimeElapsedColumn(), transient=True, console=self.console, disable=quiet
        )
        self.progress = Progress(
            TextColumn("{task.description:<12}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("left"), TimeRemainingColumn(), transient=True, console=self.console, disable=quiet,
        )  # fmt: skip
        self.loading.add_task("loading the model")
        self.loading.start()
        self.began: float | None = None
        self.first = 0
        self.told = time.monotonic()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop(self.loading if self.began is None else self.progress)

    def _stop(self, shown: Progress) -> None:
        if not shown.disable:  # in older releases of rich, one that shows nothing ends with an empty line
            shown.stop()

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if self.began is None:  # work done before this call took no time in it
            self.began, self.first = now, done
            self._stop(self.loading)
            self.task = self.progress.add_task(what, total=total, completed=done)
            self.progress.start()
        self.progress.update(self.task, description=what, completed=done, total=total)
        if not self.console.is_terminal and now - self.told > self.every and done > self.first:
            self.told = now
            left = (total - done) * (now - self.began) / (done - self.first)
            typer.echo(f"{what}: {done} of {total}, {_duration(left)} left", err=True)


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds > 90 else f"{seconds:.0f} s"


@contextmanager
def reporting(goes_on: bool = False) -> Iterator[Bar]:
    """Shows a progress bar, and prints errors that the user can fix in one line, without a traceback.

    Args:
        goes_on: whether the same command resumes after an interruption.
    """
    resumes = "; the same command continues from here" if goes_on else ""
    try:
        with Bar() as bar:
            yield bar
    except KeyboardInterrupt as ended:
        raise _stopped(ended, f"all written files are complete{resumes}") from None
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        raise _failed(f"{sentence(error)}{resumes if full else ''}") from None
    except (ValueError, ImportError, GuidanceError) as error:
        raise _failed(str(error)) from None


WORDS: dict[Any, str] = {int: "N", list[int]: "N", float: "X", Path: "PATH", str: "TEXT", list[str]: "TEXT", bool: ""}
"""What `--help` says of an option's values. Typer's own words are Python's."""


class Commands(TyperGroup):
    """The commands; before and after the work of each, a wrong usage, an end and a full disk are one line too."""

    def __init__(self, **given: Any):
        super().__init__(**given)
        for option in (each for command in (self, *self.commands.values()) for each in command.params):
            kind = getattr(option, "type_descriptor", None)  # older releases of typer do not have it
            if kind is not None and option.param_type_name == "option" and option.metavar is None:
                option.metavar = WORDS.get(kind.annotation)

    def make_context(self, *given: Any, **more: Any) -> Any:
        try:
            return super().make_context(*given, **more)
        except UsageError as error:  # of what is written before a command
            raise _failed(_amiss(error), error.exit_code) from None

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except UsageError as error:
            raise _failed(_amiss(error, ctx.invoked_subcommand), error.exit_code) from None
        except KeyboardInterrupt as ended:
            raise _stopped(ended, "nothing was being written") from None
        except OSError as error:
            if error.errno == errno.EPIPE:  # nobody reads on
                raise
            error.filename = error.filename or "the standard output"
            raise _failed(sentence(error)) from None


UsageError: Any = typer.BadParameter.__mro__[1]
"""Click's. Typer has a copy of it, which has no public name."""


def _amiss(error: Any, name: str | None = None) -> str:
    """One sentence: what is wrong with the arguments of the command of this name, and what to do."""
    if getattr(error, "param", None) is not None:
        said = _wanted(error)
    elif {"option_name", "possibilities"} <= vars(error).keys():
        said = f"there is no option {error.option_name}"
        said += f" (did you mean {error.possibilities[0]}?)" if error.possibilities else ""
    else:
        said = error.message[:1].lower() + error.message[1:].rstrip(".")
        said = re.sub(r"\. Did (.*)", r" (did \1)", said)
    return f"{said}; see {' '.join(filter(None, ['diffusers-guidance', name, '--help']))}"


def _wanted(error: Any) -> str:
    """What an option or an argument takes, or that it is missing."""
    param = error.param
    name = max(param.opts, key=len) if param.param_type_name == "option" else param.name.upper()
    if not error.message:
        return f"{name} is missing"
    said = error.message.rstrip(".").partition(", unable")[0]
    if not said.startswith("Input should be "):  # a check of ours, or of an older release of typer
        return f"{name}: {said}"
    given = error.__cause__.errors()[0]["input"]
    return f"{name} {str(given)!r} {said.removeprefix('Input ')}"


def scale_of(given: str, least: float = 0.0) -> "Given":
    """What a --scale means, from `least` up."""
    from diffusers_guidance.scales import checked, stand_in

    found = checked(given)
    if found is None or stand_in(found) < least:
        raise ValueError(f"--scale {given}: below {least:g} nothing is guided")
    return found


def _stopped(ended: KeyboardInterrupt, words: str) -> typer.Exit:
    typer.echo(f"stopped: {words}", err=True)
    return typer.Exit(status(ended))


def _failed(words: str, code: int = 1) -> typer.Exit:
    typer.secho(f"Error: {words}", fg="red", err=True)
    return typer.Exit(code)


def command(name: str, *given: object, **options: object) -> str:
    """A command as one writes it in a shell. An option that is None, or the default model, is not written.

    An option whose value is a list is written once for each of its values.
    """
    words = ["diffusers-guidance", name, *map(str, given)]
    for option, value in options.items():
        for each in value if isinstance(value, list) else [value]:
            if each is not None and (option, each) != ("model", MODEL):
                words += [f"--{option}", f"{each:g}" if isinstance(each, float) else str(each)]
    return shlex.join(words)


def written(files: Iterable[Path], then: str = "") -> None:
    """Prints the written files, and what to do next."""
    for file in files:
        typer.echo(f"wrote {file}")
    if then:
        typer.echo(f"next: {then}")
