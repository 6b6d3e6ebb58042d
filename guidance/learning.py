"""Learning: a run made in full is recorded, and the runs after it use the record."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from diffusers_guidance.calibration import Calibration
from diffusers_guidance.errors import CalibrationMismatch
from diffusers_guidance.motion import Motion, level
from diffusers_guidance.policies import Policy
from diffusers_guidance.steps import Prediction, Step

Fingerprints = Callable[[Sequence[str]], dict[str, Any]]
"""Returns what tells models apart, for the networks of these names; see `Calibration.check`."""

_NOT_FULL = "not every step was evaluated"


class Recorder:
    """Records the motion of one run, as long as all of it is evaluated.

    All denoised predictions of the run are compared with each other. So all are kept until it ends, two for each step,
    on its device and in its precision. At the first step that is not evaluated they are dropped.
    """

    def __init__(self) -> None:
        self.denoisers: dict[str, None] = {}
        """The names of the networks seen so far."""
        self.lack = "no guided step was seen"
        """Why there is no motion."""
        self.last: Step | None = None
        self._seen: list[Tensor] = []
        """(2, rows, ...) for each step: X and B."""
        self._levels: list[float] = []
        self._products: list[Tensor] = []
        """(3, earlier steps) for each step, on the device."""
        self._scale: float | None = None
        self._is_over = False

    def see(self, step: Step, prediction: Prediction) -> None:
        """Sees a step all of whose predictions were evaluated."""
        if self._is_over:
            return
        space, sample, c = step.space, step.sample, prediction.cond
        if space is None or sample is None or sample.shape != c.shape or step.w is None:
            return self._stop("its predictions cannot be denoised")
        if self._seen and self._seen[0][0].shape != c.shape:
            return self._stop("its samples changed")
        self.last, self.denoisers[step.denoiser] = step, None
        working = torch.promote_types(c.dtype, torch.float32)
        cond = c.to(working)
        moved = cond if prediction.further is None else cond + prediction.further.to(working)
        x, b = space.a * sample.to(working) + space.b * moved, space.b * (cond - prediction.uncond.to(working))
        now = torch.stack([x, b]).to(c.dtype)
        apart = [(now.to(working) - each.to(working)).flatten(1) for each in self._seen]
        products = [torch.stack([(d[0] * d[0]).mean(), (d[0] * d[1]).mean(), (d[1] * d[1]).mean()]) for d in apart]
        self._products.append(torch.stack(products, 1) if products else torch.empty(3, 0, device=c.device))
        self._seen.append(now)
        self._levels.append(level(space))
        self._scale = step.typical_w if self._scale is None else self._scale
        return None

    def skip(self) -> None:
        """Sees a step that was not evaluated: this run is not recorded."""
        self._stop(_NOT_FULL)

    def _stop(self, why: str) -> None:
        self.lack, self._is_over, self._seen, self._products = why, True, [], []

    def motion(self) -> Motion | None:
        """The motion of the run so far; None if `lack` says why. Keeps nothing of the run."""
        if self._is_over or self._scale is None:
            return None
        count, rows, scale = len(self._levels), self._seen[0].shape[1], self._scale
        values = torch.zeros(3, count, count, dtype=torch.float64)
        for t, products in enumerate(self._products):
            values[:, t, :t] = values[:, :t, t] = products.double().cpu()
        levels = torch.tensor(self._levels, dtype=torch.float64)
        # A solver's stages may return to an earlier level.
        order = torch.argsort(levels, descending=True, stable=True)
        falls = torch.cat([torch.ones(1, dtype=torch.bool), levels[order].diff() < -1e-6])
        kept = order[falls]
        found = Motion(levels[kept], values[:, kept][:, :, kept], scale, rows)
        self._stop("it was recorded before")
        if len(kept) < 3:
            self.lack = "it has fewer than three noise levels"
            return None
        if not found.is_sound:
            self.lack = "its predictions stand still, or are not finite"
            return None
        return found


class Learner:
    """What a pipeline's runs have taught so far, for the policy that uses it."""

    def __init__(self) -> None:
        self.learned: Calibration | None = None
        self.lack = ""
        """Why the last full run taught nothing."""

    def calibration(self, policy: Policy) -> Calibration | None:
        """Everything known: the policy's own calibration, and what was learned."""
        given = policy.calibration
        if given is None or self.learned is None:
            return given or self.learned
        return given.portable + self.learned

    def informed(self, policy: Policy, fingerprints: Fingerprints) -> Policy:
        """The policy with what was learned; another model is learned anew."""
        if not policy.learns:
            return policy
        if self.learned is not None:
            try:
                self.learned.check({"denoisers": fingerprints([*self.learned.setting["denoisers"]])})
            except CalibrationMismatch:
                self.learned, self.lack = None, ""
        return policy.informed(self.calibration(policy), self.lack)

    def take(self, recorder: Recorder, pipeline: str, fingerprints: Fingerprints) -> str:
        """Adds what a run showed; returns a sentence about it for the report."""
        if recorder.lack == _NOT_FULL:
            return ""
        motion = recorder.motion()
        if motion is None:
            self.lack = recorder.lack
            return f"nothing was learned from this run: {recorder.lack}"
        setting = {"pipeline": pipeline, "denoisers": fingerprints([*recorder.denoisers])}
        made = Calibration(setting, {}, {}, (motion,))
        self.learned, self.lack = made if self.learned is None else self.learned + made, ""
        samples = f"{motion.runs} sample{'s' * (motion.runs > 1)}"
        return f"learned from this run: {samples} at {len(motion.levels)} noise levels, scale {motion.scale:g}"
