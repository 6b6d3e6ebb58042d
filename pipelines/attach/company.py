"""What a run must not miss: others who call its pipeline's parts, and calls that it has seen only in part.

A plain result must never pass for a guided one. This module refuses what cannot be followed, and tells the user why.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from types import CodeType, FrameType
from typing import Any, NoReturn

import torch
from diffusers import DiffusionPipeline, ModularPipeline

from diffusers_guidance import scales
from diffusers_guidance.errors import UnsupportedPipeline
from diffusers_guidance.pipelines.attach.call import Call
from diffusers_guidance.pipelines.attach.denoiser import Denoiser
from diffusers_guidance.policies import Policy
from diffusers_guidance.report import Report
from diffusers_guidance.rules import Rule


class Company:
    """Who else calls the parts of the call's pipeline, by the stack."""

    def __init__(self, call: Call):
        self._call = call
        self.stages: dict[int, Any] = {}
        """The pipelines that are attributes of this one, by id."""
        self.stranger: str | None = None
        """The last other pipeline that called a network of this one."""
        self.left_to: str | None = None
        """The last such pipeline that this one called itself."""
        self.ran_elsewhere = False
        """Whether a method of the pipeline has called its parts from another thread."""
        self._own: FrameType | None = None
        """The pipeline's loop."""
        given = {name: each for name, each in call.arguments.items() if callable(each)}
        self._given = [*given.values()]
        self._callbacks = {_code(each) for name, each in given.items() if "callback" in name} - {None}

    def take_in(self, stage: Any) -> None:
        """Notes a pipeline that is an attribute of this one."""
        self.stages[id(stage)] = stage

    def leave(self) -> None:
        """Forgets the pipeline's loop, whose frame keeps all its variables alive."""
        self._own = None

    def is_own(self, frame: FrameType | None) -> bool:
        """Whether the pipeline itself is calling, not another one that shares its parts (such as from a callback).

        The innermost pipeline on the stack tells. For a combined pipeline that may be one of its stages.
        """
        for each in _callers(frame, self._own):
            if each.f_code.co_name == "__call__" and _is_pipeline(pipe := each.f_locals.get("self")):
                if pipe is self._call.pipe or id(pipe) in self.stages:
                    self._own = each  # read once: before Python 3.13 reading a frame's variables copies them all
                    return True
                self.stranger = type(pipe).__name__
                if self._has_called(each):
                    self.left_to = self.stranger
                return False
        return True

    def is_aside(self, frame: FrameType | None) -> bool:
        """Whether a callback given to the pipeline is calling: its evaluations are not part of a step."""
        callbacks = self._callbacks
        return bool(callbacks) and any(each.f_code in callbacks for each in _callers(frame, self._own))

    def _has_called(self, frame: FrameType) -> bool:
        """Whether the pipeline itself, not a callback given to it, has called `frame`."""
        codes = {*map(_code, self._given)} - {None}
        for each in _callers(frame.f_back):
            owner = each.f_locals.get("self")
            if owner is self._call.pipe:
                return True
            if each.f_code in codes or any(owner is given for given in self._given):
                return False
        return False

    def was_called_elsewhere(self, frame: FrameType | None) -> None:
        """Notes a call of the pipeline's parts from a thread without a run."""
        pipes = (each.f_locals.get("self") for each in _callers(frame))
        self.ran_elsewhere |= next(filter(_is_pipeline, pipes), None) is self._call.pipe


def _callers(frame: FrameType | None, until: FrameType | None = None) -> Iterator[FrameType]:
    """The frame, and those that called it, the innermost first."""
    while frame is not None and frame is not until:
        yield frame
        frame = frame.f_back


def _is_pipeline(owner: Any) -> bool:
    return isinstance(owner, DiffusionPipeline | ModularPipeline)


def _code(function: Any) -> CodeType | None:
    """The code that a callable's frame runs."""
    function = getattr(getattr(function, "func", function), "__func__", function)
    return getattr(function, "__code__", getattr(type(function).__call__, "__code__", None))


def check_pending(
    name: str, step: int, replaced: Collection[str], parts: Mapping[str, Any], denoisers: Iterable[Denoiser]
) -> None:
    """Refuses to go on if a scheduler was replaced between an evaluation and its step, which was then not seen."""
    pending = [each.name for each in denoisers if each.formula is not None and each.now.outputs]
    schedulers = [each for each in replaced if not isinstance(parts[each], torch.nn.Module)]
    if pending and schedulers:
        raise UnsupportedPipeline(
            f"{name} replaced its {' and '.join(schedulers)} at step {step}, after "
            f"its {' and '.join(pending)} was evaluated, so the step was not seen: replace it before the evaluation"
        )


