"""`Guider`: a rule and a policy as a guider of diffusers, for Modular Diffusers and pipelines with a `guider`.

At each step a denoising loop asks its guider which conditions to evaluate (`prepare_inputs`, where the policy
skips) and what to make of their predictions (`forward`, where the rule combines). It passes its step and timestep, but
not its scheduler and sample, which denoising needs. `loop_of` looks these up among the loop's own variables.
"""

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers.guiders import BaseGuidance, ClassifierFreeGuidance
from diffusers.guiders.guider_utils import GuiderOutput
from torch import Tensor

from diffusers_guidance import scales
from diffusers_guidance.checks import plain
from diffusers_guidance.engine import Engine, Observer
from diffusers_guidance.errors import CalibrationMismatch, GuidanceError, UnsupportedPipeline
from diffusers_guidance.learning import Learner, Recorder
from diffusers_guidance.pipelines.attach.attach import DEFAULT_POLICY, DEFAULT_RULE
from diffusers_guidance.pipelines.attach.clock import Clock
from diffusers_guidance.pipelines.attach.config import as_json, rebuilt, rebuilt_guider
from diffusers_guidance.pipelines.attach.fingerprint import module_fingerprints, setting
from diffusers_guidance.pipelines.attach.inner import COND, UNCOND, Inner
from diffusers_guidance.pipelines.attach.loop import Loop, loop_of
from diffusers_guidance.pipelines.attach.pair import Pair, Part
from diffusers_guidance.policies import Policy
from diffusers_guidance.report import Recording, Report
from diffusers_guidance.rules import Rule
from diffusers_guidance.steps import Action, Decision, History, Plan, Prediction, Step, changed, pick

_SCALE = 7.5
"""As in diffusers' guiders."""


