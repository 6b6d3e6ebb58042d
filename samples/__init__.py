"""The bundled text-to-image pipelines, and prompts to try them with."""

from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

NAMES = ("emoji", "emoji-flow")
"""All bundled pipelines that there are: the first is in the main wheel, the others come with the extra `models`."""

MODEL = Path(str(files(__name__) / NAMES[0]))
"""Folder of the bundled pipeline: `StableDiffusionPipeline.from_pretrained(MODEL)`."""

PROMPTS = Path(str(files(__name__) / "prompts.txt"))
"""The prompts of the demo, one on each line."""

CALIBRATION_PROMPTS = Path(str(files(__name__) / "calibration_prompts.txt"))
"""The prompts of the bundled calibrations."""

HELDOUT_PROMPTS = Path(str(files(__name__) / "heldout_prompts.txt"))
"""The prompts for measuring policies; none of them was used for a calibration."""

CALIBRATIONS = Path(str(files(__name__) / "calibrations"))
"""Folder of the bundled models' calibrations, `<scheduler>-<steps>-<guidance scale>.safetensors`."""

SUITE = Path(str(files(__name__) / "suites" / "emoji.yaml"))
"""The suite that `bench` measures by default."""


def models() -> dict[str, Path]:
    """The folders of all bundled pipelines by their names, including those of the wheel `diffusers-guidance-models`.

    The first one is that of `MODEL`.
    """
    further = find_spec("diffusers_guidance_models")
    homes = [MODEL.parent, *map(Path, (further and further.submodule_search_locations) or ())]
    folders = [MODEL, *(folder for home in homes for folder in sorted(home.iterdir()))]
    found: dict[str, Path] = {}
    for folder in folders:
        if (folder / "model_index.json").is_file():
            found.setdefault(folder.name.replace("_", "-"), folder)
    return found


def model(name: str) -> Path:
    """The folder of a bundled pipeline, by its name: "emoji", or another of `models()`.

    Raises:
        ValueError: it is not on this machine.
    """
    if (found := models().get(name)) is None:
        raise ValueError(
            f"no bundled model {name!r}: models beyond 'emoji' need pip install 'diffusers-guidance[models]'"
        )
    return found


def name_of(path: object) -> str | None:
    """The name of the bundled pipeline in this folder, however its path is written; None for anything else."""
    if not isinstance(path, str | Path) or not str(path):
        return None
    given = Path(path).expanduser().resolve()
    return next((name for name, folder in models().items() if folder.resolve() == given), None)
