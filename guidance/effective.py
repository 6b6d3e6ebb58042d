"""How strong a rule's guidance is, in the only measure that rules share: the scale at which CFG would push as far.

Rules differ in what they do across the direction of guidance and in how far they go along it. More of the latter
alone lifts most scores, so rules are compared at equal strength too (GA-Eval, arXiv 2602.22570). As there, strength
is the projection of g - u on d = c - u, in units of d, averaged over steps and samples; g is the guided prediction:

    w_eff = <g - u, d> / <d, d> = 1 + <g - c, d> / <d, d>,     which is w for CFG at w

The authors' code takes its absolute value; here guidance away from the prompt counts as what it is.
"""

from dataclasses import dataclass, field, replace

from torch import Tensor

from diffusers_guidance.kernels import Coefficients, Gram
from diffusers_guidance.rules import Rule
from diffusers_guidance.spaces import Space


@dataclass(frozen=True)
class Watched(Rule):
    """A rule that does what `rule` does, and leaves the effective guidance scale of every step in `scales`."""

    rule: Rule = field(default_factory=Rule)
    scales: list[Tensor] = field(default_factory=list, repr=False, compare=False)
    """By step, one entry per sample (or per group of `norm_dim`)."""

    def __post_init__(self) -> None:
        for name in ("momentum", "norm_dim", "needs_denoised"):  # what runs read of a rule besides its methods
            object.__setattr__(self, name, getattr(self.rule, name))
        super().__post_init__()

    def at(self, guidance_scale: float, step: int = 0, space: Space | None = None) -> Rule:
        return replace(self, guidance_scale=guidance_scale, rule=self.rule.at(guidance_scale, step, space))

    def coefficients(self, gram: Gram, b: float) -> Coefficients:
        found = self.rule.coefficients(gram, b)
        along = found[0] * gram.Xd + (found[1] - 1) * gram.cd + found[2] * gram.dd + found[3] * gram.dm
        self.scales.append((1 + along / gram.dd).detach().float().cpu())
        return found

    @property
    def mean(self) -> float:
        """Over all steps and samples so far; those where both predictions agree have no say."""
        values = [value for step in self.scales for value in step.flatten().tolist() if abs(value) < float("inf")]
        if not values:
            raise ValueError("no guided step was seen: run the pipeline under this rule first")
        return sum(values) / len(values)
