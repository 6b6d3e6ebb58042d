"""What one step asks of a denoiser: its calls, and what the pipeline got for them."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
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
    """All that was put out for the step's conditional branch, where another branch's call may take it over."""
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

    def note(self, made: Tensor | None, evaluated: int, asked: int, shape: torch.Size | None) -> None:
        """Takes in a call's prediction, and its rows.

        Args:
            shape: of predictions on the batch whose formula is known.
        """
        if made is not None:
            own = shape is None or made.shape == shape or self.outputs
            (self.outputs if own else self.strays).append(made.clone())
        self.nfe += evaluated
        self.nfe_full += asked

    def settle(self) -> None:
        """Counts calls on another batch as the step's own, if there are no others."""
        if not self.outputs:
            self.outputs, self.strays = self.strays, []

    def take_last(self, count: int) -> None:
        """Counts only the last calls as the step's own; those before are `surplus`."""
        self.surplus, self.outputs = self.outputs[:-count], self.outputs[-count:]

    def take_all(self) -> None:
        """Counts all calls as the step's own again."""
        self.surplus, self.outputs = [], [*self.surplus, *self.outputs]

    def take_first(self, count: int) -> None:
        """Counts only the first calls as the step's own; the others added nothing."""
        self.outputs = self.outputs[:count]

    def cut_ahead(self) -> None:
        """Notes that a network ahead of this one has skipped rows of it."""
        self.is_ahead_cut = True

    def next_ahead(self) -> int:
        """The place of a call ahead of another network, which is made now."""
        self.ahead += 1
        return self.ahead - 1

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
