"""One of diffusers' guiders within a `Guider`: it says what a step evaluates, and how the predictions become one.

It may have terms beside guidance, each with a prediction p of its own (skipped layers, perturbed attention, smoothed
energy):

    guided = u + w (c - u) + sum of s (c - p)

Under `CFG()` its own combination stands untouched, whatever it is. Another rule replaces the part of w; the sum of the
terms is what the guider makes of u = c, less c. diffusers' `ClassifierFreeGuidance` is the guider without terms.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.guiders import BaseGuidance, ClassifierFreeGuidance
from diffusers.guiders.guider_utils import rescale_noise_cfg
from torch import Tensor, nn

from diffusers_guidance.errors import UnsupportedPipeline

COND, UNCOND = "pred_cond", "pred_uncond"


class Inner:
    """A guider, step by step.

    Args:
        guider: one of diffusers', or of its kind: a sum of predictions that go by their names, `pred_cond` among them.
    """

    def __init__(self, guider: BaseGuidance):
        self.guider, self._enabled = guider, guider._enabled
        self.names: list[str] = []
        """The names of all predictions of the step that the guider asks for."""
        self._places: list[int] = []
        """The places of those that are evaluated, among these."""

    @property
    def name(self) -> str:
        return type(self.guider).__name__

    @property
    def _origin(self) -> float:
        """The settled scale at which the guider's own number is 0."""
        return 1.0 if getattr(self.guider, "use_original_formulation", False) else 0.0

    @property
    def scale(self) -> float | None:
        """The settled scale w; None where there is not one alone."""
        s = getattr(self.guider, "guidance_scale", None)
        return None if s is None else s + self._origin

    @property
    def most(self) -> int:
        """Conditions of a run; a step outside the guider's range has fewer."""
        before, self.guider._num_inference_steps = self.guider._num_inference_steps, None
        try:
            return self.guider.num_conditions
        finally:
            self.guider._num_inference_steps = before

    def begin(self, enabled: bool, *step: Any) -> None:
        """Begins a step."""
        self.guider._enabled = self._enabled and enabled
        self.guider.set_state(*step)
        self.names = list(self.guider._input_predictions)[: self.guider.num_conditions]

    def asks(self, batches: Sequence[Any]) -> None:
        """Takes in the step's batches, as the guider has prepared them."""
        self.names = [getattr(each, BaseGuidance._identifier_key) for each in batches]

    def kept(self, batches: Sequence[Any], skips: bool, without: bool) -> list[Any]:
        """Those to be evaluated: none if the step `skips` all; or those `without` the unconditional one."""
        self._places = [k for k, name in enumerate(self.names) if not (skips or (without and name == UNCOND))]
        return [batches[k] for k in self._places]

    def prepare(self, denoiser: nn.Module, number: int) -> None:
        """Called before the step's evaluation of that number: the guider goes by its place among all."""
        if number < len(self._places) and self.guider._count_prepared:
            self.guider._count_prepared = self._places[number]
        self.guider.prepare_models(denoiser)

    def combined(self, parts: dict[str, Tensor], w: float | None = None) -> Tensor:
        """What the guider makes of a step's predictions, at its own scale or at a settled one."""
        if w is not None and self.scale is None:
            raise ValueError(f"guidance_scale={w!r}: {self.name} has no guidance_scale; leave that of the rule None")
        with self._with(**({} if w in (None, self.scale) else {"guidance_scale": w - self._origin})):
            return self.guider.forward(**parts).pred

    def terms(self, parts: dict[str, Tensor]) -> Tensor | None:
        """What it adds to guidance; refused where it does more with both predictions than guidance at one scale."""
        if type(self.guider) is ClassifierFreeGuidance:
            return None
        c, u, w = parts[COND], parts[UNCOND], self.scale
        with self._with(guidance_rescale=0.0):
            further = self.guider.forward(**{**parts, UNCOND: c}).pred - c
            own = self.guider.forward(**parts).pred
        made = own if w is None else u + w * (c - u) + further
        off, size = (own - made).float().norm(), max(float(t.float().norm()) for t in (c, u, own))
        if w is None or not float(off) <= 16 * torch.finfo(c.dtype).eps * (1 + abs(w)) * size:
            raise UnsupportedPipeline(
                f"{self.name} does more with both predictions than guidance at one scale, so no other rule can take "
                "its place beside what it adds: use CFG() as the rule, with any policy, or give around=None"
            )
        return further

    def finished(self, guided: Tensor, cond: Tensor) -> Tensor:
        """With the guider's own treatment of the sum."""
        share = getattr(self.guider, "guidance_rescale", 0.0)
        return rescale_noise_cfg(guided, cond, share) if share > 0 else guided

    @contextmanager
    def _with(self, **values: Any) -> Iterator[None]:
        before = {name: getattr(self.guider, name) for name in values if hasattr(self.guider, name)}
        for name in before:
            setattr(self.guider, name, values[name])
        try:
            yield
        finally:
            for name, value in before.items():
                setattr(self.guider, name, value)

    def config(self) -> dict[str, Any]:
        """Its configuration, as plain JSON."""
        return json.loads(self.guider.to_json_string())
