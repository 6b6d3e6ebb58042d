"""`attach` and `detach`: put a rule and a policy on a user's own pipeline."""

import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from diffusers import DiffusionPipeline, ModularPipeline

from diffusers_guidance import scales
from diffusers_guidance.engine import Observer
from diffusers_guidance.errors import GuidanceError
from diffusers_guidance.learning import Learner, Recorder
from diffusers_guidance.pipelines.attach.arguments import by_name, parameters, with_argument
from diffusers_guidance.pipelines.attach.call import Call
from diffusers_guidance.pipelines.attach.deferred import deferred
from diffusers_guidance.pipelines.attach.fingerprint import module_fingerprints
from diffusers_guidance.pipelines.attach.host import Host
from diffusers_guidance.pipelines.attach.intercept import catch_call, handler_of, release_call
from diffusers_guidance.pipelines.attach.pair import Pair
from diffusers_guidance.pipelines.attach.run import Run
from diffusers_guidance.pipelines.attach.turn import Turn
from diffusers_guidance.policies import Forecast, Policy
from diffusers_guidance.report import Report
from diffusers_guidance.rules import CFG, Rule

SCALES = ("true_cfg_scale", "guidance_scale")
"""Arguments that set the scale of classifier-free guidance; the first that a pipeline has counts.
If it has both, `guidance_scale` is the one embedded in a distilled model."""

DEFAULT_RULE, DEFAULT_POLICY = CFG(), Forecast()
"""The pipeline's own picture with a quarter of the NFEs saved, in whole evaluations. Of the pairs that save as much
without a calibration, it is closest to full guidance on both bundled models (docs/forecast.md)."""


class Handle(Pair):
    """What `attach` returns; also a context manager, which detaches at the end."""

    def __init__(self, pipe: DiffusionPipeline, rule: Rule, policy: Policy, original: "Handle | None" = None):
        self.pipe = pipe
        self.rule = rule
        self.policy = policy
        self.observers: list[Observer] = []
        """Called at every step of the next runs: observer(step, prediction, guided), see `engine.Observer`."""
        self._original = original
        """For a copied pipeline: the handle of the original, which gets its reports too."""
        self._turn = Turn(type(pipe).__name__)
        """Runs take turns: a pipeline has one scheduler, which can be in one run at a time."""
        self._last: Report | None = None
        self._here = threading.local()
        self._learner: Learner = Learner() if original is None else original._learner

    @property
    def report(self) -> Report:
        """What the last run evaluated and saved; an interrupted run's report ends where it was interrupted.

        It is the last run of the calling thread, if that has made one. Runs of the pipeline's copies count too; each
        copy also has its own handle (`handle_of`).
        """
        report = getattr(self._here, "report", self._last)
        if report is None:
            raise GuidanceError("no report yet: call the pipeline first")
        return report

    def detach(self) -> None:
        """Restores the pipeline to its state before `attach`; a second call does nothing."""
        if _handle_of(self.pipe) is self:
            release_call(self.pipe)

    def __enter__(self) -> "Handle":
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()

    def __repr__(self) -> str:
        return f"Handle({type(self.pipe).__name__}, rule={self.rule}, policy={self.policy})"

    def __getstate__(self) -> dict[str, Any]:
        """Copied, it is the handle of the copied pipeline."""
        return {"pipe": self.pipe, "_rule": self.rule, "_policy": self.policy, "_learned": self._learner.learned}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["pipe"], state["_rule"], state["_policy"])  # type: ignore[misc]
        self._learner.learned = state.get("_learned")

    def _heard(self, report: Report) -> None:
        self._last = self._here.report = report
        if self._original is not None:
            self._original._heard(report)

    def _run(self, pipe: Any, call: Callable, args: tuple, kwargs: dict) -> Any:
        """Replaces `pipe(...)`."""
        if pipe is not self.pipe:
            handle = handle_of(pipe)
            assert handle is not None
            return handle._run(pipe, call, args, kwargs)
        try:
            inspect.signature(type(pipe).__call__).bind(pipe, *args, **kwargs)
        except TypeError:
            return call(*args, **kwargs)  # Python's own error for a wrong argument
        taken = parameters(type(pipe), "__call__")
        if (given := self.rule.guidance_scale) is not None:
            scale = next((name for name in SCALES if name in taken), None)
            if scale is None and not self.rule.is_scheduled:
                raise ValueError(
                    f"{self.rule} sets guidance_scale, but {type(pipe).__name__} takes neither of {SCALES}: "
                    "leave it None, and set the scale in the pipeline's own way"
                )
            if scale is not None:
                args, kwargs = with_argument(taken, args, kwargs, scale, scales.stand_in(given))
        defaults = {name: value for name, value in taken.items() if value is not inspect.Parameter.empty}
        arguments = defaults | by_name(taken, args, kwargs)
        return self._guided(arguments, lambda: call(*args, **kwargs))

    def _guided(self, arguments: dict[str, Any], work: Callable[[], Any]) -> Any:
        """What `work` returns, done under a run. If it returns before all is done, so is the rest."""
        policy = self._learner.informed(self.policy, functools.partial(module_fingerprints, self.pipe))
        recorder = Recorder() if policy.learns else None
        run = Run(Host(Call(self.pipe, arguments), self.rule, policy, [*self.observers], recorder))
        with self._stretch(run):
            result = work()
        again = functools.partial(self._guided, arguments)
        finish = functools.partial(self._finish, run, recorder)
        later = deferred(result, lambda: self._stretch(run), run.waiting, finish, again)
        if later is not None:
            return later
        finish(result)
        return result

    def _finish(self, run: Run, recorder: Recorder | None, result: Any) -> None:
        self._heard(run.report)  # another run may have come in between, in a callback
        run.finish(result)
        if recorder is not None and run.report.formula:
            name, fingerprints = run.report.pipeline, functools.partial(module_fingerprints, self.pipe)
            learned = self._learner.take(recorder, name, fingerprints)
            run.report.conclude("; ".join(filter(None, [run.report.note, learned])))

    @contextmanager
    def _stretch(self, run: Run) -> Iterator[None]:
        with self._turn, run.hooks():
            self._heard(run.report)
            yield


