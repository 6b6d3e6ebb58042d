"""A rule and a policy, held by whoever runs them: a `Handle` or a `Guider`."""

from typing import TypeVar

from diffusers_guidance.calibration import Calibration
from diffusers_guidance.learning import Learner
from diffusers_guidance.policies import Policy
from diffusers_guidance.rules import Rule

Part = TypeVar("Part", Rule, Policy)


class Pair:
    """The rule and the policy of the next run; both may be set at any time."""

    _learner: Learner

    @property
    def rule(self) -> Rule:
        """The rule of the next run; may be set at any time."""
        return self._rule

    @rule.setter
    def rule(self, rule: Rule) -> None:
        self._rule = self._checked("rule", rule, Rule, "APG() or CFG()")

    @property
    def policy(self) -> Policy:
        """The policy of the next run; may be set at any time."""
        return self._policy

    @policy.setter
    def policy(self, policy: Policy) -> None:
        self._policy = self._checked("policy", policy, Policy, "AdaptiveGuidance() or EveryStep()")

    @property
    def calibration(self) -> Calibration | None:
        """What the policy was given to go by, and what was learned since (`Forecast(learn=True)`)."""
        return self._learner.calibration(self.policy)

    def _checked(self, name: str, part: Part, kind: type[Part], such: str) -> Part:
        """The rule or policy that is set."""
        if not isinstance(part, kind):
            raise TypeError(f"{name}={part!r}: an instance of a {name}, such as {such}")
        return part
