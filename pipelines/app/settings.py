"""The app's settings, each with its default, its limits and its words.

The page, the named API endpoints and the MCP tools are all built from the forms below. Pydantic checks every
arriving value here and nowhere else. Names are looked up in fixed lists.
"""

import functools
import inspect
import math
import random
import re
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields, replace
from types import NoneType
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, get_args, get_origin, get_type_hints
from urllib.parse import urlencode

from pydantic import AfterValidator, BaseModel, Field, ValidationInfo, create_model

from diffusers_guidance import samples
from diffusers_guidance.pipelines.app.suited import Suited, suited
from diffusers_guidance.pipelines.app.ways import WAYS, Way
from diffusers_guidance.pipelines.pictures.columns import Column, known_policies, known_rules
from diffusers_guidance.pipelines.pictures.make import Case
from diffusers_guidance.pipelines.support.written import Wanted, checked, refused
from diffusers_guidance.policies import AdaptiveGuidance, EveryStep, Forecast, Policy
from diffusers_guidance.rules import APG, CFG, Rule
from diffusers_guidance.scales import Given
from diffusers_guidance.scales import checked as checked_scale

BUNDLED = samples.MODEL.name
"""The first of the models that come with the package (`samples.models`); the page starts with it."""

OWN = "the model's own"
SCHEDULERS: dict[str, str | None] = {
    OWN: None,
    "DDIM": "DDIMScheduler",
    "DPM++ 2M": "DPMSolverMultistepScheduler",
    "Euler": "EulerDiscreteScheduler",
    "Euler ancestral": "EulerAncestralDiscreteScheduler",
    "Heun": "HeunDiscreteScheduler",
    "UniPC": "UniPCMultistepScheduler",
}


def _usable(types: list[type], first: type) -> dict[str, type]:
    """Those that need no arguments, by name."""
    usable = [t for t in types if all(f.default is not MISSING or f.default_factory is not MISSING for f in fields(t))]
    found: dict[str, type] = {first.__name__: first}
    for each in usable:
        found.setdefault(each.__name__, each)  # the package's own names stay its own
    return found


def rules() -> dict[str, type[Rule]]:
    """By name, those to choose from: CFG, the package's others, and those that were imported."""
    return _usable(known_rules(), CFG)


def policies() -> dict[str, Any]:
    """Likewise the policies, Forecast first, and the ways that become one."""
    usable = _usable(known_policies(), Forecast)
    return usable | {each.__name__: each for each in WAYS if each.__name__ not in usable}


EXAMPLES = suited(BUNDLED).examples
"""Prompts to start from; the page opens with the first."""

SCALES = (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.5, 9.0, 10.0, 12.0, 15.0, 18.0, 20.0, 25.0)
"""To be compared."""

COMPARISONS = {
    "Ways to save": (("CFG",), ("Forecast", "EveryStep", "AdaptiveGuidance", "Hold", "FewerSteps"), ("scale",)),
    "What takes the burn out": (("CFG", "APG"), ("EveryStep", "AdaptiveGuidance"), ("scale", "high")),
    "Rules at a high scale": (
        ("CFG", "APG", "CFGZeroStar", "MagnitudeAware", "TCFG"), ("EveryStep",), ("scale", "high"),
    ),
}  # fmt: skip
"""Rules, policies, and which scales of those that suit the model, to start from; the page opens with the first."""


def comparison(name: str, model: str = BUNDLED) -> tuple[tuple[str, ...], tuple[str, ...], tuple[float, ...]]:
    """One of `COMPARISONS` on a model."""
    rules, policies, scales = COMPARISONS[name]
    return rules, policies, tuple(getattr(suited(model), scale) for scale in scales)


# Kinds of values; each says in words what it takes


@dataclass(frozen=True)
class Text:
    label: str
    info: str = ""
    longest: int = 500

    @property
    def type(self) -> Any:
        def check(value: str, info: ValidationInfo) -> str:
            if len(value) > self.longest:
                raise ValueError(f"{info.field_name} has {len(value)} characters: at most {self.longest}, please.")
            if any("\ud800" <= character <= "\udfff" for character in value):
                raise ValueError(f"{info.field_name} is not valid text.")
            return value.strip()

        return Annotated[str, Field(strict=True), Wanted("a text"), AfterValidator(check)]


