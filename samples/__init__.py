"""The bundled text-to-image pipelines and prompts to try them with."""

from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

MODEL = Path(str(files(__name__) / "emoji"))
"""Folder of the bundled pipeline: `StableDiffusionPipeline.from_pretrained(MODEL)`."""

PROMPTS = Path(str(files(__name__) / "prompts.txt"))
"""One prompt a line."""

CALIBRATION_PROMPTS = Path(str(files(__name__) / "calibration_prompts.txt"))
"""What the bundled calibrations were made with."""

HELDOUT_PROMPTS = Path(str(files(__name__) / "heldout_prompts.txt"))
"""What policies are measured on; none of these is among those calibrated with."""

CALIBRATIONS = Path(str(files(__name__) / "calibrations"))
"""Folder of the bundled model's calibrations, `<scheduler>-<steps>-<guidance scale>.safetensors`."""


def model(name: str) -> Path:
    """The folder of a bundled pipeline, by its name: "emoji", or one of the wheel `diffusers-guidance-models`.

    Raises:
        ValueError: it is not on this machine.
    """
    homes = [Path(str(files(__name__) / name))]
    if further := find_spec("diffusers_guidance_models"):
        homes += [Path(home) / name.replace("-", "_") for home in further.submodule_search_locations or ()]
    for home in homes:
        if (home / "model_index.json").is_file():
            return home
    raise ValueError(f"no bundled model {name!r}: models beyond 'emoji' need pip install 'diffusers-guidance[models]'")
