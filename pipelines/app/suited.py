"""What suits each bundled model: its scales, its APG, and prompts that it draws well. All else follows from the model.

Each figure is measured: scales and APG's settings by `benchmarks/apart.py`, in docs/results.
"""

from dataclasses import dataclass, field

from diffusers_guidance import samples
from diffusers_guidance.rules import APG


@dataclass(frozen=True)
class Suited:
    """Where the page starts on a model; by default, on one of the user's own."""

    scale: float = 5.0
    """The scale of CFG that shows best what is asked for."""
    high: float = 15.0
    """One at which CFG burns."""
    apg: APG = field(default_factory=APG)
    """APG's settings at that scale."""
    examples: tuple[str, ...] = ("a dog face, noto style", "a hamburger, 3d style", "a red apple, flat style",
                                 "a pizza, noto style", "a cat face, noto style", "a rocket, noto style")  # fmt: skip
    """Prompts to start from."""


_KNOWN = {"emoji": Suited(apg=APG.preset("emoji")), "emoji-flow": Suited(apg=APG.preset("normalised"))}


def suited(model: str) -> Suited:
    """What suits a model, by its name."""
    return _KNOWN.get(model, Suited()) if model in samples.models() else Suited()