@dataclass(frozen=True)
class Number:
    label: str
    low: float
    high: float
    step: float = 1
    info: str = ""
    optional: bool = False
    """Whether it may be empty, which is None."""

    @property
    def whole(self) -> bool:
        return self.step == int(self.step)

    @property
    def words(self) -> str:
        """What is wanted."""
        words = ["a whole number" if self.whole else "a number"]
        if math.isfinite(self.low):
            words += [f"from {_plain(self.low)}", f"to {_plain(self.high)}" if math.isfinite(self.high) else "up"]
        return " ".join(words) + ", or nothing" * self.optional

    @property
    def type(self) -> Any:
        limits = Field(
            strict=True, ge=self.low, le=self.high, multiple_of=1 if self.whole else None, allow_inf_nan=False
        )
        number: Any = Annotated[float, limits, AfterValidator(int if self.whole else float)]
        return Annotated[number | None if self.optional else number, Wanted(self.words)]


@dataclass(frozen=True)
class Side(Number):
    """A picture's side; 0 is the model's own, and the model has its own limits."""

    @property
    def type(self) -> Any:
        side: Any = super().type
        return Annotated[side, Field(multiple_of=self.step), Wanted(f"a multiple of {self.step:g}")]


@dataclass(frozen=True)
class Flag:
    label: str
    info: str = ""
    type = Annotated[bool, Field(strict=True), Wanted("true or false")]


@dataclass(frozen=True)
class OneOf:
    label: str
    choices: tuple[str, ...]
    info: str = ""

    @property
    def type(self) -> Any:
        return Annotated[Literal[self.choices], Wanted(f"one of {', '.join(self.choices)}")]


@dataclass(frozen=True)
class SomeOf:
    label: str
    choices: tuple[Any, ...]
    info: str = ""

    @property
    def type(self) -> Any:
        def check(value: list[Any]) -> tuple[Any, ...]:
            return tuple(choice for choice in self.choices if choice in value)

        one: Any = Annotated[type(self.choices[0]), Field(strict=True), AfterValidator(self._known)]
        some = Wanted(f"a list of some of {', '.join(map(str, self.choices))}")
        return Annotated[list[one], some, AfterValidator(check)]

    def _known(self, value: Any) -> Any:
        if value not in self.choices:
            raise refused("one of them")
        return value


def _said(name: str, value: Any, wanted: str) -> str:
    given = f"{name} is empty" if value is None else f"{name}={reprlib.repr(value)}"
    return f"{given}: {wanted}, please."


def _plain(number: float) -> str:
    """Every digit of a whole number, and no more than there are of another."""
    return str(int(number)) if number == int(number) else f"{number:g}"


F = TypeVar("F", bound="Form")


class Setting(NamedTuple):
    """One of a form's: what it is unless given, and what it takes."""

    default: Any
    kind: Any


def setting(default: Any, kind: Any | Callable[[], Any]) -> Any:
    """A setting of a form, an attribute of its class; a kind that depends on what was imported is made when asked."""
    return Setting(default, kind)


class Form:
    """Base of the forms: checks every setting when it is made."""

    def __init__(self, **given: Any):
        kinds = self.kinds()
        if unknown := given.keys() - kinds:
            raise TypeError(f"{min(unknown)} is no setting: there are {', '.join(kinds)}")
        read: BaseModel = checked(_schema(type(self).__name__, tuple(kinds.items())), self.defaults() | given, _said)
        self.__dict__.update(read)
        self.check()

    def check(self) -> None:
        """Refuses settings that do not go together."""

    @classmethod
    def settings(cls) -> dict[str, Setting]:
        """All there are, by name."""
        own = {name: each for name, each in vars(cls).items() if isinstance(each, Setting)}
        return {name: Setting(each.default, _now(each.kind)) for name, each in own.items()}

    @classmethod
    def kinds(cls) -> dict[str, Any]:
        """The kind of every setting, by name."""
        return {name: each.kind for name, each in cls.settings().items()}

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        return {name: each.default for name, each in cls.settings().items()}

    def values(self) -> dict[str, Any]:
        """Every setting as it is here, by name."""
        return dict(vars(self))

    def but(self: F, **changes: Any) -> F:
        """A form with some settings changed."""
        return type(self)(**self.values() | changes)


