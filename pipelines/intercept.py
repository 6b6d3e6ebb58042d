"""Stepping in front of one object's method, for one object and for a limited time, without touching its class.

`intercept_call` catches `obj(...)`: Python looks `__call__` up on the type, so the object is given a subclass
of its own class, same name and all. It stands in front of everything the object carries (forward hooks,
accelerate's and diffusers' hooks, `torch.compile` in place or as a wrapper) and leaves all of it alone.
`intercept_step` catches `scheduler.step(...)` by an attribute of the instance: pipelines compare their
scheduler's type, and look at the method's signature.
"""

import functools
import inspect
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_HANDLER = "_diffusers_guidance_handler"

Call = Callable[..., Any]
Handler = Callable[[Any, Call, tuple, dict], Any]
"""handler(obj, call, args, kwargs): stands for `obj(*args, **kwargs)`; `call` is the original."""


@functools.cache  # one subclass per class, so that compiled code sees one type, not a new one a run
def _catching(cls: Any) -> type:
    @functools.wraps(cls.__call__)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            _set_class(self, cls)  # compiled code guards on the type it was compiled for
            try:
                return cls.__call__(self, *args, **kwargs)
            finally:
                if _HANDLER in vars(self):
                    _set_class(self, catching)

        return vars(self)[_HANDLER](self, call, args, kwargs)

    namespace = {"__call__": __call__, "__doc__": cls.__doc__, "__module__": cls.__module__}
    catching = type(cls.__name__, (cls,), namespace | {"_diffusers_guidance_original": cls})
    catching.__qualname__ = cls.__qualname__
    return catching


def _set_class(obj: Any, cls: type) -> None:
    object.__setattr__(obj, "__class__", cls)  # torch.compile's wrapper would pass a plain assignment on


def catch_call(obj: Any, handler: Handler) -> None:
    """Routes every `obj(...)` through `handler` until `release_call(obj)`; a second handler replaces the first."""
    vars(obj)[_HANDLER] = handler
    if "_diffusers_guidance_original" not in vars(type(obj)):
        cls: Any = type(obj)
        _set_class(obj, _catching(cls))


def release_call(obj: Any) -> None:
    """Gives `obj` its own class back; nothing happens where nothing was caught."""
    vars(obj).pop(_HANDLER, None)
    if "_diffusers_guidance_original" in vars(type(obj)):
        _set_class(obj, type(obj)._diffusers_guidance_original)


def handler_of(obj: Any) -> Handler | None:
    """The handler `obj(...)` goes through, if any."""
    return vars(obj).get(_HANDLER)


@contextmanager
def intercept_call(obj: Any, handler: Handler) -> Iterator[None]:
    """Routes `obj(...)` through `handler` inside the block; blocks may nest."""
    previous = handler_of(obj)
    catch_call(obj, handler)
    try:
        yield
    finally:
        if previous is None:
            release_call(obj)
        else:
            catch_call(obj, previous)


class _Step:
    """Stands in a scheduler's attribute `step`."""

    def __init__(self, scheduler: Any, step: Call, handler: Handler):
        functools.update_wrapper(self, step)  # takes over attributes too: those of an outer _Step come first
        self.scheduler, self.step, self.handler = scheduler, step, handler
        self.__signature__ = inspect.signature(step)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.handler(self.scheduler, self.step, args, kwargs)

    def __deepcopy__(self, memo: dict) -> Any:
        """A copied scheduler steps by itself: pipelines copy theirs for a second modality."""
        copied = memo.get(id(self.scheduler))
        if copied is None:  # only the attributes are copied, to be given back to the same scheduler
            return self
        return types.MethodType(type(copied).step, copied)


@contextmanager
def intercept_step(scheduler: Any, handler: Handler) -> Iterator[None]:
    """Routes `scheduler.step(...)` through `handler` inside the block; blocks may nest."""
    had = "step" in vars(scheduler)
    original = scheduler.step
    vars(scheduler)["step"] = _Step(scheduler, original, handler)
    try:
        yield
    finally:
        if had:
            vars(scheduler)["step"] = original
        else:
            vars(scheduler).pop("step", None)
