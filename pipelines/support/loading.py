"""Loads pipelines and networks as diffusers and transformers do, but never with weights drawn at random."""

import functools
import hashlib
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import RLock, get_ident
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline, ModelMixin
from packaging.version import Version

from diffusers_guidance import samples
from diffusers_guidance.pipelines.support.solvers import scheduler_of

_one_at_a_time = RLock()


DTYPES = ("float32", "bfloat16", "float16")


class MissingWeights(ValueError):
    """A network's files lack some of its weights."""


def quiet() -> None:
    """Keeps the libraries' warnings to programmers and their progress bars off the terminal."""
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", r"`torch\.jit\.script` is deprecated", FutureWarning)  # in their own code


def best_device() -> str:
    """An accelerator if there is one, else the CPU."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found.type if found else "cpu"


def located(model: str) -> str:
    """The folder of a bundled pipeline, by its name (`samples.NAMES`); a folder here that has the name comes first.

    Raises:
        ValueError: it is bundled in a wheel that is not installed.
    """
    bundled = model in {*samples.NAMES, *samples.models()} and not Path(model).is_dir()
    return str(samples.model(model)) if bundled else model


def load(
    model: str, scheduler: str | None = None, device: str | None = None, dtype: str | None = None,
    cls: Any = DiffusionPipeline,
) -> Any:  # fmt: skip
    """The pipeline in a folder; else the bundled one of that name; else the one of that name on the hub.

    It is read from safetensors. Code that comes with it does not run.

    Args:
        scheduler: a class of diffusers that replaces the pipeline's own, with its configuration.
        device: None for `best_device()`.
        dtype: a name from `DTYPES`; None for float32 on a CPU, else bfloat16.
        cls: the class whose `from_pretrained` loads it.

    Raises:
        ValueError: an argument names something that does not exist; the message says which.
        MissingWeights: the files lack some weights.
    """
    quiet()
    device = device or best_device()
    if dtype not in (None, *DTYPES):
        raise ValueError(f"--dtype {dtype}: one of {', '.join(DTYPES)}")
    if not model:
        raise ValueError("the model is empty: give a pipeline's folder, or its name on the hub")
    model = located(model)
    folder = Path(model).expanduser()
    here = folder.is_dir()
    if not here and not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", model):
        raise ValueError(
            f"the model {model}: no such folder, and a name on the hub has the form owner/name "
            f"(bundled: {', '.join(samples.NAMES)})"
        )
    name = "dtype" if Version(diffusers.__version__) >= Version("0.42") else "torch_dtype"  # each warns about the other
    options = {name: getattr(torch, dtype or ("float32" if device == "cpu" else "bfloat16"))}
    options |= {"local_files_only": here, "use_safetensors": True, "trust_remote_code": False}
    try:
        pipe = load_whole(cls, folder if here else model, **options)
    except OSError as error:
        if here:
            raise
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise ValueError(f"the model {model}: neither on this machine nor available from the hub ({cause})") from error
    pipe.set_progress_bar_config(disable=True)
    try:
        pipe.to(device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device}: {error}") from None
    if scheduler is not None:
        pipe.scheduler = scheduler_of(pipe.scheduler, scheduler)
    return pipe


def load_whole(cls: Any, source: Any, **options: Any) -> Any:
    """`cls.from_pretrained(source, **options)`, for a pipeline or a network.

    Raises:
        MissingWeights: the files lack weights; diffusers and transformers would only warn.
    """
    with _watched() as missing:
        loaded = cls.from_pretrained(source, **options)
    for name, weights in missing.items():
        more = f" and {len(weights) - 1} more" if len(weights) > 1 else ""
        raise MissingWeights(
            f"{str(source)!r} does not have all weights of its {name}: {weights[0]}{more} would be random numbers. "
            "Use a copy that has them under the names the installed transformers and diffusers read, or the versions "
            "of these that it was saved with"
        )
    return loaded


@contextmanager
def _watched() -> Iterator[dict[str, list[str]]]:
    """The weights missing from the files of networks that this thread loads inside the block, by class."""
    from transformers import PreTrainedModel

    missing: dict[str, list[str]] = {}
    thread = get_ident()

    def tell(cls: type, names: list[str]) -> None:
        if names and get_ident() == thread:
            missing[cls.__name__] = sorted(names)

    with _one_at_a_time, ExitStack() as stack:
        for base in (PreTrainedModel, ModelMixin):
            own = base.__dict__["from_pretrained"]
            stack.callback(setattr, base, "from_pretrained", own)
            base.from_pretrained = classmethod(_telling(own.__func__, tell))
        yield missing


def _telling(load: Callable, tell: Callable[[type, list[str]], None]) -> Callable:
    """A `from_pretrained` that reports missing weights."""

    @functools.wraps(load)
    def from_pretrained(cls: type, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        loaded, info = load(cls, *args, output_loading_info=True, **kwargs)
        tell(cls, list(info["missing_keys"]))
        return (loaded, info) if output_loading_info else loaded

    return from_pretrained


def fingerprint(model: str) -> str:
    """Tells models apart: in a folder by their files' names, sizes, beginnings and ends; on the hub by name.

    Only a pipeline's components and their index count, and not files beside them (a card, an evaluation).
    """
    folder = Path(located(model)).expanduser()
    if not folder.is_dir():
        return model
    digest = hashlib.sha256()
    files = [path for path in folder.rglob("*") if path.suffix in (".json", ".safetensors", ".txt")]
    for file in sorted(path for path in files if path.parent != folder or path.name == "model_index.json"):
        size = file.stat().st_size
        with file.open("rb") as content:
            start = content.read(2**16)
            content.seek(max(0, size - 2**16))
            digest.update(f"{file.relative_to(folder)} {size}".encode() + start + content.read())
    return digest.hexdigest()[:16]
