"""Ways to save evaluations that the app offers beside the policies. A way becomes a policy for the run at hand."""

from dataclasses import dataclass

from diffusers_guidance.calibration import Calibration
from diffusers_guidance.pipelines.pictures.columns import bundled_calibrations
from diffusers_guidance.policies import EveryStep, Policy
from diffusers_guidance.policies import Schedule as FixedSchedule
from diffusers_guidance.schedules import closed_form
from diffusers_guidance.steps import Action

LETTERS = {"B": Action.BOTH, "C": Action.CONDITIONAL, "E": Action.EXTRAPOLATE, "N": Action.NEITHER}
"""How a schedule writes a step's action."""


@dataclass(frozen=True)
class Way:
    """Base of the ways. All fields of a way have defaults. The page shows it like a policy."""

    def policy(self, calibration: Calibration | None) -> Policy:
        """The policy for a run.

        Args:
            calibration: the model's calibration for the settings of the run, if there is one.
        """
        return EveryStep()

    def steps(self, asked: int) -> int:
        """The number of steps that the run makes if `asked` were asked for."""
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
                "Search needs a calibration for the model, scheduler, steps and scale. There are calibrations for "
                f"{', '.join(bundled_calibrations())}: choose the settings of one of these, or another policy."
            )
        return closed_form(calibration, self.budget)


@dataclass(frozen=True)
class Schedule(Way):
    """What each step evaluates, as letters: B both, C conditional, E conditional and extrapolated, N neither.

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
    """Every step in full, but fewer steps: every policy has to beat this.

    Args:
        share: The share of the steps that is made.
    """

    share: float = 0.75

    def steps(self, asked: int) -> int:
        return max(1, round(self.share * asked))


WAYS: tuple[type[Way], ...] = (Search, Schedule, FewerSteps)
