"""The command `diffusers-guidance`."""

from __future__ import annotations

import importlib.util
import sys
from typing import TYPE_CHECKING

from diffusers_guidance.pipelines.shell import examination

if TYPE_CHECKING:
    import typer


def main() -> None:
    """Entry point of the console script."""
    if any(
        importlib.util.find_spec(name) is None for name in ("typer", "rich", "matplotlib", "pydantic", "torchmetrics")
    ):
        if sys.argv[1:2] == ["doctor"]:  # whose business it is
            examination.main("--no-run" not in sys.argv)
        print("this command needs a few more packages: pip install 'diffusers-guidance[cli]'", file=sys.stderr)
        sys.exit(1)
    make_app()()


def make_app() -> typer.Typer:
    """All subcommands."""
    import typer

    from diffusers_guidance.pipelines.app.serve import serve
    from diffusers_guidance.pipelines.shell import bench as bench_command
    from diffusers_guidance.pipelines.shell import commands
    from diffusers_guidance.pipelines.shell.doctor import doctor_command
    from diffusers_guidance.pipelines.shell.trial import try_command

    app = typer.Typer(
        help="Better guidance for diffusers pipelines.", no_args_is_help=True, pretty_exceptions_show_locals=False
    )
    app.command("compare")(commands.compare_command)
    app.command("app")(serve)
    app.command("calibrate")(commands.calibrate_command)
    app.command("search")(commands.search_command)
    app.command("search-nas")(commands.search_nas_command)
    app.command("frontier")(commands.frontier_command)
    app.command("bench")(bench_command.bench_command)
    app.command("generate")(bench_command.generate_command)
    app.command("try")(try_command)
    app.command("doctor")(doctor_command)
    return app