class Guider(Pair, BaseGuidance):
    """A rule and a policy in place of diffusers' guiders.

        pipe.update_components(guider=Guider(APG(), AdaptiveGuidance(), guidance_scale=12))  # Modular Diffusers
        pipe.guider = Guider(APG(), AdaptiveGuidance(), guidance_scale=12)  # HunyuanVideo 1.5, HunyuanImage 2.1

    A guider cannot evaluate a part of a batch. The policy decides for every sample as it does under `attach`, but
    the unconditional half is skipped only once no sample needs it. A sample that stopped before the others
    stays unguided.

    Args:
        rule: how to combine both predictions. Default: `DEFAULT_RULE`, as in `attach`.
        policy: which predictions to evaluate. Default: `DEFAULT_POLICY`.
        guidance_scale: w in `u + w (c - u)` for a rule that leaves it None; 7.5 as in diffusers' guiders. Add 1 to a
            scale meant for `use_original_formulation`, which counts from 0. A schedule too: see `scales`.
        enabled: False evaluates and uses the conditional prediction alone.
        around: another guider of diffusers, such as `SkipLayerGuidance`: its conditions, scale and terms are kept. With
            `CFG()` its own combination stands untouched; another rule replaces its guidance, and not its terms.

    The configuration is plain JSON. Rule and policy may also be given as they stand there, and are rebuilt by
    their names from the subclasses of `Rule` and `Policy` that have been imported. A calibration that was loaded is
    named there by its file, folder or repository, and loaded again. What JSON cannot hold (one just made) is named as
    missing, and has to be given again: `Guider.from_config(config, policy=...)`.
    """

    _input_predictions = ["pred_cond", "pred_uncond"]  # noqa: RUF012 (the base class asks for a list)

    def __init__(
        self,
        rule: Rule | dict[str, Any] | None = None,
        policy: Policy | dict[str, Any] | None = None,
        guidance_scale: Any = _SCALE,
        enabled: bool = True,
        around: BaseGuidance | dict[str, Any] | None = None,
    ):
        kept = scales.checked(plain(guidance_scale))
        if kept is None:
            raise ValueError(f"guidance_scale=None: {scales.WANTED}")
        guidance_scale = kept
        super().__init__(enabled=enabled)
        self._inner = Inner(ClassifierFreeGuidance() if around is None else rebuilt_guider(around))
        self._is_around = around is not None
        if self._is_around:
            if kept not in (_SCALE, self._inner.scale):
                raise ValueError(f"guidance_scale={kept!r}: with around={self._inner.name} the scale is that guider's")
            guidance_scale = self._inner.scale
        self.rule = DEFAULT_RULE if rule is None else rebuilt(Rule, rule)
        self.policy = DEFAULT_POLICY if policy is None else rebuilt(Policy, policy)
        self.guidance_scale = guidance_scale
        self.register_to_config(
            guidance_scale=kept, enabled=enabled, around=self._inner.config() if self._is_around else None
        )
        self.observers: list[Observer] = []
        """Told of every step of the next runs; see `engine.Observer`."""
        self._learner = Learner()
        self._run: _Run | None = None
        self._loop = Loop(None, None)
        self._denoiser = ""
        self._plan: Plan | None = None
        self._batches: set[int] = set()

    def _checked(self, name: str, part: Part, kind: type[Part], such: str) -> Part:
        """The rule or policy that is set, and noted in the configuration."""
        self.register_to_config(**{name: as_json(super()._checked(name, part, kind, such))})
        return part

    @property
    def report(self) -> Report:
        """What the last run evaluated and saved; an interrupted run's report ends where it was interrupted."""
        if self._run is None:
            raise GuidanceError("no report yet: call the pipeline first")
        return self._run.finished_report()

    # What a loop asks, in the order it does

    @property
    def num_conditions(self) -> int:
        """Conditions to prepare for a run; a step may evaluate fewer.

        It is the same at every step. Pipelines ask before a run, to know whether to encode the negative prompt, and the
        answer must not depend on where the last run ended.
        """
        self._ask()
        return self._inner.most if self._enabled else 1

    @property
    def is_conditional(self) -> bool:
        return self._inner.guider.is_conditional

    def set_state(self, step: int, num_inference_steps: int, timestep: Tensor) -> None:
        """Begins a step: finds the loop's place and plans the step."""
        following = None if self._step is None else self._step + 1
        super().set_state(step, num_inference_steps, timestep)
        self._ask()
        # A range is around's: a loop may make more evaluations than it counts steps.
        self._inner.begin(self._enabled, step, num_inference_steps if self._is_around else None, timestep)
        self._loop = loop_of(self, sys._getframe(1))
        scheduler = getattr(self._loop.pipe, "scheduler", None)
        timesteps = getattr(scheduler, "timesteps", None)
        if self._run is None or step != following or timesteps is not self._run.timesteps:
            name = type(self._loop.pipe).__name__ if self._loop.pipe is not None else ""
            self._learn()
            policy = self._learner.informed(self.policy, self._fingerprints)
            recorder = Recorder() if policy.learns else None
            recording = Recording(Report(name, repr(self.rule), repr(self.policy)), step)
            self._run = _Run(recording, timesteps, policy, recorder)
        if scheduler is not None:
            self._run.clock.tick(scheduler, timestep)
        # The first step is evaluated in full, as under `attach`, and planned when the batch is known.
        self._plan = None if self._run.engine is None else self._planned(self._run.engine)

    def prepare_inputs(self, data: dict[str, Any]) -> list[Any]:
        """The inputs of each evaluation of this step, the conditional one first."""
        return self._chosen(self._inner.guider.prepare_inputs(data))

    def prepare_inputs_from_block_state(self, data: Any, input_fields: dict[str, Any]) -> list[Any]:
        """The same, with inputs given by their names in `data`."""
        return self._chosen(self._inner.guider.prepare_inputs_from_block_state(data, input_fields))

    def prepare_models(self, denoiser: torch.nn.Module) -> None:
        """Called before every evaluation."""
        self._inner.prepare(denoiser, self._count_prepared)
        super().prepare_models(denoiser)
        parts = {} if self._loop.pipe is None else vars(self._loop.pipe)
        self._denoiser = next((name for name, part in parts.items() if part is denoiser), "")

    def cleanup_models(self, denoiser: torch.nn.Module) -> None:
        """Called after every evaluation."""
        self._inner.guider.cleanup_models(denoiser)

    def __call__(self, data: list[Any]) -> GuiderOutput:
        """The guided prediction, from the batches of `prepare_inputs`, each with a `noise_pred`."""
        if data:
            return self.forward(**{getattr(batch, self._identifier_key): batch.noise_pred for batch in data})
        run, plan = self._run, self._plan  # nothing was evaluated
        assert run is not None and run.engine is not None and plan is not None and run.held is not None
        c, step = run.held, self._step_now()
        step = step.on(self._loop.latents, c[:, : self._tokens(c)], step.space)
        pred = run.engine.forecast(step, plan, 0, self._branches * len(plan)).to(c.dtype)
        return self._put_out(step, None, pred, c.clone(), None)

    def forward(self, pred_cond: Tensor, pred_uncond: Tensor | None = None, **further: Tensor) -> GuiderOutput:
        """The guided prediction, from what was evaluated; `further` is what the guider that it is `around` asks for."""
        run = self._run
        if run is None:
            raise GuidanceError("call a guider's set_state before every step")
        step, prediction = self._step_now(), None
        if self._is_alone:
            alone = [Decision(Action.CONDITIONAL, "no guidance: disabled, or one prediction by its settings")]
            rows = len(pred_cond)
            step = changed(step, w=None)
            run.recording.add(step, alone * rows, [False] * rows, rows, rows)
            if run.engine is not None:  # no forecast leads to or from an unguided step
                run.engine.history.lapse()
            pred = self._inner.combined({COND: pred_cond})
        else:
            n = self._tokens(pred_cond)
            c, u = pred_cond[:, :n], None if pred_uncond is None else pred_uncond[:, :n]
            engine = self._settled(run, c)
            pred, prediction = self._guide(run, engine, step, c, u, {name: p[:, :n] for name, p in further.items()})
            if engine.policy.hands:
                run.held = pred_cond.clone()
                pred = engine.hand(step.on(self._loop.latents, c, step.space), pred, prediction)
        return self._put_out(step, prediction, pred, pred_cond, pred_uncond)

    # How it answers

    def _put_out(
        self, step: Step, prediction: Prediction | None, pred: Tensor, cond: Tensor, uncond: Tensor | None
    ) -> GuiderOutput:
        """Ends a step: tells the observers, and gives back the tokens that are not the sample's."""
        for observer in self.observers:
            observer(step.on(self._loop.latents, pred, step.space), prediction, pred)
        if step.index + 1 == step.count:
            self._learn()  # else, where another denoiser takes over, as the next run begins
        self._loop = Loop(None, None)
        return GuiderOutput(
            pred=torch.cat([pred, cond[:, pred.shape[1] :]], 1) if pred.shape[1] < cond.shape[1] else pred,
            pred_cond=cond,
            pred_uncond=uncond,
        )

    def _ask(self) -> None:
        """Has a guider that is around none guide wherever its schedule does; each step's scale is the engine's."""
        if not self._is_around:
            self._inner.guider.guidance_scale = 2.0 if self._given is not None and scales.guides(self._given) else 1.0

    @property
    def _given(self) -> scales.Given | None:
        return self.guidance_scale if self.rule.guidance_scale is None else self.rule.guidance_scale

    @property
    def _w(self) -> float | None:
        """The scale where it is a number; a schedule's is settled by the engine."""
        given = self._given
        return None if isinstance(given, str | tuple) else given

    @property
    def _is_alone(self) -> bool:
        """Whether this step has one prediction of a sample."""
        return self._branches == 1

    @property
    def _branches(self) -> int:
        """Evaluations of a sample at a step in full."""
        return len(self._inner.names)

    def _chosen(self, batches: list[Any]) -> list[Any]:
        """Those of a step's batches that are to be evaluated."""
        run, inner = self._run, self._inner
        if run is None:
            raise GuidanceError("call a guider's set_state before every step")
        inner.asks(batches)
        if run.names != inner.names:  # no forecast leads to or from a step that has other terms
            if run.engine is not None:
                run.engine.history.lapse()
                self._plan = self._planned(run.engine)
            run.names = [*inner.names]
        actions = {each.action for each in self._plan or () if not self._is_alone}
        skips = actions == {Action.NEITHER}
        batches = inner.kept(batches, skips, without=bool(actions) and Action.BOTH not in actions)
        conditions = batches[0].as_dict().values() if batches else ()
        self._batches = {len(v) for v in conditions if isinstance(v, list) or (isinstance(v, Tensor) and v.ndim)}
        return batches

    def _step_now(self) -> Step:
        run = self._run
        assert run is not None
        clock, first = run.clock, run.recording.first
        count = first + clock.count if clock.count else self._num_inference_steps
        step = clock.step(self._step, count, first)
        return changed(step, denoiser=self._denoiser, branches=max(self._branches, 2), rows=self._rows, w=self._w)

    @property
    def _rows(self) -> int:
        """Samples in the batch, once that is known."""
        return 1 if self._run is None or self._run.engine is None else self._run.engine.history.rows

    def _planned(self, engine: Engine) -> Plan:
        """The policy's plan for the step: "neither" becomes "both" unless the policy hands on a forecast."""
        plan = engine.plan(changed(self._step_now(), w=None))
        if engine.policy.hands and all(each.action == Action.NEITHER for each in plan):
            return plan
        return [Decision(Action.BOTH if action == Action.NEITHER else action, why) for action, why in plan]

    def _settled(self, run: "_Run", c: Tensor) -> Engine:
        """The run's engine, now that the batch is known."""
        if self._batches and len(c) not in self._batches:
            raise UnsupportedPipeline(
                f"{run.recording.report.pipeline} guides a prediction of shape {tuple(c.shape)} from conditions for a "
                f"batch of {' or '.join(map(str, sorted(self._batches)))}: its samples cannot be told apart; use the "
                "loop's own guider"
            )
        if run.engine is None:
            history = History.following(self._histories(run), run.recording.first, len(c), self._denoiser)
            given = self._given
            rule = replace(self.rule, guidance_scale=given) if scales.changes(given) else self.rule
            run.engine = Engine(rule, run.policy, history, run.recording, recorder=run.recorder)
            run.engine.check(lambda: self._setting(run))
            self._plan = self._planned(run.engine)
        return run.engine

    def _histories(self, run: "_Run") -> list[History]:
        """Those of the loop's guiders, one for each denoiser."""
        parts = () if self._loop.pipe is None else vars(self._loop.pipe).values()
        runs = [part._run for part in parts if isinstance(part, Guider) and part._run is not None]
        return [each.engine.history for each in runs if each.engine is not None and each.timesteps is run.timesteps]

    def _setting(self, run: "_Run") -> dict[str, Any]:
        """This loop's values of what a calibration depends on."""
        pipe = self._loop.pipe
        if pipe is None or not self._denoiser:
            raise CalibrationMismatch(
                f"{self.policy.calibration!r}: no pipeline in reach of this loop to compare it with"
            )
        begin = max(run.clock.begin - run.recording.first, 0)
        timesteps = run.clock.timesteps(begin, self._step_now().count)
        step, given = self._step_now(), self._given
        w: Any = scales.by_step(given, step) if self._w is None and given is not None else self._w
        found = setting(pipe, self._denoiser, w, timesteps)
        del found["pipeline"]  # a modular pipeline has classes of its own
        return found

    def _learn(self) -> None:
        """Takes what the last run of this guider showed, if it was recorded."""
        run = self._run
        if run is not None and run.recorder is not None:
            recorder, run.recorder = run.recorder, None
            run.note = self._learner.take(recorder, run.recording.report.pipeline, self._fingerprints)

    def _fingerprints(self, names: Sequence[str]) -> dict[str, Any]:
        return module_fingerprints(self._loop.pipe, names)

    def _tokens(self, c: Tensor) -> int:
        """How many of the prediction's tokens are the sample's: Qwen-Image-Edit cuts the reference's off later."""
        x = self._loop.latents
        longer = x is not None and x.ndim == c.ndim == 3 and x.shape[1] < c.shape[1]
        return x.shape[1] if x is not None and longer else c.shape[1]

    def _guide(
        self, run: "_Run", engine: Engine, step: Step, c: Tensor, u: Tensor | None, further: dict[str, Tensor]
    ) -> tuple[Tensor, Prediction]:
        plan, rows, inner = self._plan, len(c), self._inner
        assert plan is not None
        if UNCOND not in inner.names:
            plan = [Decision(Action.CONDITIONAL, f"no guidance: {inner.name} has terms alone here")] * rows
        name = run.recording.report.pipeline or "the loop of an unknown pipeline"
        x = self._loop.latents
        step = engine.settle(step.on(x, c, run.clock.denoising(name, engine.rule, engine.policy, x, c)))
        evaluated = [u is not None] * rows
        uncond = engine.fill(step, plan, c, u, evaluated)
        # The loop may reuse its memory.
        put_out = (c.clone(), uncond.clone()) if engine.policy.remembers else None
        made = rows * (1 + (u is not None) + len(further))
        prediction = Prediction(c, uncond, evaluated, put_out, made, rows * self._branches)
        parts = {COND: c, **further}
        if UNCOND in inner.names:
            parts[UNCOND] = pick([each.action == Action.CONDITIONAL for each in plan], c, uncond)
            if engine.rule.is_scheduled or not engine.rule.is_plain:
                prediction = replace(prediction, further=inner.terms(parts))

        def own(s: float | None) -> Tensor:
            w = step.w if isinstance(step.w, int | float) else None  # of samples at several, each is asked for
            return inner.combined(parts, w if s is None else s)

        def finish(guided: Tensor, cond: Tensor) -> Tensor:
            if engine.rule.is_plain:
                return own(None)  # of a sample that is not guided, with what stands in its place
            return inner.finished(guided if prediction.further is None else guided + prediction.further, cond)

        found = engine.guide(step, plan, prediction, own, finish)
        assert found.prediction is not None
        return own(None) if found.tensor is None else found.tensor, found.prediction


@dataclasses.dataclass
class _Run:
    """One run of a loop."""

    recording: Recording
    timesteps: Any
    """The scheduler's; they are made anew for every run."""
    policy: Policy
    """As it is informed by the runs before."""
    recorder: Recorder | None = None
    note: str = ""
    """What was learned from the run."""
    clock: Clock = dataclasses.field(default_factory=Clock)
    engine: Engine | None = None
    """None until the batch is known."""
    held: Tensor | None = None
    """The last conditional prediction, for a policy that `hands`."""
    names: list[str] = dataclasses.field(default_factory=list)
    """The names of the last step's predictions, for a guider around another."""

    def finished_report(self) -> Report:
        report = self.recording.finish()
        if self.clock.error is not None:
            report.conclude(f"no similarities: {self.clock.error}")
        report.conclude(self.note)
        return report
