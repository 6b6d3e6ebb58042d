"""Columns: a rule, a policy and a guidance scale, as users type and read them."""

import ast
import inspect
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from diffusers_guidance import policies, rules, samples
from diffusers_guidance.calibration import Calibration
from diffusers_guidance.checks import plain
from diffusers_guidance.errors import GuidanceError
from diffusers_guidance.policies import AdaptiveGuidance, EveryStep, LinearAG, Policy, Schedule
from diffusers_guidance.rules import CFG, Rule
from diffusers_guidance.scales import Given, checked
from diffusers_guidance.schedules import closed_form


def known_rules() -> list[type[Rule]]:
    """The package's rules by name, and those of all modules imported since."""
    return [*_public(rules, Rule), *_imported(Rule)]


def known_policies() -> list[type[Policy]]:
    """Likewise the policies."""
    return [*_public(policies, Policy), *_imported(Policy)]


def _public(module: Any, base: type) -> list[type]:
    """A module's classes of one kind, by name."""
    found = [each for name, each in sorted(vars(module).items()) if inspect.isclass(each) and not name.startswith("_")]
    return [each for each in found if issubclass(each, base) and each is not base]


def _imported(base: type) -> list[type]:
    """The classes of one kind that modules outside this package define at their top, by public names."""
    own = __name__.split(".")[0]
    found: dict[type, None] = {}
    left: list[type] = list(base.__subclasses__())
    while left:
        each = left.pop(0)
        left += each.__subclasses__()
        at_top = getattr(sys.modules.get(each.__module__), each.__name__, None) is each
        if at_top and each.__module__.split(".")[0] != own and not each.__name__.startswith("_"):
            found[each] = None  # once, however many of them it contains
    return [*found]


def searched(
    nfe: int | None = None,
    *,
    calibration: Calibration | None = None,
    error: float | None = None,
    skip: bool = True,
) -> Schedule:
    """`search` in columns: the budget first, and the calibration by name."""
    if not isinstance(calibration, Calibration):
        raise ValueError(f"search needs a calibration: a file, or one of {', '.join(bundled_calibrations())}")
    return closed_form(calibration, nfe, error=error, skip=skip)


def calibration_file(name: str, beside: Path | None = Path()) -> Path:
    """A calibration's file: a path relative to `beside` (None: no file), or the name of one of the bundled models'.

    Raises:
        ValueError: it is neither.
    """
    if beside is not None and (file := beside / Path(name).expanduser()).is_file():
        return file
    if name in bundled_calibrations():
        return samples.CALIBRATIONS / f"{name}.safetensors"
    raise ValueError(f"calibration={name!r}: no such file; the bundled ones are {', '.join(bundled_calibrations())}")


def bundled_calibrations() -> list[str]:
    """The names of the bundled models' calibrations."""
    return sorted(file.stem for file in samples.CALIBRATIONS.glob("*.safetensors"))


def _by_name() -> dict[str, Callable[..., Any]]:
    """The names that columns may use; users' names cannot replace the package's own."""
    others = {each.__name__.lower(): each for base in (Rule, Policy) for each in _imported(base)}
    own = {each.__name__.lower(): each for each in [*_public(rules, Rule), *_public(policies, Policy)]}
    return {**others, **own, "ag": AdaptiveGuidance, "search": searched}


@dataclass(frozen=True)
class Column:
    """A rule under a policy at a guidance scale (None: that of the whole comparison).

    Without a rule and a policy, it is the pair that `attach(pipe)` chooses.
    """

    name: str
    rule: Rule | None = None
    policy: Policy | None = None
    guidance_scale: Given | None = None

    @classmethod
    def parse(cls, text: str, beside: Path | None = Path()) -> "Column":
        """Reads a rule, a policy or both, and a scale: "APG@15", "Hold", "APG(norm_threshold=5)+AG(threshold=0.98)@12".

        A scale that changes is in quotes, or a list: 'CFG@"linear(9, 3)"', 'APG@"3x3+7x17"+Forecast', "CFG@[9, 7, 5]".

        A missing rule is CFG, a missing policy EveryStep; "default" is what `attach(pipe)` chooses. Arguments
        are Python literals; nothing is evaluated. A calibration is a file, relative to `beside` (None: no file), or the
        name of a bundled one: 'LinearAG(calibration="dpm-20-5")', 'search(25, calibration="mine.safetensors")'.
        """
        try:
            terms = [_split_scale(text, term) for term in _terms(ast.parse(text.strip(), mode="eval").body)]
        except SyntaxError:
            raise _unread(text, "it cannot be read") from None
        scales: list[Given] = [scale for _, scale in terms if scale is not None]
        if [ast.unparse(node).lower() for node, _ in terms] == ["default"]:
            return cls(text, guidance_scale=scales[0] if scales else None)
        built = [_build(text, node, beside) for node, _ in terms]
        rules = [part for part in built if isinstance(part, Rule)]
        policies = [part for part in built if isinstance(part, Policy)]
        scales += [rule.guidance_scale for rule in rules if rule.guidance_scale is not None]
        if max(len(rules), len(policies), len(scales)) > 1:
            raise _unread(text, "a column has one rule, one policy and one guidance scale at most")
        rule, policy = (rules or [CFG()])[0], (policies or [EveryStep()])[0]
        return cls(text, rule, policy, scales[0] if scales else None)


