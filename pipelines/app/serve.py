"""The command that serves the app: `diffusers-guidance app`, or `python app.py` in a checkout."""

import importlib.util
import os
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from diffusers_guidance.pipelines.support.ending import end_at_once, heed_termination, status
from diffusers_guidance.pipelines.support.files import sentence
from diffusers_guidance.pipelines.support.modules import HELP, import_own


def main() -> None:
    """Entry point of `app.py`."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported
    typer.run(serve)


def serve(
    port: Annotated[int, typer.Option(envvar="GRADIO_SERVER_PORT", min=1, max=65535, help="Where it listens.")] = 7860,
    host: Annotated[
        str, typer.Option(envvar="GRADIO_SERVER_NAME", help="0.0.0.0 lets other machines in.")
    ] = "127.0.0.1",
    allow_models: Annotated[
        list[str] | None,
        typer.Option(
            help="A folder or a name on the Hugging Face hub that users may load, or * for all; safetensors "
            "only. Repeatable.",
            show_default="only the bundled models",
        ),
    ] = None,
    own: Annotated[list[str] | None, typer.Option("--with", help=HELP, show_default="none")] = None,
    mcp: Annotated[bool, typer.Option("--mcp", help="Serve as an MCP server too.")] = False,
    share: Annotated[bool, typer.Option("--share", help="Make a public address through gradio.live.")] = False,
) -> None:
    """Serve the page: generate, compare and benchmark with guidance."""
    if mcp and importlib.util.find_spec("mcp") is None:
        typer.secho("--mcp needs one more package: pip install 'diffusers-guidance[mcp]'", fg="red", err=True)
        raise typer.Exit(1)
    _check_address(host, port)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    heed_termination()
    try:
        folder = tempfile.TemporaryDirectory(prefix="diffusers-guidance-", ignore_cleanup_errors=True)
    except OSError as error:
        typer.secho(f"Error: there is no place for the pictures: {error.strerror}; free some room", fg="red", err=True)
        raise typer.Exit(1) from None
    with _until_stopped(), folder as outputs:
        os.environ["GRADIO_TEMP_DIR"] = outputs  # a folder of its own keeps the files of other apps out of reach
        try:
            typer.echo("Loading the model, and making the pictures that the page opens with ...")
            from diffusers_guidance.pipelines.support.loading import quiet

            quiet()
            from diffusers_guidance.pipelines.app.page import launch
        except ImportError as error:
            typer.secho(f"{error}; the app needs a few more packages: pip install 'diffusers-guidance[app]'", err=True)
            raise typer.Exit(1) from None
        try:
            import_own(own or ())
            page, studio = launch(host, port, allow_models or (), mcp, share)
        except (ValueError, OSError) as error:
            said = sentence(error) if isinstance(error, OSError) else error
            typer.secho(f"Error: {said}", fg="red", err=True)
            raise typer.Exit(1) from None
        typer.echo(f"The page is at {page.share_url or page.local_url}; Ctrl-C ends it.")
        if mcp:
            typer.echo(f"The MCP server is at {page.local_url}gradio_api/mcp/ (streamable HTTP).")
        try:
            wait_for_the_end()
        finally:
            studio.device.stop()  # from here on nothing writes into the folder
            page.close(verbose=False)


def wait_for_the_end() -> None:
    """Waits until a signal comes. Other threads serve the page."""
    threading.Event().wait()


@contextmanager
def _until_stopped() -> Iterator[None]:
    """Ends the process with one line and the signal's exit status, after the block has cleaned up."""
    try:
        yield
    except KeyboardInterrupt as ended:
        typer.echo("stopped; all pictures are deleted", err=True)
        end_at_once(status(ended))


def _check_address(host: str, port: int) -> None:
    """Exits with an error that names the options if the page cannot listen at the address."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            if os.name == "posix":  # on other systems it would allow ports in use
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        typer.secho(f"Error: --host {host}, --port {port}: {error.strerror}; choose another", fg="red", err=True)
        raise typer.Exit(1) from None
