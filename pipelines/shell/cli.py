"""The command `diffusers-guidance`."""

from __future__ import annotations

import errno
import importlib.util
import os
import sys
import warnings
from typing import TYPE_CHECKING

from diffusers_guidance.pipelines.shell import examination

if TYPE_CHECKING:
    import typer

WELCOME = """Better guidance for diffusers pipelines, in less time. In Python: handle = attach(pipe)

  diffusers-guidance app                            a page to try it all, on two small models
  diffusers-guidance compare "a rocket"             the same picture in several ways, side by side
  diffusers-guidance generate "a rocket"            a picture, or one for every line of a file
  diffusers-guidance try MODEL --prompt "a rocket"  what a model of your own gains
  diffusers-guidance bench                          what policies save, and what that costs in quality
  diffusers-guidance calibrate mine.safetensors     measure a model, for the next two
  diffusers-guidance search dpm-20-5 --nfe 25       the best steps to evaluate for a budget
  diffusers-guidance frontier dpm-20-5              every policy: quality against evaluations
--help after any of these says more. diffusers-guidance doctor says what is missing here."""


def main() -> None:
    """Entry point of the console script."""
    # Set before torch is imported: threads should sleep while they wait, since spinning ones compete for cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Said as an older diffusers is imported, where torch is made for CUDA and there is no GPU.
    warnings.filterwarnings("ignore", "User provided device_type of 'cuda'", UserWarning)
    alone = len(sys.argv) == 1
    if not alone and any(
        importlib.util.find_spec(name) is None for name in ("typer", "rich", "matplotlib", "pydantic", "torchmetrics")
    ):
        if sys.argv[1:2] == ["doctor"]:  # whose business it is
            examination.main("--no-run" not in sys.argv)
        print("this command needs a few more packages: pip install 'diffusers-guidance[cli]'", file=sys.stderr)
        sys.exit(1)
    from diffusers_guidance.pipelines.support.ending import end_at_once, heed_termination, status
    from diffusers_guidance.pipelines.support.files import sentence

    heed_termination()
    code: str | int | None = 0
    try:
        if alone:
            print(WELCOME, flush=True)
            return
        make_app()()
    except SystemExit as ended:
        code = ended.code
    except KeyboardInterrupt as ended:  # outside the work itself
        print("stopped", file=sys.stderr)
        code = status(ended)
    except OSError as error:  # of what is printed before a command begins
        code = 1
        if error.errno != errno.EPIPE:  # somebody reads on
            error.filename = error.filename or "the standard output"
            print(f"Error: {sentence(error)}", file=sys.stderr)
    end_at_once(code if isinstance(code, int) else int(code is not None))


def make_app() -> typer.Typer:
    """All subcommands."""
    import typer

    from diffusers_guidance.pipelines.app.serve import serve
    from diffusers_guidance.pipelines.shell import bench as bench_command
    from diffusers_guidance.pipelines.shell import commands, common
    from diffusers_guidance.pipelines.shell.doctor import doctor_command
    from diffusers_guidance.pipelines.shell.trial import try_command

    app = typer.Typer(
        cls=common.Commands, no_args_is_help=False, invoke_without_command=True, pretty_exceptions_show_locals=False,
        add_completion=False,
    )  # fmt: skip
    app.callback()(common.options)
    make, measure, prepare = "Make pictures", "Measure", "Prepare a model"
    app.command("app", rich_help_panel=make)(serve)
    app.command("compare", rich_help_panel=make)(commands.compare_command)
    app.command("generate", rich_help_panel=make)(bench_command.generate_command)
    app.command("try", rich_help_panel=measure)(try_command)
    app.command("bench", rich_help_panel=measure)(bench_command.bench_command)
    app.command("frontier", rich_help_panel=measure)(commands.frontier_command)
    app.command("calibrate", rich_help_panel=prepare)(commands.calibrate_command)
    app.command("search", rich_help_panel=prepare)(commands.search_command)
    app.command("search-nas", rich_help_panel=prepare)(commands.search_nas_command)
    app.command("doctor", rich_help_panel="Check")(doctor_command)
    return app
