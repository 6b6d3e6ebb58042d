"""The settings of the app, each with a default, limits, a label and a sentence about it.

The page, the API endpoints and the MCP tools are built from the forms below. Pydantic checks every value that arrives,
here and nowhere else. Names are looked up in fixed lists.
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
"""The model that the page starts with: the first bundled one (`samples.models`)."""

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
    """The types that need no arguments, by name."""
    usable = [t for t in types if all(f.default is not MISSING or f.default_factory is not MISSING for f in fields(t))]
    found: dict[str, type] = {first.__name__: first}
    for each in usable:
        found.setdefault(each.__name__, each)  # a name of the package stays with the package's class
    return found


def rules() -> dict[str, type[Rule]]:
    """The rules to choose from, by name: CFG, the package's others, and imported ones."""
    return _usable(known_rules(), CFG)


def policies() -> dict[str, Any]:
    """The policies to choose from, by name: Forecast, the others, and the ways (`WAYS`) that become a policy."""
    usable = _usable(known_policies(), Forecast)
    return usable | {each.__name__: each for each in WAYS if each.__name__ not in usable}


EXAMPLES = suited(BUNDLED).examples
"""Prompts to start from. The page opens with the first."""

SCALES = (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.5, 9.0, 10.0, 12.0, 15.0, 18.0, 20.0, 25.0)
"""The guidance scales that a comparison offers."""

COMPARISONS = {
    "Ways to save": (("CFG",), ("EveryStep", "Forecast", "AdaptiveGuidance", "Hold", "FewerSteps"), ("scale",)),
    "What removes the burn": (("CFG", "APG"), ("EveryStep", "AdaptiveGuidance"), ("scale", "high")),
    "Rules at a high scale": (
        ("CFG", "APG", "CFGZeroStar", "MagnitudeAware", "TCFG"), ("EveryStep",), ("scale", "high"),
    ),
}  # fmt: skip
"""Comparisons to start from: rules, policies, and which of the scales that suit the model (`Suited`). The page opens
with the first."""


def comparison(name: str, model: str = BUNDLED) -> tuple[tuple[str, ...], tuple[str, ...], tuple[float, ...]]:
    """The rules, policies and scales of one of `COMPARISONS` on a model."""
    rules, policies, scales = COMPARISONS[name]
    return rules, policies, tuple(getattr(suited(model), scale) for scale in scales)


# Kinds of values; each says in words what values it takes


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
    """Whether the value may be empty, which is None."""

    @property
    def whole(self) -> bool:
        return self.step == int(self.step)

    @property
    def words(self) -> str:
        """The values that it takes, in words."""
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
    """A side of a picture, in pixels; 0 is the model's own. The limits also depend on the model (`work.sides_of`)."""

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
    """A number as text: every digit of a whole number, at most six digits of any other."""
    return str(int(number)) if number == int(number) else f"{number:g}"


F = TypeVar("F", bound="Form")


class Setting(NamedTuple):
    """A setting of a form: its default, and the kind of its values."""

    default: Any
    kind: Any


def setting(default: Any, kind: Any | Callable[[], Any]) -> Any:
    """Declares a setting as an attribute of a form's class. A kind that depends on imports is given as a function."""
    return Setting(default, kind)


