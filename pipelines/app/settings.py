"""The app's settings, each with its default, its limits and its words.

The page, the named API endpoints and the MCP tools are all built from the forms below. Pydantic checks every
arriving value here and nowhere else. Names are looked up in fixed lists.
"""

import functools
import random
import reprlib
from collections.abc import Iterable
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, Field, ValidationInfo, create_model

from diffusers_guidance.pipelines.pictures.columns import POLICIES as POLICY_TYPES
from diffusers_guidance.pipelines.pictures.columns import RULES as RULE_TYPES
from diffusers_guidance.pipelines.pictures.make import Case
from diffusers_guidance.pipelines.support.written import Wanted, checked, refused
from diffusers_guidance.policies import EveryStep, Forecast, Hold, Policy
from diffusers_guidance.rules import APG, CFG, Rule

BUNDLED = "bundled"
"""The name of the model that comes with the package."""

EMOJI = APG.preset("emoji")
"""APG with the bundled model's settings."""

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
    return {t.__name__: t for t in sorted(usable, key=lambda t: (t is not first, t.__name__))}


RULES: dict[str, type[Rule]] = _usable(RULE_TYPES, CFG)
POLICIES: dict[str, type[Policy]] = _usable(POLICY_TYPES, EveryStep)

EXAMPLES = ("a dog face, noto style", "a tiger, noto style", "a hamburger, 3d style", "a soccer ball",
            "a red apple, flat style", "a guitar, 3d style")  # fmt: skip
"""Prompts to start from; the page opens with the first."""

COMPARISONS = {
    "What the scale does": (("CFG", "APG"), ("EveryStep",), (1.0, 5.0, 10.0, 15.0)),
    "Rules at high scales": (tuple(RULES), ("EveryStep",), (5.0, 15.0, 25.0)),
    "What policies save": (("CFG", "APG"), ("EveryStep", "AdaptiveGuidance", "Hold"), (5.0,)),
}
"""Rules, policies and scales to start from; the page opens with the first."""

PRESETS = {
    "APG + AG": ("APG", "AdaptiveGuidance"),
    "APG": ("APG", "EveryStep"),
    "Forecast": ("CFG", "Forecast"),
    "Plain CFG": ("CFG", "EveryStep"),
}
"""Pairs of rule and policy to start from; the page opens with the first."""


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

    @property
    def whole(self) -> bool:
        return self.step == int(self.step)

    @property
    def type(self) -> Any:
        wanted = f"{'a whole number' if self.whole else 'a number'} from {_plain(self.low)} to {_plain(self.high)}"
        limits = Field(strict=True, ge=self.low, le=self.high, multiple_of=1 if self.whole else None)
        return Annotated[float, limits, Wanted(wanted), AfterValidator(int if self.whole else float)]


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
            if not value:
                raise ValueError(f"Choose at least one of the {self.label.lower()}.")
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


def setting(default: Any, kind: Any) -> Any:
    """A field of a form."""
    return field(default=default, metadata={"kind": kind})


@dataclass(frozen=True)
class Form:
    """Base of the forms: checks every field when it is made."""

    def __post_init__(self) -> None:
        given = {name: getattr(self, name) for name in self.kinds()}
        read: BaseModel = checked(type(self)._schema(), given, _said)
        for name, value in read:
            object.__setattr__(self, name, value)

    @classmethod
    @functools.cache
    def _schema(cls) -> type[BaseModel]:
        types: dict[str, Any] = {name: (kind.type, ...) for name, kind in cls.kinds().items()}
        return create_model(cls.__name__, **types)

    @classmethod
    def kinds(cls) -> dict[str, Any]:
        """The kind of every field, by name."""
        return {f.name: f.metadata["kind"] for f in fields(cls)}

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        return {f.name: f.default for f in fields(cls)}


# Settings that several forms share

PROMPT = Text("Prompt")
NEGATIVE = Text("Negative prompt", "What the picture should not show.")
SCALE = Number("Guidance scale", 1, 30, 0.5, "How strongly the prompt counts; 1 is no guidance.")
STEPS = Number("Steps", 1, 100)
SCHEDULER = OneOf("Scheduler", tuple(SCHEDULERS))
SEED = Number("Seed", 0, 2**32 - 1)
MODEL = Text("Model", "A folder or a name on the Hugging Face hub, from those this server allows.", 300)


