"""Export: writes the trained parts as a folder that an unmodified diffusers pipeline loads.

`python benchmarks/training/export.py` writes the first model, `... export.py emoji-flow` the second. They are in
float16, but the text encoder is in float32 (transformers would keep a float16 one beside diffusers' float32 network).
The second model also gets `curve.json`, which says how its loss fell.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import autoencoder
import flow
import text_to_image
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

MODELS: dict[str, Any] = {"emoji": text_to_image, "emoji-flow": flow}
"""The modules that train the models, by the folder of `samples` for each model."""


def write(made: DiffusionPipeline, vocabulary: Path, target: Path) -> None:
    """Writes the pipeline to `target`, and replaces earlier files of the same parts.

    Args:
        made: All but its text encoder is turned to float16.
        vocabulary: Folder of vocab.json and merges.txt, which transformers 5 no longer writes and older ones read.
        target: A folder; other files in it (card, licences, pictures) stay.
    """
    for name, part in made.components.items():
        if isinstance(part, torch.nn.Module) and name != "text_encoder":
            part.half()
        shutil.rmtree(target / name, ignore_errors=True)
    made.save_pretrained(target, safe_serialization=True)
    _name_for_all(target / "text_encoder" / "model.safetensors", type(made.text_encoder).__name__)
    for name in ("vocab.json", "merges.txt"):
        shutil.copyfile(vocabulary / name, target / "tokenizer" / name)


def _name_for_all(file: Path, kind: str) -> None:
    """Renames CLIP's weights to the names of transformers 4, which version 5 reads too but does not write."""
    if kind != "CLIPTextModel":
        return
    prefix = "text_model."
    save_file({prefix + name.removeprefix(prefix): t for name, t in load_file(file).items()}, file, {"format": "pt"})


def export(kind: Any, folder: Path, target: Path) -> None:
    """Exports the last checkpoints in `folder` to `target`.

    Args:
        kind: The module that trained: one of MODELS.
    """
    place = folder / "text_to_image"
    vae = autoencoder.trained(folder)
    inputs = load_file(place / "inputs.safetensors")
    autoencoder.normalise(vae, inputs["mean"], inputs["std"])
    write(kind.trained(folder).pipeline(vae, kind.load_tokenizer(place)), place, target)


def curve(places: list[Path], every: int = 200) -> list[dict[str, Any]]:
    """The log of runs that follow one another, with a record for a fixed number of steps.

    Args:
        places: Their folders. A record replaces all earlier records of the same or later steps, which an interruption
            or a run that continued beside its ended copy may leave.
    """
    found: list[dict[str, Any]] = []
    for place in places:
        if not (place / "log.jsonl").exists():  # fewer than 25 steps
            continue
        for line in (place / "log.jsonl").read_text(encoding="utf8").splitlines():
            record = json.loads(line)
            found = [r for r in found if r["step"] < record["step"]] + [record]
    return [r for r in found if r["step"] % every == 0 or r is found[-1]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", choices=MODELS, default="emoji", help="which model")
    parser.add_argument("--folder", type=Path, default=Path("out/model"), help="folder of the checkpoints")
    parser.add_argument("--to", type=Path, help="where the pipeline goes; default: the folder of that name in samples")
    options = parser.parse_args()
    kind, to = MODELS[options.model], options.to or Path("samples", options.model)
    with torch.no_grad():
        export(kind, options.folder, to)
    if kind is flow:
        (to / "curve.json").write_text(json.dumps(curve(flow.runs(options.folder))) + "\n", encoding="utf8")
    files = sorted(path for path in to.rglob("*") if path.is_file())
    print(f"{sum(path.stat().st_size for path in files) / 1e6:.1f} MB in {to}")


if __name__ == "__main__":
    main()