class Form:
    """Base of the forms. A form checks all settings when it is made."""

    def __init__(self, **given: Any):
        kinds = self.kinds()
        if unknown := given.keys() - kinds:
            raise TypeError(f"{min(unknown)} is not a setting: there are {', '.join(kinds)}")
        read: BaseModel = checked(_schema(type(self).__name__, tuple(kinds.items())), self.defaults() | given, _said)
        self.__dict__.update(read)
        self.check()

    def check(self) -> None:
        """Raises a `ValueError` if the settings do not go together."""

    @classmethod
    def settings(cls) -> dict[str, Setting]:
        """All settings, by name."""
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
        """The value of every setting, by name."""
        return dict(vars(self))

    def but(self: F, **changes: Any) -> F:
        """A copy of this form with some settings changed."""
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
        "momentum": Number("Momentum", -0.95, 0.95, 0.05, "A negative value pushes away from past directions."),
        "norm_threshold": Number("Norm threshold", 0, 100, 0.5, "Cap on the update. Empty: not capped.", optional=True),
        "eta": Number("Eta", 0, 1, 0.05, "Weight of the part of the update that raises saturation."),
        "reference_numel": None,
        "cfg_steps": None,
        "form": None,
    },
    "BetaCFG": {
        "gamma": Number("Gamma", 0, 2, 0.05, "Guidance is divided by its norm to this power."),
        "a": Number("Alpha of the curve", 1, 10, 0.1),
        "b": Number("Beta of the curve", 1, 10, 0.1),
    },
    "TAG": {"eta": Number("Eta", 1, 3, 0.05, "Factor of the part across the sample; 1 is CFG.")},
    "ADG": {"most": Number("Largest angle", 0.05, 3, 0.05, "In radians.")},
    "MomentumGuidance": {
        "alpha": Number("Alpha", 0, 5, 0.05, "How far to move on from the average; 0 is CFG."),
        "beta": Number("Beta", 0, 0.95, 0.05, "The share of the average that each step keeps."),
    },
    "CFG": {"rescale": Number("Rescale", 0, 1, 0.05, "Pulls the contrast toward that without guidance; 0 is off.")},
    "CFGZeroStar": {"zero_init": Number("Zero steps", 0, 20, info="First steps that do not move the sample.")},
    "MagnitudeAware": {"alpha": Number("Alpha", 0, 50, 0.5, "How strongly large moves are damped; 0 is CFG.")},
    "AdaptiveGuidance": {
        "threshold": Number("Threshold", 0.5, 1, 0.001, "Guidance stops at this similarity of both predictions."),
        "patience": Number("Patience", 1, 10, info="The number of steps in a row that must reach the threshold."),
        "space": OneOf("Space", ("denoised", "noise"), "The space in which both predictions are compared."),
    },
    "Interval": {
        "start": Number("Start", 0, 1, 0.05, "Guidance starts after this share of the steps."),
        "stop": Number("Stop", 0, 1, 0.05, "Guidance stops after this share of the steps."),
        "by": None,
    },
    "StepAG": {"p": Number("Share", 0.05, 1, 0.05, "Guidance stops after this share of the steps.")},
    "Forecast": {
        "save": Number("Save", 0, 0.75, 0.05, "The share of the network evaluations to skip."),
        "nfe": None,
        "learn": Flag("Learn", "The next picture is made in full and recorded. Later pictures use the record."),
    },
    "Search": {"budget": Number("Budget", 4, 200, 1, "Network evaluations of one picture.")},
    "Schedule": {"actions": Text("Actions", "A letter for each step: B, C, E or N.", 100)},
    "FewerSteps": {"share": Number("Share of the steps", 0.1, 1, 0.05, "The share that is made.")},
    "Hold": {
        "period": Number("Period", 1, 10, info="The number of steps from one full evaluation to the next."),
        "warmup": Number("Warm-up", 1, 20, info="The number of first steps, which are evaluated in full."),
        "last": Flag("The last step in full", "Then the periods count back from the last step."),
    },
}
"""How the page shows the fields of the package's own rules and policies; None: it hides them. Other fields follow from
their types."""


