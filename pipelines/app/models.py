"""The models of the app: the bundled ones, and one of the user's at a time."""

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
from diffusers import AutoPipelineForText2Image, DiffusionPipeline

from diffusers_guidance import samples
from diffusers_guidance.pipelines.support.loading import MissingWeights, best_device, load

log = logging.getLogger(__name__)


class Models:
    """The bundled pipelines, and one user's model at a time if the server allows it.

    Args:
        allowed: names and folders that may be loaded; "*" allows all.
    """

    def __init__(self, allowed: Sequence[str] = ()):
        self.allowed = tuple(allowed)
        self.device = best_device()
        self._pipes: dict[str, DiffusionPipeline] = {}

    def get(self, name: str) -> DiffusionPipeline:
        """The pipeline of that name, loaded if needed.

        Raises:
            ValueError: the server does not allow the model, or it cannot be loaded.
        """
        if name not in self.offered and "*" not in self.allowed:
            raise ValueError(f"This server does not allow the model {name!r} (see its option --allow-models).")
        if name not in self._pipes:
            ours = samples.models()
            self._pipes = {key: pipe for key, pipe in self._pipes.items() if key in ours}  # one user's model at a time
            self._pipes[name] = self._load(name)
        return self._pipes[name]

    @property
    def offered(self) -> list[str]:
        """The names of the models to choose from."""
        return [*samples.models(), *(name for name in self.allowed if name != "*")]

    def _load(self, name: str) -> DiffusionPipeline:
        dtype = "float32" if self.device == "cpu" else "float16"
        if name in samples.models():
            return load(str(samples.models()[name]), device=self.device, dtype=dtype)
        try:
            _refuse_foreign(name)
            return load(name, device=self.device, dtype=dtype, cls=AutoPipelineForText2Image)
        except MissingWeights:
            raise
        except Exception as error:
            log.warning("the model %r could not be loaded", name, exc_info=True)
            raise ValueError(
                f"The model {name!r} could not be loaded: it must be a text-to-image pipeline that diffusers "
                "knows, with weights in safetensors."
            ) from error


def _refuse_foreign(name: str) -> None:
    """Refuses a pipeline with a part that is not a class of diffusers or transformers."""
    folder = Path(name).expanduser()
    if not folder.is_dir() and not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name, re.ASCII):
        raise ValueError("neither a folder nor owner/name")
    config = AutoPipelineForText2Image.load_config(str(folder) if folder.is_dir() else name)
    foreign = [key for key, value in config.items() if isinstance(value, list | tuple) and not _is_known(*value)]
    if foreign or not isinstance(config["_class_name"], str):
        raise ValueError(f"it has parts that are not of diffusers or transformers: {foreign or config['_class_name']}")


def _is_known(library: Any = None, name: Any = None, *rest: Any) -> bool:
    """Whether a part of a pipeline is a class of diffusers or transformers that does not load other classes."""
    if library is None:
        return True  # a missing optional part
    own = library == "diffusers" or hasattr(diffusers.pipelines, str(library))
    return own or (library == "transformers" and not str(name).startswith("Auto"))