def refuse_unseen(name: str, step: int, replaced: Collection[str], denoisers: Iterable[Denoiser]) -> NoReturn:
    """Refuses a step without an evaluation that was seen before it."""
    if replaced:
        what = f"its {' and '.join(replaced)} was replaced while it ran: replace it before the call"
    else:
        networks = ", ".join(each.name for each in denoisers) or "none"
        what = (
            f"none of its networks that can be followed ({networks}) was called: they must be attributes of the "
            "pipeline, of type torch.nn.Module, called in the pipeline's thread; wrap another type in a "
            "Module whose forward calls it"
        )
    raise UnsupportedPipeline(
        f"{name} called scheduler.step, at step {step}, without an evaluation "
        f"that was seen, so its guidance could not be found: {what}, or use the pipeline without attach"
    )


def refuse_again(name: str, step: int, rule: Rule, policy: Policy) -> NoReturn:
    """Refuses a further step on a prediction other than the guided one."""
    raise UnsupportedPipeline(
        f"{name} called scheduler.step again, at step {step}, with "
        f"another prediction than before and without evaluating its network: {rule} and "
        f"{policy} cannot guide it; use CFG() with EveryStep(), or the pipeline without attach"
    )


def check_end(
    call: Call,
    company: Company,
    denoisers: Collection[Denoiser],
    *,
    result: Any,
    steps: int,
    was_called: bool,
    has_schedulers: bool,
    acts: bool,
    is_left_alone: bool,
) -> None:
    """Refuses a result whose guidance the report does not fully describe.

    Args:
        steps: how many were seen.
        was_called: whether a network was called.
        acts: whether anything was to replace the pipeline's own guidance.
        is_left_alone: whether a guided step's combination was the pipeline's own.
    """
    name = call.name
    if was_called and not steps and (has_schedulers or call.guides):
        raise UnsupportedPipeline(
            f"{name} ran its denoiser, but never called scheduler.step afterwards, "
            "so its guidance could not be found; use it without attach"
        )
    if not may_guide(call, acts) or (steps and not acts):
        return
    if company.ran_elsewhere:
        raise UnsupportedPipeline(
            f"{name} called its network or scheduler in another thread than its caller's, where it is not "
            f"followed: {steps} of its steps were seen. Make it work in the thread that calls it, and call it from "
            "another thread instead; or use it without attach"
        )
    unseen = company.stranger or (call.guides and not (denoisers and has_schedulers))
    if company.left_to or (not steps and unseen):
        other = company.left_to or company.stranger
        other = f"a {other}, which is not one" if other else "networks and schedulers that are none"
        raise UnsupportedPipeline(
            f"{name} left its evaluations to {other} of its attributes, so its guidance could not "
            "be found; attach to the pipeline that has them"
        )
    if not steps and has_schedulers and not getattr(call.pipe, "_interrupt", False):
        raise UnsupportedPipeline(
            f"{name} returned a {type(result).__name__}, and nothing was seen of its loop: no call of its networks "
            f"({', '.join(each.name for each in denoisers)}), no step of a scheduler. Make its loop "
            "run before it returns, in the caller's thread and process; or use it without attach"
        )
    for each in denoisers:
        left = each.unused
        # A step that a rule was to change must not stay plain; a single call may have served something else.
        single = each.formula is not None and left <= each.formula.calls
        if left and not (single and is_left_alone):
            raise UnsupportedPipeline(
                f"{name} called {each.name} {left} times after the last call of "
                f"scheduler.step that was seen, at step {steps - 1}, so its guidance could not be "
                "found from there on: a scheduler must be an attribute of the pipeline; use it without attach"
            )


def check_schedule(call: Call, rule: Rule, report: Report) -> None:
    """Refuses a run whose network took the rule's schedule for one number, the scale of all steps."""
    given, taken = rule.guidance_scale, call.arguments
    # A true_cfg_scale has no part in a run without guidance; a guidance_scale may be an input of the network.
    is_fed = "guidance_scale" in taken and "true_cfg_scale" not in taken and bool(report.steps)
    if given is not None and rule.is_scheduled and is_fed and not report.is_guided and scales.guides(given):
        raise UnsupportedPipeline(
            f"{call.name} did no classifier-free guidance in this call, and took guidance_scale="
            f"{scales.stand_in(given):g} for all of its steps, so the schedule {given!r} was not followed: "
            "give its rule one number, or leave guidance_scale to the call"
        )


def may_guide(call: Call, acts: bool) -> bool:
    """Whether an unseen step may be guidance that was to be replaced."""
    return bool(call.guides) or (call.guides is None and acts)