def _now(kind: Any) -> Any:
    return kind() if inspect.isfunction(kind) else kind


@functools.lru_cache
def _schema(name: str, kinds: tuple[tuple[str, Any], ...]) -> type[BaseModel]:
    types: dict[str, Any] = {name: (kind.type, ...) for name, kind in kinds}
    return create_model(name, **types)


# Knobs


class Knob(NamedTuple):
    """A field of a rule or policy that can be set here."""

    owner: type
    field: str
    setting: Setting


KINDS: dict[str, dict[str, Any]] = {
    "APG": {
        "momentum": Number("Momentum", -0.95, 0.95, 0.05, "Negative pushes away from past directions."),
        "norm_threshold": Number("Norm threshold", 0, 100, 0.5, "Cap on the update; empty: no cap.", optional=True),
        "eta": Number("Eta", 0, 1, 0.05, "Weight of the part that drives saturation."),
        "reference_numel": None,
        "cfg_steps": None,
        "form": None,
    },
    "BetaCFG": {
        "gamma": Number("Gamma", 0, 2, 0.05, "Power of the norm that guidance is divided by."),
        "a": Number("Alpha of the curve", 1, 10, 0.1),
        "b": Number("Beta of the curve", 1, 10, 0.1),
    },
    "TAG": {"eta": Number("Eta", 1, 3, 0.05, "Factor of the part across the sample; 1 is CFG.")},
    "ADG": {"most": Number("Largest angle", 0.05, 3, 0.05, "In radians.")},
    "MomentumGuidance": {
        "alpha": Number("Alpha", 0, 5, 0.05, "How far to go on from the average; 0 is CFG."),
        "beta": Number("Beta", 0, 0.95, 0.05, "How much of the average is kept."),
    },
    "CFG": {"rescale": Number("Rescale", 0, 1, 0.05, "Pulls the contrast back; 0 is off.")},
    "CFGZeroStar": {"zero_init": Number("Zero steps", 0, 20, info="First steps that stand still.")},
    "MagnitudeAware": {"alpha": Number("Alpha", 0, 50, 0.5, "How strongly far moves are damped; 0 is CFG.")},
    "AdaptiveGuidance": {
        "threshold": Number("Threshold", 0.5, 1, 0.001, "Similarity from which guidance stops."),
        "patience": Number("Patience", 1, 10, info="Steps in a row that must reach it."),
        "space": OneOf("Space", ("denoised", "noise"), "The predictions that are compared."),
    },
    "Interval": {
        "start": Number("Start", 0, 1, 0.05, "Guide from this share of the steps."),
        "stop": Number("Stop", 0, 1, 0.05, "Guide up to this share of the steps."),
        "by": None,
    },
    "StepAG": {"p": Number("Share", 0.05, 1, 0.05, "Guide in this first share of the steps.")},
    "Forecast": {
        "save": Number("Save", 0, 0.75, 0.05, "The share of the evaluations to skip."),
        "nfe": None,
        "learn": Flag("Learn", "The next picture is made in full and recorded; those after it go by what it showed."),
    },
    "Search": {"budget": Number("Budget", 4, 200, 1, "Network evaluations of one picture.")},
    "Schedule": {"actions": Text("Actions", "A letter for each step: B, C, E or N.", 100)},
    "FewerSteps": {"share": Number("Share of the steps", 0.1, 1, 0.05, "Those that are made.")},
    "Hold": {
        "period": Number("Period", 1, 10, info="Steps from one full evaluation to the next."),
        "warmup": Number("Warm-up", 1, 20, info="First steps, evaluated in full."),
        "last": Flag("The last step in full", "Periods count back from it."),
    },
}
"""How fields of the package's own rules and policies are shown; None: not at all. Others follow from their types."""


