"""Columns: a rule, a policy and a guidance scale as one types them, and as one reads them."""

import ast
import inspect
import math
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import diffusers_guidance as package
from diffusers_guidance.policies import AdaptiveGuidance, EveryStep, Policy
from diffusers_guidance.rules import CFG, Rule

COLUMNS = ("CFG", "CFG@15", 'APG.preset("normalised")@15', "AG", "LinearAG", "default")
"""What `compare` shows unless asked for something else."""

_PUBLIC = [getattr(package, name) for name in package.__all__]
RULES: list[type] = [c for c in _PUBLIC if inspect.isclass(c) and issubclass(c, Rule) and c is not Rule]
POLICIES: list[type] = [c for c in _PUBLIC if inspect.isclass(c) and issubclass(c, Policy) and c is not Policy]
_BY_NAME = {c.__name__.lower(): c for c in [*RULES, *POLICIES]} | {"ag": AdaptiveGuidance}


@dataclass(frozen=True)
class Column:
    """A rule under a policy at a guidance scale (None: that of the whole comparison).

    Without rule and policy it is the pair that `attach(pipe)` chooses.
    """

    name: str
    rule: Rule | None = None
    policy: Policy | None = None
    guidance_scale: float | None = None

    @classmethod
    def parse(cls, text: str) -> "Column":
        """Reads a rule, a policy or both, and a scale: "APG@15", "Hold", "APG(norm_threshold=5)+AG(threshold=0.98)@12".

        A missing rule is CFG, a missing policy EveryStep; "default" is what `attach(pipe)` chooses. Arguments
        are Python literals; nothing is evaluated.
        """
        try:
            terms = [_split_scale(text, term) for term in _terms(ast.parse(text.strip(), mode="eval").body)]
        except SyntaxError:
            raise _unread(text, "it cannot be read") from None
        scales = [scale for _, scale in terms if scale is not None]
        if [ast.unparse(node).lower() for node, _ in terms] == ["default"]:
            return cls(text, guidance_scale=scales[0] if scales else None)
        built = [_build(text, node) for node, _ in terms]
        rules = [part for part in built if isinstance(part, Rule)]
        policies = [part for part in built if isinstance(part, Policy)]
        scales += [rule.guidance_scale for rule in rules if rule.guidance_scale is not None]
        if max(len(rules), len(policies), len(scales)) > 1:
            raise _unread(text, "a column has one rule, one policy and one guidance scale at most")
        rule, policy = (rules or [CFG()])[0], (policies or [EveryStep()])[0]
        return cls(text, rule, policy, scales[0] if scales else None)


def _terms(node: ast.expr) -> list[ast.expr]:
    """The terms of a sum."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return [*_terms(node.left), *_terms(node.right)]
    return [node]


def _split_scale(text: str, node: ast.expr) -> tuple[ast.expr, float | None]:
    """What stands before the @, and the number after it."""
    if not (isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult)):
        return node, None
    try:
        scale = float(ast.literal_eval(node.right))
    except (ValueError, TypeError):
        scale = math.nan
    if not 0 <= scale < math.inf:
        raise _unread(text, f"the guidance scale {ast.unparse(node.right)} must be a number from 0 up")
    return node.left, scale


def _build(text: str, node: ast.expr) -> Any:
    """The rule or policy that `Name`, `Name(arguments)` or `Name.method(arguments)` stands for."""
    given = node if isinstance(node, ast.Call) else None
    target = given.func if given else node
    method = target.attr if isinstance(target, ast.Attribute) else None
    target = target.value if isinstance(target, ast.Attribute) else target
    if not isinstance(target, ast.Name):
        raise _unread(text, f"{ast.unparse(node)} is neither a rule nor a policy")
    found = _BY_NAME.get(target.id.lower())
    if found is None:
        raise _unread(text, f"there is no {target.id}")
    make: Callable[..., Any] = found
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
    try:
        return make(*args, **named)
    except ValueError as error:
        raise ValueError(f"column {text!r}: {error}") from None
    except TypeError:
        raise ValueError(
            f"column {text!r}: {ast.unparse(node)} does not fit {make.__name__}{inspect.signature(make)}"
        ) from None


def _unread(text: str, why: str) -> ValueError:
    rules, policies = (", ".join(c.__name__ for c in kind) for kind in (RULES, POLICIES))
    return ValueError(
        f"column {text!r}: {why}. Write RULE, POLICY or RULE+POLICY, then @SCALE if you like: "
        '"APG@15", "Hold", "APG(norm_threshold=5)+AG(threshold=0.98)@12", "default". '
        f"Rules: {rules}. Policies: {policies} (AG is AdaptiveGuidance)."
    )


def arguments(part: Rule | Policy) -> str:
    """The arguments of a rule or policy that are not its defaults, without its guidance scale."""
    return ", ".join(
        f"{field.name}={getattr(part, field.name)!r}"
        for field in fields(part)
        if field.name != "guidance_scale" and getattr(part, field.name) != field.default
    )


def changes(part: Rule | Policy) -> str:
    """The same, cut if very long."""
    return textwrap.shorten(arguments(part), 60, placeholder=" …")


def short(part: Rule | Policy) -> str:
    """A rule or policy as one would write it, without its guidance scale."""
    given = changes(part)
    return type(part).__name__ + (f"({given})" if given else "")
