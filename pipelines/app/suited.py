"""What suits each bundled model: scales, settings of APG, and prompts that it draws well.

`benchmarks/apart.py` measured APG's settings; the figures are in docs/results. Scales and prompts are chosen by eye.
"""

from dataclasses import dataclass, field

from diffusers_guidance import samples
from diffusers_guidance.rules import APG


@dataclass(frozen=True)
class Suited:
    """Where the page starts on a model. The defaults are for a user's model."""

    scale: float = 5.0
    """The scale at which CFG shows best what the prompt asks for."""
    high: float = 15.0
    """A scale at which CFG burns."""
    apg: APG = field(default_factory=APG)
    """APG's settings at the high scale."""
    alone: str = ""
    """A sentence: whether APG and AG take the burn out by themselves (docs/models.md)."""
    examples: tuple[str, ...] = ("a hamburger, 3d style", "a dog face, noto style", "a red apple, flat style",
                                 "a pizza, noto style", "a cat face, noto style", "a rocket, noto style")  # fmt: skip
    """Prompts to start from. The page opens with the first: at half the time its picture is the same to the eye."""


_KNOWN = {
    "emoji": Suited(apg=APG.preset("emoji"), alone="Here neither alone takes the burn out."),
    "emoji-flow": Suited(apg=APG.preset("emoji-flow"), alone="Here APG alone takes the burn out. AG alone does not."),
}


def suited(model: str) -> Suited:
    """What suits the model of this name."""
    return _KNOWN.get(model, Suited()) if model in samples.models() else Suited()
