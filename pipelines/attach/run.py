"""One call of a pipeline, followed by hooks: which of its networks and schedulers were called, and what for.

    latents -> denoiser (on_call: the policy says which rows are evaluated)
            -> the pipeline's own formula
            -> scheduler.step (on_step: the formula is verified, the engine recombines; see `host`) -> latents

What a run learns of its samples ends with it; it only remembers which half is the conditional one. Its hooks exist only
while the call runs. So nothing a pipeline does between calls (offloading, swapping schedulers, copying,
saving) can lose or keep them.
"""

import sys
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from diffusers import DiffusionPipeline

from diffusers_guidance.errors import UnsupportedPipeline
from diffusers_guidance.pipelines.attach.again import Handed, same
from diffusers_guidance.pipelines.attach.arguments import by_name, parameters, with_argument
from diffusers_guidance.pipelines.attach.clock import Clock
from diffusers_guidance.pipelines.attach.company import (
    Company,
    check_end,
    check_pending,
    check_schedule,
    may_guide,
    refuse_again,
    refuse_unseen,
)
from diffusers_guidance.pipelines.attach.denoiser import Denoiser
from diffusers_guidance.pipelines.attach.discovery import Met
from diffusers_guidance.pipelines.attach.fused import FusedStep, fused_step
from diffusers_guidance.pipelines.attach.host import Host
from diffusers_guidance.pipelines.attach.intercept import intercept_call, intercept_method, is_inherited, told_of
from diffusers_guidance.pipelines.attach.parts import components, part
from diffusers_guidance.report import Report

_STEP = ("model_output", "timestep", "sample")
"""The arguments of schedulers' steps, in diffusers' order, for a scheduler that does not name them."""


