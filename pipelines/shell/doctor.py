"""The subcommand `doctor` of `diffusers-guidance`."""

from typing import Annotated

import typer

from diffusers_guidance.pipelines.shell.examination import main


def doctor_command(
    run: Annotated[
        bool, typer.Option(help="Make a small picture with the bundled model too; that takes seconds.")
    ] = True,
) -> None:
    """Print what a bug report needs: versions, device, what is available, and whether a first picture works."""
    main(run)
