"""The eye of the evaluation: a network that embeds pictures, trained only on real ones, apart from the generator.

It learns to name concept and style of distorted real pictures; the nearest picture in its embedding is the most similar
one. `evaluate` makes it, and puts it beside the model for the benchmark's retrieval score.
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from data import STYLES
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from diffusers_guidance.pipelines.bench.embedding import Embedding, shrunk


def distorted(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures turned by up to 10 degrees, scaled, moved, blurred, in other colours and contrast, and noisy."""
    count = len(pictures)

    def draw(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=generator)

    angle, scale = draw(-1, 1) * math.radians(10), draw(0.87, 1.15)
    across, down = draw(-0.15, 0.15), draw(-0.15, 0.15)
    cosine, sine = scale * angle.cos(), scale * angle.sin()
    rows = ((cosine, -sine, across), (sine, cosine, down))
    matrix = torch.stack([torch.stack(row, 1) for row in rows], 1)
    grid = F.affine_grid(matrix, list(pictures.shape), align_corners=False)
    seen = F.grid_sample(pictures - 1, grid, align_corners=False) + 1  # outside the picture is white, 1
    soft = F.avg_pool2d(F.pad(seen, (1, 1, 1, 1), mode="replicate"), 3, 1)
    seen = torch.lerp(seen, soft, draw(0, 1).view(-1, 1, 1, 1))
    gain = 1 + 0.1 * torch.randn(count, 3, 1, 1, generator=generator)
    shift = 0.05 * torch.randn(count, 3, 1, 1, generator=generator)
    return seen * gain + shift + 0.05 * torch.randn(seen.shape, generator=generator)


def trained(pictures: Tensor, concepts: list[str], styles: list[str], file: Path, steps: int = 1200) -> Embedding:
    """The network of `file`, trained and saved there first if it is missing.

    Args:
        pictures: Real ones, (N, H, W, 3) uint8.
        concepts, styles: Those of each picture.
        file: A safetensors file.
        steps: Their number, of 64 pictures each.
    """
    names = sorted(set(concepts))
    network = Embedding(len(names), len(STYLES))
    if file.exists():
        network.load_state_dict(load_file(file))
        return network.eval()
    torch.manual_seed(1)
    network = Embedding(len(names), len(STYLES))
    small = shrunk(pictures)
    concept = torch.tensor([names.index(c) for c in concepts])
    style = torch.tensor([STYLES.index(s) for s in styles])
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    generator = torch.Generator().manual_seed(1)
    for _ in tqdm(range(steps), desc="embedding"):
        picks = torch.randint(len(small), (64,), generator=generator)
        of_concept, of_style = network.scores(network(distorted(small[picks], generator)))
        loss = F.cross_entropy(of_concept, concept[picks]) + 0.5 * F.cross_entropy(of_style, style[picks])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    save_file(network.state_dict(), file)
    return network.eval()


@torch.no_grad()
def embed_distorted(network: Embedding, pictures: Tensor, seed: int = 7) -> Tensor:
    """Vectors (N, 128) of distorted views of pictures (N, H, W, 3) uint8."""
    return network(distorted(shrunk(pictures), torch.Generator().manual_seed(seed)))