def knobs() -> dict[str, Knob]:
    """Those of all rules and policies, each with its owner's default.

    One goes by its field's name, or by its owner's and the field's where that name is another's already.
    """
    found: dict[str, Knob] = {}
    taken = {name for name, each in vars(Generation).items() if isinstance(each, Setting)}
    for owner in [*rules().values(), *policies().values()]:
        for field, made in _fields(owner).items():
            name = field if field not in taken else f"{owner.__name__}_{field}"
            found[name] = Knob(owner, field, made)
            taken.add(name)
    return found


def knobs_of(owner: type) -> list[str]:
    """The knobs that a rule or policy has; its other fields keep their defaults."""
    return [name for name, knob in knobs().items() if knob.owner is owner]


def _fields(owner: type) -> dict[str, Setting]:
    """A rule's or policy's own settings, by field."""
    shown = KINDS.get(owner.__name__, {}) if owner.__module__.split(".")[0] == __name__.split(".")[0] else {}
    try:
        hints: Mapping[str, Any] = get_type_hints(owner)
    except NameError:  # of names for type checkers alone
        hints = {}
    found = {}
    for each in fields(owner):
        if each.name == "guidance_scale" or not each.init or each.default is MISSING:
            continue
        hint = hints.get(each.name, type(each.default))
        kind = shown[each.name] if each.name in shown else _kind(hint, each.name, _told(owner, each.name))
        if kind is not None:
            found[each.name] = Setting(each.default, kind)
    return found


def _kind(hint: Any, name: str, info: str) -> Any:
    """What a field of that type takes; None where it is nothing that one can set here."""
    label = name.replace("_", " ").capitalize()
    given = [each for each in get_args(hint) if each is not NoneType]
    if get_origin(hint) is Literal and all(isinstance(each, str) for each in given):
        return OneOf(label, tuple(given), info)
    optional = NoneType in get_args(hint) and len(given) == 1
    plain = given[0] if optional else hint
    if plain is bool and not optional:
        return Flag(label, info)
    if plain in (int, float):
        return Number(label, -math.inf, math.inf, 1 if plain is int else 0.01, info, optional)
    return None


def _told(owner: type, name: str) -> str:
    """The first sentence of what its documentation's "Args" say of a field."""
    said = re.search(
        rf"^\s*{name}: (.+?)(?:\.\s|\.?\n\s*\n|\.?\n\s*\w+: |\.?\s*$)", inspect.getdoc(owner) or "", re.M | re.S
    )
    if said is None:
        return ""
    sentence = " ".join(said[1].split())
    return f"{sentence[0].upper()}{sentence[1:]}."


# Settings that several forms share

PROMPT = Text("Prompt")
NEGATIVE = Text("Negative prompt", "What the picture should not show.")
SCALE = Number("Guidance scale", 1, 30, 0.5, "How strongly the prompt counts; 1 is no guidance.")
SCHEDULE = Text("Scale over the steps", 'Instead of one scale, such as "linear(9, 3)" or "3x5+7"; empty: one.', 200)
STEPS = Number("Steps", 1, 100)
SCHEDULER = OneOf("Scheduler", tuple(SCHEDULERS))
SEED = Number("Seed", 0, 2**32 - 1)
MODEL = Text("Model", "A folder or a name on the Hugging Face hub, from those this server allows.", 300)