class Run:
    """The call that the `host` guides."""

    def __init__(self, host: Host):
        self._host, self._call, self._denoisers = host, host.call, host.denoisers
        self._company = Company(self._call)
        self._stack: ExitStack | None = None
        """The interceptions in place while the pipeline runs."""
        self._parts: dict[str, Any] = {}
        """The pipeline's networks and schedulers by name, as last seen."""
        self._called: list[torch.nn.Module] = []
        """The networks called since the last step, in order."""
        self._last: torch.nn.Module | None = None
        """The network whose evaluation the last step used."""
        self._was_called = False
        self._clocks: defaultdict[int, Clock] = defaultdict(Clock)
        self._clock = Clock()
        """That of the scheduler stepped last."""
        self._taken: dict[int, Collection[str]] = {}
        """By scheduler, the names of its step's arguments."""
        self._timestep: Any = None
        """That of the last step whose evaluation was seen."""
        self._handed: Handed | None = None

    @property
    def report(self) -> Report:
        return self._host.report

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Puts the run between the pipeline, its denoisers and its schedulers, and always removes it again.

        A call that works in several stretches enters it for each; `finish` follows the last one.
        """
        try:
            with ExitStack() as self._stack:
                for each in self._parts.values():
                    self._step_in_front_of(each)
                if not self._parts or self._replaced():
                    self._meet()
                yield
        except BaseException:
            with suppress(Exception):  # an error of the device after a failure must not hide the failure
                self._finish()
            raise
        finally:
            self._stack = None
            self._company.leave()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Keeps watch while the pipeline waits: it is not to go on in another thread meanwhile."""
        with ExitStack() as stack:
            for each in self._parts.values():
                name = "step" if not isinstance(each, torch.nn.Module) else None
                stack.enter_context(told_of(each, name, self.on_elsewhere))
            yield

    def finish(self, result: Any) -> None:
        """Completes the report of a call that has returned; refuses a `result` that the report does not describe."""
        self._finish()
        check_end(
            self._call, self._company, self._denoisers.values(), result=result, steps=len(self.report.steps),
            was_called=self._was_called, has_schedulers=bool(self._taken), acts=self._host.acts,
            is_left_alone=self._host.is_left_alone,
        )  # fmt: skip
        check_schedule(self._call, self._host.rule, self.report)

    def _finish(self) -> None:
        self._host.finish(self._clock.error, was_left=self._was_called and not self._taken)

    def _meet(self) -> None:
        """Intercepts the networks and schedulers that the pipeline has now."""
        before, self._parts = self._parts, {}
        for name, each in components(self._call.pipe):
            if isinstance(each, DiffusionPipeline):
                self._company.take_in(each)
            else:
                self._parts[name] = each
        for name, each in self._parts.items():
            if id(each) in self._denoisers or id(each) in self._taken:
                continue
            if isinstance(each, torch.nn.Module):
                self._denoisers[id(each)] = denoiser = Denoiser(name, each, self._host.policy, self._host.may_skip)
                denoiser.cut.processors.alternate(getattr(self._call.pipe, "_pag_attn_processors", None))
            else:
                if (former := self._clocks.get(id(before.get(name)))) is not None:
                    self._clocks[id(each)] = Clock(former.steps)
                taken = parameters(type(each), "step")
                self._taken[id(each)] = taken if "model_output" in taken else _STEP
            self._step_in_front_of(each)

    def _step_in_front_of(self, each: Any) -> None:
        assert self._stack is not None
        if isinstance(each, torch.nn.Module):
            self._stack.enter_context(intercept_call(each, self.on_call, self.on_elsewhere))
        else:
            self._stack.enter_context(intercept_method(each, "step", self.on_step, self.on_elsewhere))
            self._stack.enter_context(intercept_method(each, "set_timesteps", self.on_set_timesteps))

    def _replaced(self) -> list[str]:
        """The networks and schedulers that the pipeline has replaced since they were last seen."""
        pipe, own = self._call.pipe, vars(self._call.pipe)  # most are attributes of its own
        return [n for n, each in self._parts.items() if own.get(n) is not each and part(pipe, n) is not each]

    # The hooks

    def on_set_timesteps(self, scheduler: Any, set_timesteps: Callable, args: tuple, kwargs: dict) -> Any:
        """Replaces `scheduler.set_timesteps`."""
        if self._company.is_own(sys._getframe(2)) and (clock := self._clocks.get(id(scheduler))) is not None:
            clock.begin_anew()
        return set_timesteps(*args, **kwargs)

    def on_elsewhere(self) -> None:
        """Called when a thread without a run calls a part of the pipeline."""
        self._company.was_called_elsewhere(sys._getframe(2))

    def on_call(self, module: Any, call: Callable, args: tuple, kwargs: dict) -> Any:
        """Replaces a call of the denoiser."""
        if not self._company.is_own(sys._getframe(2)):
            return call(*args, **kwargs)
        if replaced := self._replaced():
            if self._host.acts:
                step, denoisers = len(self.report.steps), self._denoisers.values()
                check_pending(self._call.name, step, replaced, self._parts, denoisers)
            self._meet()
        denoiser = self._denoisers[id(module)]
        if self._company.is_aside(sys._getframe(2)):
            return denoiser.run_aside(call, args, kwargs)
        planned = denoiser.leader or denoiser  # the one whose plan this call follows
        clock = planned.clock
        if clock is not None and not planned.now.nfe_full and (clock.ran_out or clock.loops != planned.loop):
            planned.restart()
        if planned.now.plan is None and not planned.now.nfe_full:  # the first call since the last step
            planned.begin_step(self._call.counted)
        if planned is denoiser:
            self._called.append(module)
            self._handed = None  # the next step is on another evaluation
        self._was_called = True
        return denoiser.run_of(module, call, args, kwargs)

    def on_step(self, scheduler: Any, step: Callable, args: tuple, kwargs: dict) -> Any:
        """Replaces `scheduler.step`."""
        if not self._company.is_own(sys._getframe(2)):
            return step(*args, **kwargs)
        taken = self._taken[id(scheduler)]
        given = by_name(taken, args, kwargs)
        timestep = given.get("timestep")
        called, self._called = self._called, []  # a step that an observer of this one makes is a further one
        if not called:
            self._check_seen(timestep)
            self._follow(scheduler, timestep)
            args, kwargs = self._again(taken, args, kwargs)
            return step(*args, **kwargs)
        if not {"model_output", "sample"} <= given.keys():
            raise UnsupportedPipeline(
                f"{self._call.name} calls the step of its {type(scheduler).__name__} with {', '.join(given)}: to find "
                "its guidance, attach needs a model_output and a sample; use it without attach"
            )
        output, sample = given["model_output"], given["sample"]
        network = called[-1]
        denoiser = self._denoisers[id(network)]
        if self._host.acts and denoiser.now.nfe:  # this step's network is queued: what the last one sent is there
            self._host.read()
        self._timestep, self._last = timestep, network
        self._tick(denoiser, scheduler, timestep)

        def fuse() -> FusedStep | None:
            # A step that somebody put on the scheduler must be called.
            return fused_step(scheduler, *args, **kwargs) if is_inherited(scheduler, "step", step) else None

        try:
            around = self._call.around(sample, self._clock.space)
            guided = self._host.guide(Met(denoiser, output, sample, self._clock, around), called, fuse)
        finally:
            self._called.clear()
            for each in self._denoisers.values():
                each.end_step()
        if guided.again is not None:
            self._handed = Handed.for_output(output, guided.again)
            return guided.result
        if guided.tensor is None:
            self._handed = None
            return step(*args, **kwargs)
        handed = guided.tensor
        self._handed = Handed.for_output(output, lambda: handed)
        if (fused := fuse()) is not None:
            return fused.take(handed)
        args, kwargs = with_argument(taken, args, kwargs, "model_output", handed)
        return step(*args, **kwargs)

    def _tick(self, denoiser: Denoiser, scheduler: Any, timestep: Any) -> None:
        """Advances the clock of the scheduler that steps on the denoiser's evaluation."""
        owner = self._owner(denoiser, scheduler, timestep)
        self._clock = self._clocks[id(owner)]
        self._clock.tick(owner, timestep)
        denoiser.stepped(self._clock)

    def _owner(self, denoiser: Denoiser, scheduler: Any, timestep: Any) -> Any:
        """The scheduler whose step this is: if two step on one evaluation, one for a preview, the pipeline's own."""
        own = self._parts.get("scheduler", scheduler)
        if own is scheduler:
            return scheduler
        clocks = [self._clocks.get(id(each), Clock()) for each in (own, scheduler)]
        at_home, here = (clock.expects(each, timestep) for clock, each in zip(clocks, (own, scheduler), strict=True))
        return own if at_home and (not here or denoiser.clock is clocks[0]) else scheduler

    # Further steps on one evaluation

    def _check_seen(self, timestep: Any) -> None:
        """Refuses a step without an evaluation before it, unless it is unguided or another step on the last one."""
        again = self.report.steps and same(timestep, self._timestep)
        if replaced := self._replaced():
            self._meet()
        if not again and may_guide(self._call, self._host.acts):
            refuse_unseen(self._call.name, len(self.report.steps), replaced, self._denoisers.values())

    def _follow(self, scheduler: Any, timestep: Any) -> None:
        """Switches the run to a further step's clock, if it belongs to the pipeline's own scheduler."""
        is_own = scheduler is self._parts.get("scheduler")
        if self._last is None or not is_own or not same(timestep, self._timestep):
            return
        last, clock = self._denoisers[id(self._last)], self._clocks[id(scheduler)]
        if last.clock is not clock:
            clock.tick(scheduler, timestep)
            self._clock = clock
            last.stepped(clock)

    def _again(self, taken: Collection[str], args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """The arguments of a further step on an evaluation used before, such as after a preview of the sample."""
        if self._handed is None:
            return args, kwargs
        output = by_name(taken, args, kwargs).get("model_output")
        if not self._handed.is_for(output):
            refuse_again(self._call.name, len(self.report.steps) - 1, self._host.rule, self._host.policy)
        assert output is not None
        return with_argument(taken, args, kwargs, "model_output", self._handed.guided().to(output.dtype))