def _terms(node: ast.expr) -> list[ast.expr]:
    """The terms of a column's sum."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return [*_terms(node.left), *_terms(node.right)]
    return [node]


def _split_scale(text: str, node: ast.expr) -> tuple[ast.expr, Given | None]:
    """The part before the @, and the scale after it."""
    if not (isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult)):
        return node, None
    try:
        return node.left, checked(plain(ast.literal_eval(node.right)))
    except (ValueError, TypeError) as error:
        why = str(error) if "guidance_scale=" in str(error) else "a number from 0 up, a list, or a quoted schedule"
        raise _unread(text, f"the guidance scale {ast.unparse(node.right)}: {why}") from None


def _build(text: str, node: ast.expr, beside: Path | None) -> Any:
    """The rule or policy that `Name`, `Name(arguments)` or `Name.method(arguments)` means."""
    given = node if isinstance(node, ast.Call) else None
    target = given.func if given else node
    method = target.attr if isinstance(target, ast.Attribute) else None
    target = target.value if isinstance(target, ast.Attribute) else target
    if not isinstance(target, ast.Name):
        raise _unread(text, f"{ast.unparse(node)} is neither a rule nor a policy")
    found = _by_name().get(target.id.lower())
    if found is None:
        raise _unread(text, f"there is no {target.id}")
    make = found
    if method is not None:
        if method.startswith("_") or not isinstance(inspect.getattr_static(found, method, None), classmethod):
            raise _unread(text, f"{found.__name__} has no {method}")
        make = getattr(found, method)
    try:
        args = [ast.literal_eval(arg) for arg in given.args] if given else []
        named = {str(k.arg): ast.literal_eval(k.value) for k in given.keywords} if given else {}
    except (ValueError, TypeError):
        wanted = "numbers, strings, tuples, lists, None, True or False"
        raise ValueError(f"column {text!r}: the arguments of {found.__name__} must be {wanted}") from None
    signature = inspect.signature(make)
    try:
        bound = signature.bind(*args, **named)
        if isinstance(name := bound.arguments.get("calibration"), str):
            bound.arguments["calibration"] = Calibration.load(calibration_file(name, beside))
        return make(*bound.args, **bound.kwargs)
    except (ValueError, GuidanceError) as error:
        raise ValueError(f"column {text!r}: {error}") from None
    except TypeError:
        called = ast.unparse(given.func if given else node)
        raise ValueError(f"column {text!r}: {ast.unparse(node)} does not fit {called}{signature}") from None


def _unread(text: str, why: str) -> ValueError:
    rules, policies = (", ".join(c.__name__ for c in kind) for kind in (known_rules(), known_policies()))
    return ValueError(
        f"column {text!r}: {why}. Write RULE, POLICY or RULE+POLICY, then @SCALE if you like: "
        '"APG@15", "Hold", "APG(norm_threshold=5)+AG(threshold=0.98)@12", "search(25, calibration=FILE)", "default". '
        f"Rules: {rules}. Policies: {policies} (AG is AdaptiveGuidance)."
    )


def arguments(part: Rule | Policy, but: Sequence[str] = ()) -> str:
    """The arguments of a rule or policy that differ from its defaults, without its guidance scale."""
    return ", ".join(
        f"{field.name}={getattr(part, field.name)!r}"
        for field in fields(part)
        if field.name not in ("guidance_scale", *but) and getattr(part, field.name) != field.default
    )


def changes(part: Rule | Policy) -> str:
    """The same arguments, without a calibration and cut if very long."""
    return textwrap.shorten(arguments(part, but=("calibration",)), 60, placeholder=" …")


def short(part: Rule | Policy) -> str:
    """A rule or policy much as users write it, without its guidance scale and calibration."""
    if isinstance(part, Schedule):
        return f"Schedule of {part.nfe} NFEs"
    given = changes(part)
    title = type(part).__name__ + (f"({given})" if given else "")
    # The paper fits its estimates to a calibration; without one, LinearAG holds the last difference.
    return f"{title}, held" if isinstance(part, LinearAG) and part.calibration is None else title
