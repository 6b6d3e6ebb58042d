"""The second model: a flow-matching transformer and its text encoder, on the first one's latents and vocabulary.

`python benchmarks/training/flow.py` trains them at one rate until its time is up, after `text_to_image` or `resume` has
prepared the files that both read. `--decay-minutes 60` then ends a copy of the run; the run itself can continue.
"""

import argparse
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import autoencoder
import data
import text_to_image
import torch
from diffusers import AutoencoderKL, CogView4Pipeline, CogView4Transformer2DModel, FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file
from text_to_image import Loss, Noising
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from trainer import Plan, Trainer, branch, start
from transformers import CLIPTokenizer, GlmConfig, GlmModel

MULTIPLE = 16
"""CogView4Pipeline pads prompts on the left to a multiple of this many tokens."""

LENGTH = 2 * MULTIPLE
"""The most tokens of a caption; hardly one caption in a thousand has more than 16."""

LONG = 0.1
"""Share of the steps in which captions have that length, so that the model knows long prompts."""

WIDTH = 256
"""Of the transformer."""


def scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Straight paths from noise to pictures, in even steps; without a shift, since the latents are small."""
    return FlowMatchEulerDiscreteScheduler(shift=1.0)


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    """The first model's vocabulary; pads on the left with the token for the beginning."""
    tokenizer = text_to_image.load_tokenizer(folder)
    tokenizer.pad_token, tokenizer.padding_side, tokenizer.model_max_length = tokenizer.bos_token, "left", LENGTH
    return tokenizer


