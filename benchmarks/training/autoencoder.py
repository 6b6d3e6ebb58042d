"""The autoencoder: 128-pixel pictures to latents of 6 x 16 x 16 and back.

`python benchmarks/training/autoencoder.py` trains it. `--decoder` then trains only the decoder further, on the
unchanged encoder's latents, so that a UNet trained on them stays valid.
"""

import argparse
from pathlib import Path
from typing import Any

import data
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from torch import Tensor, nn
from trainer import Plan, Trainer, start

from diffusers_guidance.pipelines.pictures import measures as fidelity

CHANNELS = 6
NOISE = 0.1
"""Standard deviation of the noise on (unnormalised) latents in training, so that the decoder tolerates a diffusion's
errors."""


def create() -> AutoencoderKL:
    """An untrained AutoencoderKL."""
    widths = (16, 32, 64, 128)
    return AutoencoderKL(
        sample_size=data.SIZE,
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        layers_per_block=1,
        latent_channels=CHANNELS,
        norm_num_groups=4,
        mid_block_add_attention=False,
        scaling_factor=1.0,
    )


def encode(vae: Any, pictures: Tensor) -> Tensor:
    """Means of the latents of pictures (B, 3, H, W) in [-1, 1]."""
    return vae.quant_conv(vae.encoder(pictures))[:, :CHANNELS]


def decode(vae: Any, latents: Tensor) -> Tensor:
    """Pictures of latents (B, 6, h, w)."""
    return vae.decoder(vae.post_quant_conv(latents))


def reconstruction_losses(drawn: Tensor, true: Tensor) -> dict[str, Tensor]:
    """L1 and squared error, of pixels, of edges and of colour differences on 3 x 3 means.

    Without the colour terms a small autoencoder on few pictures does not learn red from green.
    """
    drawn, true = drawn.float(), true.float()
    error = drawn - true
    red, green, blue = F.avg_pool2d(error, 3, 1).unbind(1)
    across, along = red - green, blue - (red + green) / 2
    return {
        "pixels": error.abs().mean() + 2 * error.square().mean(),
        "colour": 0.5 * (1.5 * across.abs().mean() + 0.7 * along.abs().mean())
        + across.square().mean()
        + along.square().mean(),
        "edges": 0.5 * (error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()),
    }


def batch(pictures: Tensor, count: int, size: int, generator: torch.Generator) -> Tensor:
    """`count` random crops of `size` pixels, mirrored or not, (count, 3, size, size) in [-1, 1].

    Of two random places it takes the one with more to see, since much of an emoji is white.
    """
    free = data.SIZE - size
    crops = []
    for i in torch.randint(len(pictures), (count,), generator=generator).tolist():
        tops = torch.randint(free + 1, (2, 2), generator=generator).tolist() if free else [[0, 0]]
        places = [pictures[i, y : y + size, x : x + size] for y, x in tops]
        crop = max(places, key=lambda place: float(place[::4, ::4].float().std()))
        crops.append(crop.flip(1) if torch.rand((), generator=generator) < 0.5 else crop)
    return torch.stack(crops).permute(0, 3, 1, 2).float() / 127.5 - 1


