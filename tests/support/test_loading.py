"""A network whose weights are not all in its files is refused, not used as it was drawn."""

import shutil

import pytest
import torch
from diffusers import DiffusionPipeline, ModelMixin, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, PreTrainedModel
from typer.testing import CliRunner

from diffusers_guidance.pipelines.app.models import Models
from diffusers_guidance.pipelines.shell import cli
from diffusers_guidance.pipelines.support.loading import MissingWeights, load_whole
from diffusers_guidance.samples import MODEL

TEXT = "text_encoder/model.safetensors"
UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def spoilt(tmp_path):
    """A copy of the bundled model whose weights of one file have other names, as another release would write them."""

    def spoil(file, rename):
        shutil.copytree(MODEL, tmp_path / "model")
        weights = load_file(MODEL / file)
        named = {rename(name): t for name, t in weights.items()}
        save_file({name: t for name, t in named.items() if name}, tmp_path / "model" / file, {"format": "pt"})
        return tmp_path / "model"

    return spoil


@pytest.mark.parametrize("file", [TEXT, UNET])
@pytest.mark.parametrize("only", ["", "weight", "norm"])
def test_missing_weights_are_refused(spoilt, file, only):
    model = spoilt(file, lambda name: f"renamed.{name}" if only in name else name)
    before = [vars(base)["from_pretrained"] for base in (PreTrainedModel, ModelMixin)]
    with pytest.raises(MissingWeights, match=r"does not have all weights of its (CLIPTextModel|UNet2DC\w*): .* more"):
        load_whole(StableDiffusionPipeline, model, local_files_only=True)
    assert [vars(base)["from_pretrained"] for base in (PreTrainedModel, ModelMixin)] == before


def test_one_missing_weight_is_refused(spoilt):
    model = spoilt(TEXT, lambda name: "" if name.endswith("layers.1.mlp.fc1.bias") else name)
    with pytest.raises(MissingWeights, match=r"CLIPTextModel: \S*layers.1.mlp.fc1.bias would be"):
        load_whole(DiffusionPipeline, model, local_files_only=True)


def test_the_bundled_encoder_has_its_files_weights_in_every_transformers():
    loaded = load_whole(StableDiffusionPipeline, MODEL, local_files_only=True).text_encoder.state_dict()
    here, there = (
        {name.removeprefix("text_model."): tensor for name, tensor in weights.items() if "position_ids" not in name}
        for weights in (loaded, load_file(MODEL / TEXT))
    )
    assert here.keys() == there.keys() and all(torch.equal(here[name], there[name]) for name in here)


def test_what_is_whole_loads_as_ever():
    ours = load_whole(StableDiffusionPipeline, MODEL, local_files_only=True)
    plain = StableDiffusionPipeline.from_pretrained(MODEL, local_files_only=True)
    for part in ("unet", "vae", "text_encoder"):
        here, there = (getattr(pipe, part).state_dict() for pipe in (ours, plain))
        assert here.keys() == there.keys() and all(torch.equal(here[name], there[name]) for name in here)
        assert getattr(ours, part).training is getattr(plain, part).training
    network, info = load_whole(UNet2DConditionModel, MODEL / "unet", local_files_only=True, output_loading_info=True)
    assert isinstance(network, UNet2DConditionModel) and not info["missing_keys"]
    assert isinstance(load_whole(CLIPTextModel, MODEL / "text_encoder", local_files_only=True), CLIPTextModel)


def test_the_command_and_the_page_refuse_it_in_a_sentence(spoilt, tmp_path):
    model = str(spoilt(TEXT, lambda name: f"renamed.{name}"))
    said = CliRunner().invoke(cli.make_app(), ["compare", "a rocket", "--model", model, "--out", str(tmp_path / "out")])
    assert said.exit_code == 1 and "does not have all weights of its CLIPTextModel" in " ".join(said.output.split())
    with pytest.raises(ValueError, match="does not have all weights of its CLIPTextModel"):
        Models([model]).get(model)
