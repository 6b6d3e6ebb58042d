"""The bundled text-to-image pipeline and prompts to try it with."""

from importlib.resources import files
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

SUITE = Path(str(files(__name__) / "suites" / "emoji.yaml"))
"""What `bench` measures unless told otherwise."""


def models() -> dict[str, Path]:
    """Folders of all bundled pipelines by their names; that of `MODEL` first."""
    folders = [MODEL, *sorted(each for each in MODEL.parent.iterdir() if each != MODEL)]
    return {each.name: each for each in folders if (each / "model_index.json").is_file()}
