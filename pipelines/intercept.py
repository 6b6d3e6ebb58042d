"""Stepping in front of one object's method, for one object and for a limited time, without touching its class.

`catch_call` catches `pipe(...)` until it is released: Python looks `__call__` up on the type, so the object is given
a subclass of its own class, same name and all.

`intercept_call` and `intercept_step` catch `module(...)` and `scheduler.step(...)` inside a block, and only in the
thread that entered it: other pipelines that share the object may run in other threads, attached or not. Both put a
`_StandIn` in an attribute of the instance, so that its type stays what compiled code and pipelines compare it with;
`Module.__call__` looks at `_compiled_call_impl` before anything the module carries (forward hooks, accelerate's and
diffusers' hooks, `torch.compile` in place or as a wrapper), all of which is left alone.
"""

import copy
import copyreg
import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

_HANDLER = "_diffusers_guidance_handler"

Call = Callable[..., Any]
Handler = Callable[[Any, Call, tuple, dict], Any]
"""handler(obj, call, args, kwargs): stands for `obj(*args, **kwargs)`; `call` is the original."""


@functools.cache  # one subclass per class
def _catching(cls: Any) -> type:
    @functools.wraps(cls.__call__)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        call = functools.partial(cls.__call__, self)
        handler = handler_of(self)  # None: another thread has just released it
        return call(*args, **kwargs) if handler is None else handler(self, call, args, kwargs)

    def __copy__(self: Any) -> Any:
        twin = object.__new__(type(self))
        vars(twin).update(vars(self))
        return twin

    def __deepcopy__(self: Any, memo: dict) -> Any:
        twin = memo[id(self)] = object.__new__(type(self))
        vars(twin).update(copy.deepcopy(vars(self), memo))
        return twin

    def __reduce_ex__(self: Any, protocol: Any) -> tuple:
        """Pickled it is what it was: its class must be found by name, perhaps where this package is not."""
        state = {name: value for name, value in vars(self).items() if name != _HANDLER}
        return copyreg._reconstructor, (cls, object, None), state  # type: ignore[attr-defined]

    namespace = {"__call__": __call__, "__doc__": cls.__doc__, "__module__": cls.__module__}
    for method in (__copy__, __deepcopy__, __reduce_ex__):
        # Copies stay caught, and copying would go by __reduce_ex__; a class with its own ways knows better.
        if getattr(cls, method.__name__, None) is getattr(object, method.__name__, None):
            namespace[method.__name__] = method
    catching = type(cls.__name__, (cls,), namespace | {"_diffusers_guidance_original": cls})
    catching.__qualname__ = cls.__qualname__
    return catching


def catch_call(obj: Any, handler: Handler) -> None:
    """Routes every `obj(...)` through `handler` until `release_call(obj)`; a second handler replaces the first."""
    vars(obj)[_HANDLER] = handler
    if "_diffusers_guidance_original" not in vars(type(obj)):
        cls: Any = type(obj)
        obj.__class__ = _catching(cls)


def release_call(obj: Any) -> None:
    """Gives `obj` its own class back; nothing happens where nothing was caught."""
    vars(obj).pop(_HANDLER, None)
    if "_diffusers_guidance_original" in vars(type(obj)):
        obj.__class__ = type(obj)._diffusers_guidance_original


def handler_of(obj: Any) -> Handler | None:
    """The handler `obj(...)` goes through, if any."""
    return vars(obj).get(_HANDLER)


class _StandIn:
    """Stands in `obj` for its `method`, which is `original`, in the threads that have a handler here.

    `kept` is what the attribute held before, None where the object had the method by its class alone.
    """

    def __init__(self, obj: Any, method: str, kept: Call | None):
        self.obj, self.method, self.kept = obj, method, kept
        self.original: Call = getattr(obj, method) if kept is None else kept
        functools.update_wrapper(self, self.original, updated=())  # with its signature, at which pipelines look
        self.handlers: dict[int, list[Handler]] = {}
        """By thread, the innermost last."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        handlers = self.handlers.get(threading.get_ident())
        if not handlers:
            return self.original(*args, **kwargs)
        return handlers[-1](self.obj, self.original, args, kwargs)

    def __deepcopy__(self, memo: dict) -> Any:
        """A copied scheduler steps by itself: pipelines copy theirs for a second modality."""
        if id(self.obj) not in memo:  # only the attributes are copied, to be given back to the same scheduler
            return self
        return copy.deepcopy(self.original, memo)

    def __reduce__(self) -> tuple:
        return getattr, (self.obj, self.method)


_lock = threading.Lock()
"""Held while a stand-in comes or goes, which another thread may be about to use."""


@contextmanager
def _intercept(obj: Any, attribute: str, method: str, handler: Handler) -> Iterator[None]:
    """Routes the calling thread's calls of `obj`'s `method` through `handler`, by a stand-in in its `attribute`."""
    thread = threading.get_ident()
    with _lock:
        there = vars(obj).get(attribute)
        if not isinstance(there, _StandIn) or there.obj is not obj:
            # What a copy was left with by its original's stand-in is not its own.
            vars(obj).pop(attribute, None)
            own = there is not None and not isinstance(there, _StandIn) and not is_inherited(obj, method, there)
            there = vars(obj)[attribute] = _StandIn(obj, method, there if own else None)
        there.handlers.setdefault(thread, []).append(handler)
    try:
        yield
    finally:
        with _lock:
            there.handlers[thread].remove(handler)
            if not there.handlers[thread]:
                del there.handlers[thread]
            if not there.handlers and vars(obj).get(attribute) is there:
                del vars(obj)[attribute]
                if there.kept is not None:
                    vars(obj)[attribute] = there.kept


def is_inherited(obj: Any, method: str, bound: Any) -> bool:
    """Whether `bound` is the `method` that `obj` has by its class, and nobody's own."""
    function = getattr(bound, "__func__", None)
    return function is not None and function is getattr(type(obj), method, None) and bound.__self__ is obj


def intercept_call(module: torch.nn.Module, handler: Handler) -> AbstractContextManager[None]:
    """Routes `module(...)` through `handler` inside the block, in this thread; of nested ones the innermost counts."""
    return _intercept(module, "_compiled_call_impl", "_call_impl", handler)


def intercept_step(scheduler: Any, handler: Handler) -> AbstractContextManager[None]:
    """Likewise `scheduler.step(...)`."""
    return _intercept(scheduler, "step", "step", handler)