@dataclass(frozen=True)
class Generation(Form):
    """One press of the button "Generate"."""

    prompt: str = setting(EXAMPLES[0], PROMPT)
    negative_prompt: str = setting("", NEGATIVE)
    guidance_scale: float = setting(15.0, SCALE)
    steps: int = setting(20, STEPS)
    scheduler: str = setting(OWN, SCHEDULER)
    seed: int = setting(0, SEED)
    random_seed: bool = setting(False, Flag("New seed every time"))
    batch_size: int = setting(1, Number("Pictures", 1, 8, info="Seeds count up from the first."))
    width: int = setting(0, Side("Width", 0, 2048, 8, "0: the model's own."))
    height: int = setting(0, Side("Height", 0, 2048, 8, "0: the model's own."))
    rule: str = setting("APG", OneOf("Rule", tuple(RULES), "How both predictions of a step become one."))
    policy: str = setting("AdaptiveGuidance", OneOf("Policy", tuple(POLICIES), "Which of them each step evaluates."))
    momentum: float = setting(
        EMOJI.momentum, Number("Momentum", -0.95, 0.95, 0.05, "Negative pushes away from past directions.")
    )
    norm_threshold: float = setting(0.0, Number("Norm threshold", 0, 100, 0.5, "Cap on the update; 0: the preset's."))
    eta: float = setting(EMOJI.eta, Number("Eta", 0, 1, 0.05, "Weight of the part that drives saturation."))
    rescale: float = setting(0.0, Number("Rescale", 0, 1, 0.05, "Pulls the contrast back; 0 is off."))
    threshold: float = setting(0.99, Number("Threshold", 0.5, 1, 0.001, "Similarity from which guidance stops."))
    patience: int = setting(1, Number("Patience", 1, 10, info="Steps in a row that must reach it."))
    start: float = setting(0.1, Number("Start", 0, 1, 0.05, "Guide from this share of the steps."))
    stop: float = setting(0.6, Number("Stop", 0, 1, 0.05, "Guide up to this share of the steps."))
    p: float = setting(0.5, Number("Share", 0.05, 1, 0.05, "Guide in this first share of the steps."))
    save: float = setting(Forecast.save, Number("Save", 0, 0.75, 0.05, "The share of the evaluations to skip."))
    period: int = setting(Hold.period, Number("Period", 1, 10, info="Steps from one full evaluation to the next."))
    warmup: int = setting(Hold.warmup, Number("Warm-up", 1, 20, info="First steps, evaluated in full."))
    last: bool = setting(Hold.last, Flag("The last step in full", "Periods count back from it."))
    compare_with_plain: bool = setting(True, Flag("Compare with plain CFG", "The same seed under the pipeline alone."))
    model: str = setting(BUNDLED, MODEL)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.prompt:
            raise ValueError("The prompt is empty: say what the picture should show.")
        self.make_policy()

    def settled(self) -> "Generation":
        """These settings, with a drawn seed if they ask for one."""
        return replace(self, seed=random.randrange(2**32), random_seed=False) if self.random_seed else self

    @property
    def seeds(self) -> list[int]:
        return [(self.seed + i) % 2**32 for i in range(self.batch_size)]

    @property
    def cases(self) -> list[Case]:
        return [Case(self.prompt, seed, self.negative_prompt or None) for seed in self.seeds]

    def make_rule(self, pipe: Any) -> Rule:
        """The chosen rule with its knobs; APG starts from the preset for this model."""
        if self.rule == "APG":
            base: Rule = EMOJI if self.model == BUNDLED else APG.preset(pipe)
        else:
            base = RULES[self.rule]()
        return replace(base, **self._knobs(base))

    def make_policy(self) -> Policy:
        base = POLICIES[self.policy]()
        return replace(base, **self._knobs(base))

    def _knobs(self, base: Any) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in knobs_of(type(base))}
        return {name: value for name, value in values.items() if (name, value) != ("norm_threshold", 0)}


def _knobs_among(parts: Iterable[type]) -> list[str]:
    """The settings that are fields of some of these classes, under the fields' names."""
    return [name for name in Generation.kinds() if any(name in _field_names(part) for part in parts)]


def _field_names(part: type) -> list[str]:
    return [f.name for f in fields(part)]


def knobs_of(part: type) -> list[str]:
    """The knobs that a rule or policy has; its other fields keep their defaults."""
    return [name for name in KNOBS["rule"] + KNOBS["policy"] if name in _field_names(part)]


KNOBS = {
    part: [name for name in _knobs_among(types.values()) if name != "guidance_scale"]
    for part, types in (("rule", RULES), ("policy", POLICIES))
}
"""The knobs of rules and of policies: settings of `Generation` with the name of a field of theirs."""


_FIRST = next(iter(COMPARISONS.values()))


@dataclass(frozen=True)
class Grid(Form):
    """One press of the button "Compare"."""

    prompt: str = setting(EXAMPLES[0], PROMPT)
    negative_prompt: str = setting("", NEGATIVE)
    rules: tuple[str, ...] = setting(_FIRST[0], SomeOf("Rules", tuple(RULES)))
    policies: tuple[str, ...] = setting(_FIRST[1], SomeOf("Policies", tuple(POLICIES)))
    scales: tuple[float, ...] = setting(
        _FIRST[2], SomeOf("Guidance scales", (1.0, 2.0, 3.0, 5.0, 7.5, 10.0, 12.5, 15.0, 20.0, 25.0))
    )
    steps: int = setting(20, Number("Steps", 1, 50))
    scheduler: str = setting(OWN, SCHEDULER)
    seed: int = setting(0, SEED)
    model: str = setting(BUNDLED, MODEL)

    most = 24
    """Pictures in a grid."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.prompt:
            raise ValueError("The prompt is empty: say what the pictures should show.")
        cells = len(self.rules) * len(self.policies) * len(self.scales)
        if cells > self.most:
            raise ValueError(f"That is a grid of {cells} pictures: at most {self.most}, please.")


@dataclass(frozen=True)
class Trial(Form):
    """One press of the button "Run benchmark"."""

    prompts: int = setting(3, Number("Prompts", 1, 6, info="How many of the bundled prompts to average over."))
    guidance_scale: float = setting(5.0, SCALE)
    steps: int = setting(20, Number("Steps", 4, 50, info="Of the full run that all others are measured against."))
    scheduler: str = setting(OWN, SCHEDULER)
    seed: int = setting(0, SEED)
    model: str = setting(BUNDLED, MODEL)