def tokens(tokenizer: CLIPTokenizer, captions: list[str], length: int = LENGTH) -> Tensor:
    """Token ids (N, length), padded as CogView4Pipeline pads them."""
    made = tokenizer(captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return made.input_ids


class Flow(nn.Module):
    """Text encoder and transformer: `forward(tokens, noisy latents, timesteps)` is the predicted velocity.

    Args:
        tokenizer: Decides the number of embeddings.
        layers: The transformer's number of blocks.
    """

    def __init__(self, tokenizer: CLIPTokenizer, layers: int = 10):
        super().__init__()
        width = text_to_image.WIDTH
        self.text_encoder = GlmModel(
            GlmConfig(
                vocab_size=len(tokenizer),
                hidden_size=width,
                intermediate_size=3 * width,
                num_hidden_layers=3,
                num_attention_heads=4,
                num_key_value_heads=4,
                head_dim=width // 4,
                max_position_embeddings=1024,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        self.transformer = CogView4Transformer2DModel(
            patch_size=2,
            in_channels=autoencoder.CHANNELS,
            out_channels=autoencoder.CHANNELS,
            num_layers=layers,
            attention_head_dim=64,
            num_attention_heads=WIDTH // 64,
            text_embed_dim=width,
            time_embed_dim=128,
            condition_dim=16,
            pos_embed_max_size=data.SIZE // 8,
            sample_size=data.SIZE // 8,
            rope_axes_dim=(data.SIZE // 8,) * 2,
        )
        for name, parameter in self.transformer.named_parameters():  # every block is zero at first
            if name.startswith("proj_out") or "norm1.linear" in name or "norm_out.linear" in name:
                nn.init.zeros_(parameter)
        for parameter in [*self.text_encoder.layers[-1].parameters(), *self.text_encoder.norm.parameters()]:
            nn.init.zeros_(parameter.requires_grad_(False))  # the pipeline reads the input of the last layer

    def forward(self, ids: Tensor, noisy: Tensor, timesteps: Tensor) -> Tensor:
        size = torch.full((len(noisy), 2), float(data.SIZE), device=noisy.device)
        on_cpu = noisy.device.type == "cpu"  # there so few tokens are a sixth faster without tiles
        with sdpa_kernel(SDPBackend.MATH) if on_cpu else nullcontext():
            text = self.text_encoder(ids, output_hidden_states=True, use_cache=False).hidden_states[-2]
            return self.transformer(noisy, text, timesteps, size, size, torch.zeros_like(size)).sample

    def adam_only(self) -> list[nn.Parameter]:
        """Embeddings, first and last layers, and those that read the time: Muon is not made for these."""
        names = ("embed_tokens", "patch_embed.proj", "time_condition_embed", ".linear", "proj_out")
        return [p for name, p in self.named_parameters() if any(part in name for part in names)]

    def pipeline(self, vae: AutoencoderKL, tokenizer: CLIPTokenizer) -> CogView4Pipeline:
        """An ordinary pipeline of the trained parts."""
        return CogView4Pipeline(tokenizer, self.text_encoder, vae, self.transformer, scheduler())


def noising() -> Noising:
    """x_t = (1 - s) x + s eps and v = eps - x, for s from 0.001 to 1, drawn with the frequencies of `density`."""
    timesteps = torch.arange(1, 1001)
    s = timesteps.double() / 1000
    one = torch.ones(1000)
    return Noising(timesteps, (1 - s).float(), s.float(), one, one, density(s))


def density(s: Tensor, floor: float = 0.2) -> Tensor:
    """How often each share of noise is drawn: logit-normal (Esser et al. 2024), with a floor for the two ends.

    Args:
        s: Shares of noise, evenly spaced.
        floor: The share of draws that is uniform.
    """
    inside = s.clamp(1e-6, 1 - 1e-6)
    weight = torch.exp(-inside.logit().square() / 2) / (inside * (1 - inside))
    return (1 - floor) * weight / weight.sum() + floor / len(s)


class FlowLoss(Loss):
    """A `Loss` with captions padded as in the pipeline: in most steps to 16 tokens, in some to 32."""

    def read(self, ids: Tensor, generator: torch.Generator) -> Tensor:
        return ids if torch.rand((), generator=generator) < LONG else ids[:, -MULTIPLE:]


def train(folder: Path, name: str, plan: Plan, count: int, workers: int) -> None:
    """Trains into `folder`/`name`."""
    given = folder / "text_to_image"
    inputs = load_file(given / "inputs.safetensors")
    _, records = data.load(folder)
    tokenizer = load_tokenizer(given)
    ids = torch.stack([tokens(tokenizer, records[i].captions) for i in inputs["chosen"].tolist()])
    torch.manual_seed(0)
    model = Flow(tokenizer)
    rank = torch.distributed.get_rank() if workers > 1 else 0
    loss = FlowLoss(noising(), inputs["latents"], ids, tokens(tokenizer, [""])[0], count // workers, rank, workers)
    Trainer(model, loss, plan, folder / name, model.adam_only()).run()


def runs(folder: Path) -> list[Path]:
    """The run at one rate, and the one that ended it if there is one."""
    return [place for place in (folder / "flow", folder / "flow_ended") if (place / "state.json").exists()]


def trained(folder: Path) -> Flow:
    """The trained text encoder and transformer: averaged weights of the last checkpoint."""
    model: Any = Flow(load_tokenizer(folder / "text_to_image"))
    model.load_state_dict(autoencoder.averaged(runs(folder)[-1]))
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("out/model"), help="folder of the data set and checkpoints")
    parser.add_argument(
        "--concepts", type=int, default=text_to_image.CONCEPTS, help="the first so many of concepts.txt"
    )
    parser.add_argument("--minutes", type=float, default=420, help="wall-clock time at one rate")
    parser.add_argument(
        "--decay-minutes", type=float, help="instead, end a copy of the run: its rate falls to zero in this time"
    )
    parser.add_argument("--rate", type=float, default=1.0, help="the learning rates, relative to the first model's")
    parser.add_argument("--batch", type=int, default=32, help="pictures a step, of all workers")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread that share gradients")
    options = parser.parse_args()
    text_to_image.prepare(options.folder, options.concepts)
    rates = {"muon": options.rate * Plan.muon, "adam": options.rate * Plan.adam}
    if options.decay_minutes is None:
        name, plan = "flow", Plan(minutes=options.minutes, flat=1.0, average=0.999, save_every=300.0, **rates)
    else:
        name, plan = "flow_ended", Plan(minutes=options.decay_minutes, flat=0.0, **rates)
        branch(options.folder / "flow", options.folder / name)
    start(train, options.workers, options.folder, name, plan, options.batch, options.workers)


if __name__ == "__main__":
    main()
