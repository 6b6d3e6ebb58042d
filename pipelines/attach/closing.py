"""What the report of a finished run says beside its steps: what a reader would wonder about."""

from diffusers_guidance import scales
from diffusers_guidance.errors import UnsupportedScheduler
from diffusers_guidance.pipelines.attach.call import Call
from diffusers_guidance.policies import EveryStep, Policy
from diffusers_guidance.report import Report
from diffusers_guidance.rules import Rule

NOT_YET = ": nothing to identify yet"
"""Ends the note of a step at which the pipeline's guidance could not be told, and why."""


def close(
    report: Report, call: Call, rule: Rule, policy: Policy, error: UnsupportedScheduler | None, was_left: bool
) -> None:
    """Completes the report.

    Args:
        error: why no predictions were denoised.
        was_left: whether networks were called, and no scheduler is known.
    """
    for step in report.steps:
        pairs = zip(step.evaluated, step.similarity, strict=False)
        broken = [i for i, (was, known) in enumerate(pairs) if was == "both" and known is None]
        if broken and error is None and step.sigma is not None and step.guidance_scale is not None:
            step.add_note(f"zero or non-finite prediction in sample {broken}")
    if not report.formula:
        report.conclude(_left_alone(report, call, rule, was_left))
    elif all(step.guidance_scale == 1 and "both" not in step.evaluated for step in report.steps):
        report.conclude(_nothing_to_guide(report, call, rule, policy))
    elif error is not None:
        report.conclude(f"no similarities: {error}")


def _nothing_to_guide(report: Report, call: Call, rule: Rule, policy: Policy) -> str:
    """What a rule and a policy could do in a run without guidance."""
    has_rule = rule.alone.is_plain and (not rule.is_plain or rule.is_scheduled)
    has_policy = not (report.saved or policy.learns or (type(policy) is EveryStep and not has_rule))
    idle = [repr(rule)] * has_rule + [repr(policy)] * has_policy
    terms = [name for name in report.nfe_by_branch if name != "cond"]
    seen = (
        f"no unconditional prediction beside {' and '.join(terms)}" if terms else "one prediction of each sample a step"
    )
    what = f"no classifier-free guidance in this call: {seen}"
    if not has_rule:
        what += _unheeded(call, rule)
    if not idle:
        return what
    more = f", {_to_guide(call)}" if has_rule else ""
    return f"{what}; {' and '.join(idle)} had nothing to do{more}"


def _unheeded(call: Call, rule: Rule) -> str:
    """A clause about a rule's own scale in a run without guidance; empty if it has none that guides."""
    given = rule.guidance_scale
    if given is None or not scales.guides(given):
        return ""
    did = "was an input of the network" if _is_fed(call) else f"guided nothing, {_to_guide(call)}"
    return f"; the rule's guidance_scale={scales.text(given)} {did}"


def _is_fed(call: Call) -> bool:
    """Whether the scale of a call without guidance goes into the network, which makes another picture of it."""
    return "true_cfg_scale" not in call.arguments and call.option("guidance_scale") > 1


def _to_guide(call: Call) -> str:
    """What a call needs for a rule to act."""
    if "true_cfg_scale" in call.arguments:
        return "which needs a negative prompt and a true_cfg_scale above 1"
    if _is_fed(call):
        return "which needs a model with guidance of its own: this one's guidance_scale is an input of the network"
    return "which needs a guidance_scale above 1"


def _left_alone(report: Report, call: Call, rule: Rule, was_left: bool) -> str:
    """Why no guidance was identified."""
    if not report.steps:
        return "no step of a scheduler: left alone" if was_left else ""
    reasons = dict.fromkeys(step.note.split(NOT_YET)[0] for step in report.steps if NOT_YET in step.note)
    if reasons:
        return f"{' or '.join(reasons)}, at every step that evaluates two: left alone"
    return (
        "no classifier-free guidance in this call: one prediction of each sample a step, as without a negative "
        f"prompt or at a scale of 1 or below: left alone{_unheeded(call, rule)}"
    )
