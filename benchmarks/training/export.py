"""Export: the trained parts as a folder that an unmodified StableDiffusionPipeline loads.

`python benchmarks/training/export.py` writes UNet and autoencoder in float16, the text encoder in
float32 (transformers would keep a float16 one beside diffusers' float32 UNet).
"""

import argparse
import shutil
from pathlib import Path

import autoencoder
import text_to_image
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTokenizer


def pipeline(
    vae: AutoencoderKL, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer, unet: UNet2DConditionModel
) -> StableDiffusionPipeline:
    """An ordinary pipeline of trained parts, without safety checker (it was trained on emoji only)."""
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=text_to_image.scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def write(made: StableDiffusionPipeline, vocabulary: Path, target: Path) -> None:
    """Writes the pipeline to `target`, in place of what the same parts left there.

    Args:
        made: Its UNet and autoencoder are turned to float16.
        vocabulary: Folder of vocab.json and merges.txt, which transformers 5 no longer writes and older ones read.
        target: A folder; other files in it (card, licences, pictures) stay.
    """
    made.unet.half()
    made.vae.half()
    for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
        shutil.rmtree(target / part, ignore_errors=True)
    made.save_pretrained(target, safe_serialization=True)
    _name_for_all(target / "text_encoder" / "model.safetensors")
    for name in ("vocab.json", "merges.txt"):
        shutil.copyfile(vocabulary / name, target / "tokenizer" / name)


def _name_for_all(file: Path) -> None:
    """Renames a text encoder's weights as transformers 4 knows them, which 5 reads too, and no longer writes."""
    prefix = "text_model."
    save_file({prefix + name.removeprefix(prefix): t for name, t in load_file(file).items()}, file, {"format": "pt"})


def export(folder: Path, target: Path) -> None:
    """Exports the last checkpoints in `folder` to `target`."""
    place = folder / "text_to_image"
    model = text_to_image.trained(folder)
    vae = autoencoder.trained(folder)
    inputs = load_file(place / "inputs.safetensors")
    autoencoder.normalise(vae, inputs["mean"], inputs["std"])
    write(pipeline(vae, model.text_encoder, text_to_image.load_tokenizer(place), model.unet), place, target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("out/model"), help="of the checkpoints")
    parser.add_argument("--to", type=Path, default=Path("samples/emoji"), help="where the pipeline goes")
    options = parser.parse_args()
    with torch.no_grad():
        export(options.folder, options.to)
    files = sorted(path for path in options.to.rglob("*") if path.is_file())
    print(f"{sum(path.stat().st_size for path in files) / 1e6:.1f} MB in {options.to}")


if __name__ == "__main__":
    main()