class Generation(Form):
    """One press of the button "Generate"."""

    prompt: str = setting(EXAMPLES[0], PROMPT)
    negative_prompt: str = setting("", NEGATIVE)
    guidance_scale: float = setting(5.0, SCALE)
    schedule: str = setting("", SCHEDULE)
    steps: int = setting(20, STEPS)
    scheduler: str = setting(OWN, SCHEDULER)
    seed: int = setting(0, SEED)
    random_seed: bool = setting(False, Flag("New seed every time"))
    batch_size: int = setting(1, Number("Pictures", 1, 8, info="Seeds count up from the first."))
    width: int = setting(0, Side("Width", 0, 2048, 8, "0: the model's own."))
    height: int = setting(0, Side("Height", 0, 2048, 8, "0: the model's own."))
    rule: str = setting("CFG", lambda: OneOf("Rule", tuple(rules()), "How both predictions of a step become one."))
    policy: str = setting("Forecast", lambda: OneOf("Policy", tuple(policies()), "Which of them each step evaluates."))
    compare_with_plain: bool = setting(
        True, Flag("Compare with plain CFG", "The same seed again, for the slider, the seconds and the dB.")
    )
    model: str = setting(BUNDLED, MODEL)

    @classmethod
    def settings(cls) -> dict[str, Setting]:
        return super().settings() | {name: knob.setting for name, knob in knobs().items()}

    def check(self) -> None:
        if not self.prompt:
            raise ValueError("The prompt is empty: say what the picture should show.")
        checked_scale(self.schedule or None)
        self._with_knobs(rules()[self.rule]())
        self.make_policy()

    def settled(self) -> "Generation":
        """These settings with their seed drawn, if it was to be."""
        return self.but(seed=random.randrange(2**32), random_seed=False) if self.random_seed else self

    @property
    def scale(self) -> Given:
        """The guidance scale, or its schedule where there is one."""
        return self.schedule or self.guidance_scale

    @property
    def seeds(self) -> list[int]:
        return [(self.seed + i) % 2**32 for i in range(self.batch_size)]

    @property
    def cases(self) -> list[Case]:
        return [Case(self.prompt, seed, self.negative_prompt or None) for seed in self.seeds]

    def make_rule(self, pipe: Any) -> Rule:
        """The chosen rule with its knobs. Of APG, what is no knob here is as the model, or `APG.preset`, has it."""
        if self.rule != APG.__name__:
            return self._with_knobs(rules()[self.rule]())
        return self._with_knobs(suited(self.model).apg if self.model in samples.models() else APG.preset(pipe))

    def make_policy(self) -> Policy | Way:
        return self._with_knobs(policies()[self.policy]())

    @property
    def steps_made(self) -> int:
        """Those of the run: a way may make fewer than asked for."""
        made = self.make_policy()
        return made.steps(self.steps) if isinstance(made, Way) else self.steps

    @classmethod
    def read(cls, written: Mapping[str, str]) -> "Generation":
        """The settings in an address: texts, which are numbers and yes or no where those are wanted.

        Raises:
            ValueError: one is none of ours, or has no such value.
        """
        kinds = cls.kinds()
        if unknown := sorted(written.keys() - kinds):
            raise ValueError(f"The address has {unknown[0]!r}: there are {', '.join(kinds)}.")
        return cls(**{name: _read(kinds[name], text) for name, text in written.items()})

    @property
    def address(self) -> str:
        """A query that carries these settings; `read` takes it apart again. Defaults are left to the page."""
        first = self.defaults()
        used = {*knobs_of(rules()[self.rule]), *knobs_of(policies()[self.policy])}
        unused = {*knobs()} - used
        kept = {
            name: value for name, value in self.values().items()
            if name in ("prompt", "seed") or (value != first[name] and name not in unused)
        }  # fmt: skip
        return urlencode({name: "" if value is None else str(value) for name, value in kept.items()})

    def _with_knobs(self, base: Any) -> Any:
        own = {knob.field: getattr(self, name) for name, knob in knobs().items() if knob.owner is type(base)}
        return replace(base, **own)


def _read(kind: Any, text: str) -> Any:
    """A value of that kind as it is written in an address; what is none stays a text, and is refused as such."""
    if isinstance(kind, Number):
        try:
            return float(text) if text else None
        except ValueError:
            return text
    return {"True": True, "False": False}.get(text, text) if isinstance(kind, Flag) else text


