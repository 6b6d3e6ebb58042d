"""A small network that embeds pictures, to look up the real pictures most similar to a generated one.

Its weights lie beside a model (`metrics.Retrieval`); `benchmarks/training/embedding.py` trains it.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIZE = 64
"""Side of its input in pixels."""


class Embedding(nn.Module):
    """Pictures (B, 3, 64, 64) in [-1, 1] to vectors of length 1, (B, 128).

    Args:
        concepts, styles: how many it tells apart.
    """

    def __init__(self, concepts: int, styles: int):
        super().__init__()
        widths = (3, 32, 64, 128, 256)
        self.layers = nn.Sequential()
        for before, after in itertools.pairwise(widths):
            conv = nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False)
            self.layers.extend([conv, nn.BatchNorm2d(after), nn.ReLU()])
        self.layers.extend([nn.AvgPool2d(2), nn.Flatten(), nn.Linear(4 * widths[-1], 128)])
        self.concept = nn.Linear(128, concepts, bias=False)
        self.style = nn.Linear(128, styles, bias=False)

    def forward(self, pictures: Tensor) -> Tensor:
        return F.normalize(self.layers(pictures), dim=1)

    def scores(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of concepts and of styles: 20 times the cosine to each one's direction."""
        concept, style = (20 * vectors @ F.normalize(head.weight, dim=1).T for head in (self.concept, self.style))
        return concept, style


def shrunk(pictures: Tensor) -> Tensor:
    """Pictures (N, H, W, 3) uint8 as the network takes them, (N, 3, 64, 64)."""
    parts = [F.adaptive_avg_pool2d(p.permute(0, 3, 1, 2).float() / 127.5 - 1, SIZE) for p in pictures.split(256)]
    return torch.cat(parts)


@torch.no_grad()
def embed(network: Embedding, pictures: Tensor) -> Tensor:
    """Vectors (N, 128) of pictures (N, H, W, 3) uint8."""
    return torch.cat([network(part) for part in shrunk(pictures).split(256)])
