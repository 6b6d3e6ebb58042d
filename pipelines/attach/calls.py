"""What one step asks of a denoiser: its calls, which of them are evaluated, and what the pipeline got for them."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from diffusers_guidance.pipelines.attach import told
from diffusers_guidance.pipelines.attach.cut import Made
from diffusers_guidance.steps import Plan, Step

_UNKNOWN = Step()


@dataclass
class Calls:
    """A denoiser's calls since the last step.

    `outputs` collects their predictions in the shape the pipeline gets them, skipped rows filled in; `strays` those of
    calls on another batch than the one whose formula is known. Both are copies: pipelines combine in place, and engines
    write the next output over the last. `nfe` counts the rows really evaluated and `nfe_full` those the pipeline asked
    for.
    """

    step: Step = _UNKNOWN
    """The coming one, as the plan was made for it."""
    plan: Plan | None = None
    """None until the pipeline's formula is known."""
    inputs: list[Made] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    strays: list[Tensor] = field(default_factory=list)
    surplus: list[Tensor] = field(default_factory=list)
    """Those before the step's own that are taken for somebody's probe."""
    blanks: dict[int, Tensor] = field(default_factory=dict)
    """By call, what the pipeline was given for unconditional ones that came first, to be filled in by the conditional
    one."""
    given: Any = None
    """The step's whole conditional output, where calls are made one after another."""
    skipped: partial | None = None
    """The last call that was skipped."""
    handed: Tensor | None = None
    """What the pipeline was given for it."""
    is_scanned: bool = False
    """Whether what others have put on the network was looked for."""
    is_told: bool = False
    """Whether a call's arguments told which branch it was for."""
    is_open: bool = False
    """Whether they did not at the first call, so that all is evaluated."""
    ahead: int = 0
    """How many calls were made by a network that works ahead of another."""
    is_ahead_cut: bool = False
    """Whether such a network has skipped rows, so that they can no longer be asked for."""
    nfe: int = 0
    nfe_full: int = 0

    @property
    def signature(self) -> tuple[int, ...]:
        """The rows of each."""
        return tuple(y.shape[0] for y in self.outputs)

    @property
    def arguments(self) -> list[tuple[tuple, dict]]:
        """Those of each, as long as no formula is known."""
        return [(each.args, each.kwargs) for each in self.inputs]

    @property
    def halves(self) -> list[dict[str, Tensor]]:
        """What both branches were made from, as long as no formula is known; see `told.halves`."""
        return told.halves(self.arguments, len(self.outputs[0])) if 0 < len(self.inputs) < 3 else []