def knobs() -> dict[str, Knob]:
    """The knobs of all rules and policies, by name, each with its owner's default.

    The name of a knob is that of its field. If that name is taken, the owner's name precedes it.
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
    """The names of a rule's or policy's knobs. Its other fields keep their defaults."""
    return [name for name, knob in knobs().items() if knob.owner is owner]


def _fields(owner: type) -> dict[str, Setting]:
    """The settings of a rule's or policy's knobs, by field."""
    shown = KINDS.get(owner.__name__, {}) if owner.__module__.split(".")[0] == __name__.split(".")[0] else {}
    try:
        hints: Mapping[str, Any] = get_type_hints(owner)
    except NameError:  # the hints have names that only type checkers know
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
    """The kind of a field, from its type; None if the page cannot set it."""
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
    """The first sentence about a field under "Args" in its owner's docstring."""
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
SCALE = Number("Guidance scale", 1, 30, 0.5, "How strongly the prompt counts; 1 is without guidance.")
SCHEDULE = Text("Scale over the steps", 'Replaces the scale: "linear(9, 3)" or "3x5+7". Empty: one scale.', 200)
STEPS = Number("Steps", 1, 100)
SCHEDULER = OneOf("Scheduler", tuple(SCHEDULERS))
SEED = Number("Seed", 0, 2**32 - 1)
MODEL = Text("Model", "A bundled model, or a folder or a name on the Hugging Face hub that this server allows.", 300)


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
    batch_size: int = setting(1, Number("Pictures", 1, 8, info="Their seeds count up from this seed."))
    width: int = setting(0, Side("Width", 0, 2048, 8, "0: the model's own."))
    height: int = setting(0, Side("Height", 0, 2048, 8, "0: the model's own."))
    rule: str = setting("CFG", lambda: OneOf("Rule", tuple(rules()), "How the two predictions of a step become one."))
    policy: str = setting("Forecast", lambda: OneOf("Policy", tuple(policies()), "Which of the two a step evaluates."))
    compare_with_plain: bool = setting(
        True, Flag("Compare with plain CFG", "Also makes the seed with plain CFG, for the slider, seconds and dB.")
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
        """These settings; with `random_seed`, a copy with a drawn seed."""
        return self.but(seed=random.randrange(2**32), random_seed=False) if self.random_seed else self

    @property
    def scale(self) -> Given:
        """The schedule of the guidance scale if there is one, else the guidance scale."""
        return self.schedule or self.guidance_scale

    @property
    def seeds(self) -> list[int]:
        return [(self.seed + i) % 2**32 for i in range(self.batch_size)]

    @property
    def cases(self) -> list[Case]:
        return [Case(self.prompt, seed, self.negative_prompt or None) for seed in self.seeds]

    def make_rule(self, pipe: Any) -> Rule:
        """The chosen rule with its knobs. APG's other fields are what suits the model, or those of `APG.preset`."""
        if self.rule != APG.__name__:
            return self._with_knobs(rules()[self.rule]())
        return self._with_knobs(suited(self.model).apg if self.model in samples.models() else APG.preset(pipe))

    def make_policy(self) -> Policy | Way:
        return self._with_knobs(policies()[self.policy]())

    @property
    def steps_made(self) -> int:
        """The number of steps that the run makes. A way may make fewer than `steps`."""
        made = self.make_policy()
        return made.steps(self.steps) if isinstance(made, Way) else self.steps

    @classmethod
    def read(cls, written: Mapping[str, str]) -> "Generation":
        """Reads the settings in an address. Their values are texts, also those of numbers and flags.

        Raises:
            ValueError: a name is not a setting, or its value is not allowed.
        """
        kinds = cls.kinds()
        if unknown := sorted(written.keys() - kinds):
            raise ValueError(f"The address has {unknown[0]!r}, which is not a setting: there are {', '.join(kinds)}.")
        return cls(**{name: _read(kinds[name], text) for name, text in written.items()})

    @property
    def address(self) -> str:
        """A query with these settings, for `read`. It skips those that equal the page's defaults."""
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
    """Reads a value of that kind from an address. A text that is not such a value stays a text; the form refuses it."""
    if isinstance(kind, Number):
        try:
            return float(text) if text else None
        except ValueError:
            return text
    return {"True": True, "False": False}.get(text, text) if isinstance(kind, Flag) else text


class Preset(NamedTuple):
    """A rule, a policy and a guidance scale to start from. Rule and scale depend on what suits the model."""

    rule: Callable[[Suited], Rule]
    policy: Policy
    guidance_scale: Callable[[Suited], float]

    def settings(self, model: str = BUNDLED) -> dict[str, Any]:
        """What the preset sets: the names of rule and policy, their knobs, and the scale. On a user's model APG has its
        defaults."""
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
"""Presets to start from. The page opens with the first."""

SHOWN = ("Half the time", "High scale without burn")
"""The presets whose pictures are at the top of the page, beside plain CFG."""


def as_preset(part: Rule | Policy) -> dict[str, Any]:
    """The knobs of this rule or policy, with its values. It skips `learn`, which the user switches."""
    own = {name: knob for name, knob in knobs().items() if knob.owner is type(part) and knob.field != "learn"}
    return {name: getattr(part, knob.field) for name, knob in own.items()}


_FIRST = comparison(next(iter(COMPARISONS)))


class Grid(Form):
    """One press of the button "Compare"."""

    prompt: str = setting(EXAMPLES[0], PROMPT)
    negative_prompt: str = setting("", NEGATIVE)
    rules: tuple[str, ...] = setting(_FIRST[0], lambda: SomeOf("Rules", tuple(rules())))
    policies: tuple[str, ...] = setting(
        _FIRST[1], lambda: SomeOf("Policies", tuple(sorted(policies(), key=EveryStep.__name__.__ne__)))
    )
    scales: tuple[float, ...] = setting(_FIRST[2], SomeOf("Guidance scales", SCALES))
    columns: str = setting(
        "", Text("More, with knobs of your own", "One a line, such as APG(eta=0.3)+AG@12 or Forecast(0.4).", 1000)
    )
    steps: int = setting(20, Number("Steps", 1, 50))
    scheduler: str = setting(OWN, SCHEDULER)
    seed: int = setting(0, SEED)
    model: str = setting(BUNDLED, MODEL)

    most = 24
    """The most pictures in a grid."""

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
        """The number of pictures in the grid."""
        return len(self.rules) * len(self.policies) * len(self.scales) + len(self.written)

    @property
    def written(self) -> list[Column]:
        """The columns that the user wrote. They can name bundled calibrations, but not files of the server."""
        lines = [line.strip() for line in self.columns.splitlines() if line.strip()]
        return [Column.parse(line, beside=None) for line in lines]


class Trial(Form):
    """One press of the button "Run benchmark"."""

    prompts: int = setting(3, Number("Prompts", 1, 6, info="The number of bundled prompts to average over."))
    guidance_scale: float = setting(5.0, SCALE)
    steps: int = setting(20, Number("Steps", 4, 50, info="Steps of the full run. All others are compared with it."))
    scheduler: str = setting(OWN, SCHEDULER)
    seed: int = setting(0, SEED)
    model: str = setting(BUNDLED, MODEL)