class Loss:
    """The autoencoder's loss on crops of 64 pixels in the first `crops` of the run, then on whole pictures."""

    def __init__(self, pictures: Tensor, pixels: int, crops: float = 0.5, decoder_only: bool = False):
        self.pictures, self.pixels, self.crops, self.decoder_only = pictures, pixels, crops, decoder_only

    def __call__(self, vae: nn.Module, generator: torch.Generator, progress: float) -> dict[str, Tensor]:
        size = data.SIZE // 2 if progress < self.crops else data.SIZE
        true = batch(self.pictures, max(1, self.pixels // size**2), size, generator)
        with torch.set_grad_enabled(not self.decoder_only):
            latents = encode(vae, true.to(next(vae.parameters())))
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        losses = reconstruction_losses(decode(vae, latents + NOISE * noise), true.to(latents.device))
        return losses if self.decoder_only else losses | {"size": 1e-3 * latents.float().square().mean()}


@torch.no_grad()
def psnr(vae: nn.Module, pictures: Tensor) -> float:
    """Mean over pictures (N, H, W, 3) uint8 of their peak signal-to-noise ratio through the autoencoder, in dB."""
    found = []
    like = next(vae.parameters())
    for part in pictures.split(16):
        true = (part.permute(0, 3, 1, 2).float() / 127.5 - 1).to(like)
        drawn = decode(vae, encode(vae, true)).clamp(-1, 1)
        found.append(fidelity.psnr(drawn.float() / 2, true.float() / 2))  # from -0.5 to 0.5
    return float(torch.cat(found).mean())


@torch.no_grad()
def normalise(vae: Any, mean: Tensor, std: Tensor) -> None:
    """Makes latents of mean 0 and standard deviation 1 per channel, exactly, through quant_conv and post_quant_conv.

    z' = (z - mean) / std and decode(z') = decode(z): quant_conv is linear before z, post_quant_conv linear after.
    The spread that the encoder states becomes the noise of training, NOISE / std.

    Args:
        mean, std: Those of the latents, per channel.
    """
    weight, bias = vae.quant_conv.weight, vae.quant_conv.bias
    weight[:CHANNELS] /= std[:, None, None, None]
    bias[:CHANNELS] = (bias[:CHANNELS] - mean) / std
    weight[CHANNELS:] = 0
    bias[CHANNELS:] = 2 * (NOISE / std).log()
    post = vae.post_quant_conv
    post.bias += (post.weight[:, :, 0, 0] @ mean[:, None])[:, 0]
    post.weight *= std[None, :, None, None]


@torch.no_grad()
def denormalised(vae: Any) -> tuple[Any, Tensor]:
    """Undoes `normalise` as far as possible: `normalise(vae, 0, std)` turns the result into the given one again.

    Args:
        vae: A normalised one; it is changed.

    Returns:
        The autoencoder, whose latents still have mean 0, and their standard deviations.
    """
    std = NOISE / (vae.quant_conv.bias[CHANNELS:] / 2).exp()
    normalise(vae, torch.zeros_like(std), 1 / std)
    return vae, std


def pictures_seen(folder: Path) -> tuple[Tensor, Tensor]:
    """The pictures for training, and the held-out ones."""
    pictures, records = data.load(folder)
    hidden = torch.tensor([r.held_out for r in records])
    return pictures[~hidden], pictures[hidden]


def train(folder: Path, minutes: float, decoder_only: bool) -> None:
    """Trains into `folder`/autoencoder (or /decoder) and prints the PSNR on held-out pictures."""
    seen, unseen = pictures_seen(folder)
    torch.manual_seed(0)
    vae = create()
    if decoder_only:
        vae.load_state_dict(averaged(folder / "autoencoder"))
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    loss = Loss(seen, 4 * data.SIZE**2, crops=0.0 if decoder_only else 0.5, decoder_only=decoder_only)
    plan = Plan(minutes=minutes, flat=0.2 if decoder_only else 0.35, muon=0.01 if decoder_only else 0.02)
    ends = [vae.encoder.conv_in.weight, vae.decoder.conv_out.weight]
    trainer = Trainer(vae, loss, plan, folder / ("decoder" if decoder_only else "autoencoder"), ends)
    done = trainer.run()
    if trainer.rank == 0:
        print(f"{psnr(done, unseen):.2f} dB on {len(unseen)} held-out pictures, {psnr(done, seen[::20]):.2f} on seen")


def averaged(folder: Path) -> dict[str, Tensor]:
    """The averaged weights in a run's checkpoint."""
    tensors = load_file(folder / "state.safetensors")
    return {k.removeprefix("average."): v for k, v in tensors.items() if k.startswith("average.")}


def trained(folder: Path) -> AutoencoderKL:
    """The trained autoencoder, with the decoder that was trained longest; its latents are not normalised."""
    vae = create()
    further = folder / "decoder"
    vae.load_state_dict(averaged(further if (further / "state.json").exists() else folder / "autoencoder"))
    return vae.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("out/model"), help="folder of the data set and checkpoints")
    parser.add_argument("--minutes", type=float, default=16, help="wall-clock time")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread that share gradients")
    parser.add_argument("--decoder", action="store_true", help="train only the decoder, further")
    options = parser.parse_args()
    start(train, options.workers, options.folder, options.minutes, options.decoder)


if __name__ == "__main__":
    main()