def attach(pipe: DiffusionPipeline, rule: Rule | None = None, policy: Policy | None = None) -> Handle:
    """Guides every later call of `pipe` by `rule` under `policy`, until `detach`.

    Call the pipeline as before: same arguments, callbacks and guidance scale, any scheduler. The first step of each
    call identifies the pipeline's own guidance, and every step verifies it. Other pipelines that share its parts are
    not affected, even while it runs, in callbacks or other threads.

    Args:
        pipe: any diffusers pipeline. One without guidance (a distilled model) has nothing for a rule to do, but
            `Forecast` skips evaluations there too.
        rule: how to combine both predictions. Default: `DEFAULT_RULE`, the pipeline's own guidance.
        policy: which predictions to evaluate. Default: `DEFAULT_POLICY`, a `Forecast`.

    Returns:
        A handle with the report of the last run; attaching again replaces it.

    Raises:
        TypeError: not a diffusers pipeline, or not a rule or policy.
        UnsupportedPipeline: raised by the call, if its guidance cannot be verified; it says what was seen.
        UnsupportedScheduler: raised by the call, if the rule or policy needs denoised predictions and the
            scheduler's cannot be turned into them.
    """
    if not isinstance(pipe, DiffusionPipeline):
        instead = (
            "a modular one takes its rule and policy as a guider, pipe.update_components(guider=Guider(rule, policy)), "
            "and Guider(rule, policy, around=pipe.guider) keeps the terms of the guider that it has"
            if isinstance(pipe, ModularPipeline)
            else "attach takes a diffusers pipeline (DiffusionPipeline)"
        )
        raise TypeError(f"pipe is a {type(pipe).__name__}: {instead}")
    handle = Handle(pipe, DEFAULT_RULE if rule is None else rule, DEFAULT_POLICY if policy is None else policy)
    detach(pipe)
    catch_call(pipe, handle._run)
    return handle


@contextmanager
def borrowed(pipe: DiffusionPipeline, rule: Rule, policy: Policy) -> Iterator[Handle]:
    """`attach` for the length of a block; then restores what was attached before."""
    handle, before = Handle(pipe, rule, policy), handler_of(pipe)
    catch_call(pipe, handle._run)
    try:
        yield handle
    finally:
        if before is None:
            release_call(pipe)
        else:
            catch_call(pipe, before)


def detach(pipe: DiffusionPipeline) -> None:
    """Restores `pipe` to its state before `attach`; does nothing if nothing is attached."""
    if _handle_of(pipe) is not None:  # for a copy it is the original's handle, which stays on the original
        release_call(pipe)


def handle_of(pipe: Any) -> Handle | None:
    """The handle attached to `pipe`, or its own handle if `pipe` is a copy of an attached one; None without either."""
    handle = _handle_of(pipe)
    if handle is None or handle.pipe is pipe:
        return handle
    own = Handle(pipe, handle.rule, handle.policy, handle)
    own.observers = handle.observers
    catch_call(pipe, own._run)
    return own


def _handle_of(pipe: Any) -> Handle | None:
    return getattr(handler_of(pipe), "__self__", None)
