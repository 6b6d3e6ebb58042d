"""The text encoder and UNet, trained together on the autoencoder's latents with some captions dropped.

`python benchmarks/training/text_to_image.py` trains them.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import autoencoder
import data
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from trainer import Plan, Trainer, start
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

LENGTH = 24
"""The number of tokens of a caption."""

WIDTH = 192
"""The text encoder's width."""

CONCEPTS = 250
DROPPED = 0.1
"""The share of captions replaced by the empty one, for classifier-free guidance (Ho and Salimans 2021)."""

_BEGIN, _END = "<|startoftext|>", "<|endoftext|>"


def scheduler() -> DDIMScheduler:
    """The noise schedule: that of Stable Diffusion, with v-prediction (Salimans and Ho 2022)."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


# Captions


def create_tokenizer(captions: list[str], folder: Path) -> CLIPTokenizer:
    """A tokenizer in CLIP's format with merges of its own; writes vocab.json and merges.txt to `folder`.

    Args:
        captions: The texts to learn the merges from.
        folder: Where the two files go.
    """
    learned = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learned.normalizer = normalizers.Lowercase()
    words = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    learned.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    trainer = trainers.BpeTrainer(vocab_size=4096, min_frequency=8, end_of_word_suffix="</w>", show_progress=False)
    learned.train_from_iterator(captions, trainer)
    merges = [tuple(merge) for merge in json.loads(learned.to_str())["model"]["merges"]]
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*bytes_, *(b + "</w>" for b in bytes_), *dict.fromkeys("".join(m) for m in merges), _BEGIN, _END]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: i for i, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf8")
    lines = ["#version: 0.2", *(" ".join(m) for m in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf8")
    return load_tokenizer(folder)


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    """The tokenizer of vocab.json and merges.txt in `folder`."""
    lines = (folder / "merges.txt").read_text(encoding="utf8").splitlines()[1:]
    return CLIPTokenizer(
        vocab=json.loads((folder / "vocab.json").read_text(encoding="utf8")),
        merges=[tuple(line.split(" ")) for line in lines],
        unk_token=_END,
        bos_token=_BEGIN,
        eos_token=_END,
        pad_token=_END,
        model_max_length=LENGTH,
    )


def tokens(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Token ids (N, 24) as StableDiffusionPipeline makes them."""
    made = tokenizer(captions, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt")
    return made.input_ids


# Model


class TextToImage(nn.Module):
    """Text encoder and UNet: `forward(tokens, noisy latents, timesteps)` is the predicted v.

    Args:
        tokenizer: Decides the number of embeddings.
    """

    def __init__(self, tokenizer: CLIPTokenizer):
        super().__init__()
        self.text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=WIDTH,
                intermediate_size=4 * WIDTH,
                projection_dim=WIDTH,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=LENGTH,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        self.unet = UNet2DConditionModel(
            sample_size=data.SIZE // 8,
            in_channels=autoencoder.CHANNELS,
            out_channels=autoencoder.CHANNELS,
            block_out_channels=(96, 192),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            mid_block_type="UNetMidBlock2DCrossAttn",
            layers_per_block=1,
            norm_num_groups=16,
            attention_head_dim=4,  # the number of heads, in spite of its name
            cross_attention_dim=WIDTH,
            resnet_time_scale_shift="scale_shift",
            addition_embed_type="text",
            addition_embed_type_num_heads=8,
        )
        for name, parameter in self.unet.named_parameters():  # every branch is zero at first
            if name.endswith(("conv2.weight", "conv2.bias", "proj_out.weight", "proj_out.bias")) or "conv_out" in name:
                nn.init.zeros_(parameter)

    def forward(self, ids: Tensor, noisy: Tensor, timesteps: Tensor) -> Tensor:
        text = self.text_encoder(ids).last_hidden_state
        return self.unet(noisy, timesteps, encoder_hidden_states=text).sample

    def adam_only(self) -> list[nn.Parameter]:
        """Embeddings, first and last layers: Muon is not made for these."""
        embeddings = [p for name, p in self.text_encoder.named_parameters() if "embedding.weight" in name]
        return [*embeddings, self.unet.conv_in.weight, self.unet.conv_out.weight]

    def pipeline(self, vae: AutoencoderKL, tokenizer: CLIPTokenizer) -> StableDiffusionPipeline:
        """An ordinary pipeline of the trained parts, without safety checker (it was trained on emoji only)."""
        return StableDiffusionPipeline(
            vae=vae,
            text_encoder=self.text_encoder,
            tokenizer=tokenizer,
            unet=self.unet,
            scheduler=scheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )


def timestep_density(alphas_cumprod: Tensor, clip: float = 5.0, floor: float = 0.1) -> Tensor:
    """How often each timestep is drawn: by the min-SNR weight of v-prediction, min(SNR, clip) / (SNR + 1), and a floor.

    To draw by the weight has the same mean as to weight the loss (Hang et al. 2023, eq. 5 for v), with less variance.

    Args:
        alphas_cumprod: The scheduler's, one for each timestep.
        clip: gamma of min-SNR.
        floor: The share of draws that is uniform.
    """
    ratio = alphas_cumprod.double() / (1 - alphas_cumprod.double())
    weight = ratio.clamp(max=clip) / (ratio + 1)
    return (1 - floor) * weight / weight.sum() + floor / len(weight)


@dataclass(frozen=True)
class Noising:
    """How latents are noised, and the target: x_t = signal clean + noise eps, v = of_noise eps - of_clean clean.

    Args:
        timesteps: The network's input, (T,); all others have one value for each timestep.
        signal, noise: Shares of the clean latents and of the noise.
        of_noise, of_clean: Shares of the two in the prediction.
        density: How often each is drawn.
    """

    timesteps: Tensor
    signal: Tensor
    noise: Tensor
    of_noise: Tensor
    of_clean: Tensor
    density: Tensor


def v_prediction() -> Noising:
    """The noising of `scheduler`: v = a eps - s x, drawn by the min-SNR weight."""
    alphas = scheduler().alphas_cumprod
    a, s = alphas.sqrt(), (1 - alphas).sqrt()
    return Noising(torch.arange(len(alphas)), a, s, a, s, timestep_density(alphas))


class Loss:
    """Mean squared error of v over a batch with stratified timesteps.

    Args:
        noising: How latents are noised, and what v is.
        latents: Normalised, (N, 6, 16, 16).
        ids: Tokens of the captions of each picture, (N, captions, 24).
        empty: Tokens of the empty caption, (24,).
        count: Pictures per step and worker.
        rank, world: Workers draw interleaved strata.
    """

    def __init__(
        self, noising: Noising, latents: Tensor, ids: Tensor, empty: Tensor, count: int, rank: int = 0, world: int = 1
    ):
        self.noising, self.latents, self.ids, self.empty = noising, latents, ids, empty
        self.count, self.rank, self.world = count, rank, world
        self.cumulative = noising.density.cumsum(0)

    def places(self, generator: torch.Generator) -> Tensor:
        """(count,): numbers of timesteps, one from each of `count` equally likely ranges, in random order."""
        strata = torch.arange(self.count) * self.world + self.rank
        places = (strata + torch.rand(self.count, generator=generator, dtype=torch.float64)) / (self.count * self.world)
        drawn = torch.searchsorted(self.cumulative, places).clamp(max=len(self.cumulative) - 1)
        return drawn[torch.randperm(self.count, generator=generator)]

    def read(self, ids: Tensor, generator: torch.Generator) -> Tensor:
        """The text encoder's input from the captions, (count, length)."""
        return ids

    def __call__(self, model: nn.Module, generator: torch.Generator, progress: float) -> dict[str, Tensor]:
        like = next(model.parameters())
        picks = torch.randint(len(self.latents), (self.count,), generator=generator)
        which = torch.randint(self.ids.shape[1], (self.count,), generator=generator)
        dropped = torch.rand(self.count, generator=generator) < DROPPED
        ids = self.read(torch.where(dropped[:, None], self.empty, self.ids[picks, which]), generator)
        clean, at = self.latents[picks], self.places(generator)
        noise = torch.randn(clean.shape, generator=generator)

        def mixed(of_clean: Tensor, of_noise: Tensor) -> Tensor:
            return of_clean[at].view(-1, 1, 1, 1) * clean + of_noise[at].view(-1, 1, 1, 1) * noise

        noisy = mixed(self.noising.signal, self.noising.noise)
        wanted = mixed(-self.noising.of_clean, self.noising.of_noise)
        predicted = model(ids.to(like.device), noisy.to(like), self.noising.timesteps[at].to(like.device))
        return {"v": F.mse_loss(predicted.float(), wanted.to(like.device))}


# Training


@torch.no_grad()
def prepare(folder: Path, concepts: int) -> None:
    """Writes the files that training reads to `folder`/text_to_image: tokenizer, tokens, normalised latents.

    It does so once: a run that continues with fewer or more concepts keeps its vocabulary and scale of latents.
    """
    place = folder / "text_to_image"
    pictures, records = data.load(folder)
    chosen = data.everyday(records, concepts)
    before = load_file(place / "inputs.safetensors") if (place / "inputs.safetensors").exists() else {}
    if before and before["chosen"].tolist() == chosen:
        return
    captions = [c for i in chosen for c in records[i].captions]
    tokenizer = load_tokenizer(place) if before else create_tokenizer(captions, place)
    ids = torch.stack([tokens(tokenizer, records[i].captions) for i in chosen])
    vae = autoencoder.trained(folder)
    parts = pictures[chosen].permute(0, 3, 1, 2).split(32)
    raw = torch.cat([autoencoder.encode(vae, part.float() / 127.5 - 1) for part in parts])
    mean, std = (before["mean"], before["std"]) if before else (raw.mean((0, 2, 3)), raw.std((0, 2, 3)))
    inputs = {"latents": (raw - mean[:, None, None]) / std[:, None, None], "mean": mean, "std": std, "ids": ids}
    inputs |= {"empty": tokens(tokenizer, [""])[0], "chosen": torch.tensor(chosen)}
    save_file({name: value.contiguous() for name, value in inputs.items()}, place / "inputs.safetensors")
    print(f"{len(chosen)} pictures of {len({records[i].concept for i in chosen})} concepts, {len(tokenizer)} tokens")


def train(folder: Path, plan: Plan, count: int, workers: int) -> None:
    """Trains into `folder`/text_to_image."""
    place = folder / "text_to_image"
    inputs = load_file(place / "inputs.safetensors")
    torch.manual_seed(0)
    model = TextToImage(load_tokenizer(place))
    rank = torch.distributed.get_rank() if workers > 1 else 0
    loss = Loss(v_prediction(), inputs["latents"], inputs["ids"], inputs["empty"], count // workers, rank, workers)
    Trainer(model, loss, plan, place, model.adam_only()).run()


def trained(folder: Path) -> TextToImage:
    """The trained text encoder and UNet: averaged weights of the last checkpoint."""
    place = folder / "text_to_image"
    model: Any = TextToImage(load_tokenizer(place))
    model.load_state_dict(autoencoder.averaged(place))
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("out/model"), help="folder of the data set and checkpoints")
    parser.add_argument("--concepts", type=int, default=CONCEPTS, help="the first so many of concepts.txt")
    parser.add_argument("--minutes", type=float, default=70, help="wall-clock time")
    parser.add_argument(
        "--rate", type=float, default=1.0, help="the peak of the learning rates, relative to a new run's"
    )
    parser.add_argument(
        "--flat", type=float, default=Plan.flat, help="share of the run before the learning rate decays"
    )
    parser.add_argument("--batch", type=int, default=48, help="pictures a step, of all workers")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread that share gradients")
    options = parser.parse_args()
    prepare(options.folder, options.concepts)
    rate = options.rate
    plan = Plan(minutes=options.minutes, flat=options.flat, muon=rate * Plan.muon, adam=rate * Plan.adam)
    start(train, options.workers, options.folder, plan, options.batch, options.workers)


if __name__ == "__main__":
    main()
