"""A rule's algebra, written once: torch runs it on tensors, Triton compiles the same source.

    @algebra
    def half(gram, b, w, _1, _2, _3):
        return Coefficients(0.0 * w, 1.0 + 0.0 * w, (w - 1) / 2, 0.0 * w)

It is scalar algebra on a group's Gram entries, on b and on four settings of the rule, with operators and the functions
of `ops`. Divisions need no guard: a group with a non-finite coefficient stays unguided. Each coefficient must depend on
something (`0.0 * w` for zero), or Triton has no type for it. The coefficient of u is optional.

`@algebra(centred=True)` says that the algebra uses only variances of c and d. Its Gram then has the products and sums
of c and d after a number near them is subtracted, so that a large mean does not cancel.
"""

from collections.abc import Callable
from functools import cached_property, lru_cache, partial
from types import FunctionType
from typing import Any, overload

from diffusers_guidance.kernels import ops
from diffusers_guidance.kernels.reference import Coefficients, Gram

ALGEBRAS: dict[str, "Algebra"] = {}
"""All algebras, by the name that a kernel gets."""


class Algebra:
    """A function of (gram, b, and four settings) that gives a rule's `Coefficients`."""

    def __init__(self, function: Callable[..., Coefficients], centred: bool = False):
        self.function: Any = function
        self.centred = centred
        self.name = f"{function.__module__}.{function.__qualname__}"
        self.__doc__ = function.__doc__
        ALGEBRAS[self.name] = self

    def __call__(self, gram: Gram, b: Any, *settings: Any) -> Coefficients:
        """The coefficients in torch; missing settings are 0."""
        return self.function(gram, b, *settings, *[0.0] * (4 - len(settings)))

    @cached_property
    def compiled(self) -> Any:
        """The same source as a Triton function, for which `ops` is `triton.language`."""
        import triton
        import triton.language as tl

        own = self.function
        names = {name: tl if value is ops else value for name, value in own.__globals__.items()}
        twin = FunctionType(own.__code__, names | {"tl": tl}, own.__name__, own.__defaults__, own.__closure__)
        twin.__module__, twin.__qualname__ = own.__module__, own.__qualname__
        return triton.jit(twin)


@overload
def algebra(function: Callable[..., Coefficients]) -> Algebra: ...
@overload
def algebra(*, centred: bool) -> Callable[[Callable[..., Coefficients]], Algebra]: ...
def algebra(function: Callable[..., Coefficients] | None = None, *, centred: bool = False) -> Any:
    """Declares a rule's algebra; see the head of this file."""
    return partial(Algebra, centred=centred) if function is None else Algebra(function)


def algebra_of(rule: type) -> Algebra | None:
    """The `algebra` that gives a rule's coefficients, by the rule's class; None if a method overrides it."""
    found: Any = rule
    return _in_charge(rule, found.algebra, found.coefficients)


@lru_cache(maxsize=256)
def _in_charge(rule: type, *_: Any) -> Algebra | None:
    """What else it takes is what a class may be given later: then the class is looked at again."""
    names = ("algebra", "coefficients")
    declared, method = (next((c for c in rule.__mro__ if vars(c).get(name) is not None), None) for name in names)
    in_charge = declared is not None and method is not None and issubclass(declared, method)
    return vars(declared)["algebra"] if in_charge else None
