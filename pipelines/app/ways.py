"""Ways to save that the app offers beside the policies: they need a calibration, or other steps, to become one."""

from dataclasses import dataclass

from diffusers_guidance.calibration import Calibration
from diffusers_guidance.pipelines.pictures.columns import bundled_calibrations
from diffusers_guidance.policies import EveryStep, Policy
from diffusers_guidance.policies import Schedule as FixedSchedule
from diffusers_guidance.schedules import closed_form
from diffusers_guidance.steps import Action

LETTERS = {"B": Action.BOTH, "C": Action.CONDITIONAL, "E": Action.EXTRAPOLATE, "N": Action.NEITHER}
"""How a step's action is written in a schedule."""


@dataclass(frozen=True)
class Way:
    """Base of the ways; each has defaults for all of its fields, and is shown like a policy."""

    def policy(self, calibration: Calibration | None) -> Policy:
        """What it comes down to, on a model with this calibration for the run's settings."""
        return EveryStep()

    def steps(self, asked: int) -> int:
        """How many steps it makes of those asked for."""
        return asked


@dataclass(frozen=True)
class Search(Way):
    """The best schedule for a budget, in closed form from the model's calibration.

    Args:
        budget: Network evaluations of one picture.
    """

    budget: int = 30

    def policy(self, calibration: Calibration | None) -> Policy:
        if calibration is None:
            raise ValueError(
                "Search needs a calibration for the model, scheduler, steps and scale. There are "
                f"{', '.join(bundled_calibrations())}: choose one of these settings, or another policy."
            )
        return closed_form(calibration, self.budget)


@dataclass(frozen=True)
class Schedule(Way):
    """What each step evaluates, in your own letters: B both, C conditional, E conditional and extrapolated, N neither.

    Args:
        actions: A letter for each step. N needs a calibration, as Search does.
    """

    actions: str = "BBBBBBBBEBEBEBEBCCCC"

    def policy(self, calibration: Calibration | None) -> Policy:
        unknown = sorted(set(self.actions.upper()) - set(LETTERS))
        if unknown or not self.actions:
            raise ValueError(f"actions={self.actions!r}: a letter for each step, of {', '.join(LETTERS)}.")
        found = [LETTERS[letter] for letter in self.actions.upper()]
        fits = calibration is not None and calibration.steps == len(found)
        return FixedSchedule(found, calibration if fits else None)


@dataclass(frozen=True)
class FewerSteps(Way):
    """Every step in full, but fewer of them: what saving has to beat.

    Args:
        share: Of the steps that are made.
    """

    share: float = 0.75

    def steps(self, asked: int) -> int:
        return max(1, round(self.share * asked))


WAYS: tuple[type[Way], ...] = (Search, Schedule, FewerSteps)