class Preset(NamedTuple):
    """A pair to start from, and the guidance scale that it is for; rule and scale go by what suits the model."""

    rule: Callable[[Suited], Rule]
    policy: Policy
    guidance_scale: Callable[[Suited], float]

    def settings(self, model: str = BUNDLED) -> dict[str, Any]:
        """What it sets: both names, the scale, the knobs of both; of APG its own defaults on a model of one's own."""
        suits = suited(model)
        rule, scale = self.rule(suits), self.guidance_scale(suits)
        names = {"rule": type(rule).__name__, "policy": type(self.policy).__name__}
        return {**names, "guidance_scale": scale, **as_preset(rule), **as_preset(self.policy)}


def _cfg(suits: Suited) -> Rule:
    return CFG()


def _apg(suits: Suited) -> Rule:
    return suits.apg


PRESETS = {
    "Same picture, less time": Preset(_cfg, Forecast(0.25), lambda suits: suits.scale),
    "Half the time": Preset(_cfg, Forecast(0.5), lambda suits: suits.scale),
    "High scale without burn": Preset(_apg, AdaptiveGuidance(), lambda suits: suits.high),
    "Both": Preset(_apg, Forecast(0.25), lambda suits: 1.5 * suits.scale),
    "Plain CFG": Preset(_cfg, EveryStep(), lambda suits: suits.scale),
}
"""What to start from; the page opens with the first."""


def as_preset(part: Rule | Policy) -> dict[str, Any]:
    """The knobs that make this of a rule or policy; whether Forecast learns is for the user to switch."""
    own = {name: knob for name, knob in knobs().items() if knob.owner is type(part) and knob.field != "learn"}
    return {name: getattr(part, knob.field) for name, knob in own.items()}


_FIRST = comparison(next(iter(COMPARISONS)))


class Grid(Form):
    """One press of the button "Compare"."""

    prompt: str = setting(EXAMPLES[0], PROMPT)
    negative_prompt: str = setting("", NEGATIVE)
    rules: tuple[str, ...] = setting(_FIRST[0], lambda: SomeOf("Rules", tuple(rules())))
    policies: tuple[str, ...] = setting(_FIRST[1], lambda: SomeOf("Policies", tuple(policies())))
    scales: tuple[float, ...] = setting(_FIRST[2], SomeOf("Guidance scales", SCALES))
    columns: str = setting(
        "", Text("More, with knobs of your own", "One a line, such as APG(eta=0.3)+AG@12 or Forecast(0.4).", 1000)
    )
    steps: int = setting(20, Number("Steps", 1, 50))
    scheduler: str = setting(OWN, SCHEDULER)
    seed: int = setting(0, SEED)
    model: str = setting(BUNDLED, MODEL)

    most = 24
    """Pictures in a grid."""

    def check(self) -> None:
        if not self.prompt:
            raise ValueError("The prompt is empty: say what the pictures should show.")
        kinds = self.kinds()
        for name in () if self.written else ("rules", "policies", "scales"):
            if not getattr(self, name):
                raise ValueError(f"Choose at least one of the {kinds[name].label.lower()}.")
        if self.count > self.most:
            raise ValueError(f"That is a grid of {self.count} pictures: at most {self.most}, please.")

    @property
    def count(self) -> int:
        """Of the pictures."""
        return len(self.rules) * len(self.policies) * len(self.scales) + len(self.written)

    @property
    def written(self) -> list[Column]:
        """The columns of one's own. A server's files are no user's business: only bundled calibrations go by name."""
        lines = [line.strip() for line in self.columns.splitlines() if line.strip()]
        return [Column.parse(line, beside=None) for line in lines]


class Trial(Form):
    """One press of the button "Run benchmark"."""

    prompts: int = setting(3, Number("Prompts", 1, 6, info="How many of the bundled prompts to average over."))
    guidance_scale: float = setting(5.0, SCALE)
    steps: int = setting(20, Number("Steps", 4, 50, info="Of the full run that all others are measured against."))
    scheduler: str = setting(OWN, SCHEDULER)
    seed: int = setting(0, SEED)
    model: str = setting(BUNDLED, MODEL)
