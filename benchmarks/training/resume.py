"""Resume: turns exported models back into checkpoints, so that the weights that ship can be trained further.

`python benchmarks/training/resume.py` does it. Training then continues with the same vocabulary and the same latents,
from weights rounded to float16 and with new optimizers.
"""

import argparse
import shutil
from pathlib import Path

import autoencoder
import text_to_image
import torch
import trainer
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from diffusers_guidance.pipelines.bench.metrics import Retrieval
from diffusers_guidance.pipelines.support.loading import load_whole
from diffusers_guidance.samples import MODEL


@torch.no_grad()
def resume(model: Path, folder: Path) -> None:
    """Writes the checkpoints of `model` to `folder`.

    Args:
        model: A folder that `export` wrote.
        folder: Where training continues. It gets no pictures: they come from `data`.

    Raises:
        FileExistsError: there are checkpoints in `folder` already.
        OSError: no such model.
        RuntimeError: `model` has another architecture than the code here.
    """
    places = folder / "autoencoder", folder / "text_to_image"
    if there := [str(place) for place in places if (place / "state.json").exists()]:
        raise FileExistsError(f"checkpoints are there already: {', '.join(there)}; choose another folder")

    vae, std = autoencoder.denormalised(load_whole(AutoencoderKL, model / "vae", local_files_only=True).float())
    tokenizer = text_to_image.load_tokenizer(model / "tokenizer")
    made = text_to_image.TextToImage(tokenizer)
    text_encoder = load_whole(CLIPTextModel, model / "text_encoder", local_files_only=True)
    unet = load_whole(UNet2DConditionModel, model / "unet", local_files_only=True)
    made.text_encoder.load_state_dict(text_encoder.state_dict())
    made.unet.load_state_dict(unet.state_dict())

    places[1].mkdir(parents=True, exist_ok=True)
    for name in ("vocab.json", "merges.txt"):
        shutil.copyfile(model / "tokenizer" / name, places[1] / name)
    scale = {"mean": torch.zeros_like(std), "std": std, "chosen": torch.zeros(0, dtype=torch.long)}
    save_file(scale, places[1] / "inputs.safetensors")  # no pictures chosen yet
    for place, module in zip(places, (vae, made), strict=True):
        trainer.save_weights(module, place)
    if (eye := model / Retrieval.FILE).exists():  # the embedding that judged this model judges the next one too
        weights = {n.removeprefix("network."): t for n, t in load_file(eye).items() if n.startswith("network.")}
        save_file({name: weight.float() for name, weight in weights.items()}, folder / "embedding.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=MODEL, help="what export wrote")
    parser.add_argument("--folder", type=Path, default=Path("out/model"), help="folder of the data set and checkpoints")
    options = parser.parse_args()
    try:
        resume(options.model, options.folder)
    except (OSError, RuntimeError) as error:
        parser.error(str(error))
    print(f"checkpoints of {options.model} in {options.folder}")


if __name__ == "__main__":
    main()
