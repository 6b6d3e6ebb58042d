"""Stepping in front of one object's method, for one object and for a limited time, without touching its class.

`catch_call` catches `pipe(...)` until it is released: Python looks `__call__` up on the type, so the object is given
a subclass of its own class, same name and all.

`intercept_call` and `intercept_method` catch `module(...)` and `scheduler.step(...)` inside a block, and only in the
thread that entered it: other pipelines that share the object may run in other threads, attached or not. Both put a
`_StandIn` in an attribute of the instance, so that its type stays what compiled code and pipelines compare it with;
`Module.__call__` looks at `_compiled_call_impl` before anything the module carries (forward hooks, accelerate's and
diffusers' hooks, `torch.compile` in place or as a wrapper), all of which is left alone.
"""

import copy
import copyreg
import functools
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch

_HANDLER = "_diffusers_guidance_handler"

Call = Callable[..., Any]
Handler = Callable[[Any, Call, tuple, dict], Any]
"""handler(obj, call, args, kwargs): stands for `obj(*args, **kwargs)`; `call` is the original."""


class _Transparent(type):
    """Has a catching class be its original for whoever changes it: what is put on the class of an attached pipeline is
    put on its own, for all pipelines of that class and for good. So what is read there must be safe to put back."""

    def mro(cls) -> list[type]:
        """Its methods come before its original, and it comes after: `super(self.__class__, self)` is what it was."""
        itself, *others = super().mro()
        front = vars(cls).get(_FRONT)
        return [itself, *others] if front is None else [front, others[0], itself, *others[1:]]

    def __getattribute__(cls, name: str) -> Any:
        original = type.__getattribute__(cls, "__dict__").get(_ORIGINAL)
        if name == "__call__" and original is not None:  # Python itself looks the method up elsewhere
            return _through(original.__call__)
        return super().__getattribute__(name)

    def __setattr__(cls, name: str, value: Any) -> None:
        original = vars(cls).get(_ORIGINAL)
        super().__setattr__(name, value) if original is None else setattr(original, name, value)

    def __delattr__(cls, name: str) -> None:
        original = vars(cls).get(_ORIGINAL)
        super().__delattr__(name) if original is None else delattr(original, name)


_ORIGINAL, _FRONT = "_diffusers_guidance_original", "_diffusers_guidance_front"
_inside = threading.local()


def _through(call: Any) -> Any:
    """A class's `call` as whoever asks the class of a caught object for it gets it: it goes through the handler too."""

    @functools.wraps(call)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _calls()[-1:] == [id(self)]:  # the handler is about to make it
            return call(self, *args, **kwargs)
        return _handled(self, call, args, kwargs)

    return __call__


def _handled(obj: Any, call: Any, args: tuple, kwargs: dict) -> Any:
    """`call(obj, ...)` by the handler of `obj`."""
    handler = handler_of(obj)
    if handler is None:  # another thread has just released it
        return call(obj, *args, **kwargs)

    def own(*args: Any, **kwargs: Any) -> Any:
        _calls().append(id(obj))
        try:
            return call(obj, *args, **kwargs)
        finally:
            _calls().pop()

    return handler(obj, own, args, kwargs)


def _calls() -> list[int]:
    """The objects whose own call is being made in this thread, by their ids, the innermost last."""
    return vars(_inside).setdefault("calls", [])


@functools.cache  # one per metaclass
def _transparent(meta: type) -> type:
    if issubclass(meta, _Transparent):
        return meta
    return _Transparent if meta is type else type(meta.__name__, (_Transparent, meta), {})


@functools.cache  # one subclass per class
def _catching(cls: type) -> Any:
    @functools.wraps(cls.__call__)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        if type(self) is not catching:  # of a class that somebody has made of this one
            return cls.__call__(self, *args, **kwargs)
        return _handled(self, cls.__call__, args, kwargs)

    def __setattr__(self: Any, name: str, value: Any) -> None:
        if name == "__class__" and handler_of(self) is not None and not _is_catching(value):
            value = _catching(value)  # of another class it is attached all the same
        super(front, self).__setattr__(name, value)  # type: ignore[arg-type]

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
        if handler_of(self) is not None:
            warnings.warn(
                f"this {cls.__name__} is pickled without what is attached to it: attach again where it is loaded",
                stacklevel=2,
            )
        state = {name: value for name, value in vars(self).items() if name != _HANDLER}
        return copyreg._reconstructor, (cls, object, None), state  # type: ignore[attr-defined]

    methods: dict[str, Any] = {"__call__": __call__, "__setattr__": __setattr__, "__slots__": ()}
    for method in (__copy__, __deepcopy__, __reduce_ex__):
        # Copies stay caught, and copying would go by __reduce_ex__; a class with its own ways knows better.
        if getattr(cls, method.__name__, None) is getattr(object, method.__name__, None):
            methods[method.__name__] = method
    known_as = {"__doc__": cls.__doc__, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    front = type(cls.__name__, (), methods | known_as)
    namespace = {_ORIGINAL: cls, _FRONT: front} | known_as
    catching = _transparent(type(cls))(cls.__name__, (cls,), namespace)
    return catching


def _is_catching(cls: type) -> bool:
    return _ORIGINAL in vars(cls)


def catch_call(obj: Any, handler: Handler) -> None:
    """Routes every `obj(...)` through `handler` until `release_call(obj)`; a second handler replaces the first."""
    vars(obj)[_HANDLER] = handler
    cls: Any = type(obj)
    if not _is_catching(cls):
        obj.__class__ = _catching(cls)


def release_call(obj: Any) -> None:
    """Gives `obj` its own class back; nothing happens where nothing was caught."""
    vars(obj).pop(_HANDLER, None)
    if _is_catching(type(obj)):
        obj.__class__ = type(obj)._diffusers_guidance_original


def handler_of(obj: Any) -> Handler | None:
    """The handler `obj(...)` goes through, if any."""
    return vars(obj).get(_HANDLER)


class _Hook(NamedTuple):
    """Who steps in front of a method."""

    handler: Handler
    elsewhere: Callable[[], None]
    """Told of calls from threads in which nobody does."""


class _StandIn:
    """Stands in `obj` for its `method`, which is `original`, in the threads that have a handler here.

    `kept` is what the attribute held before, None where the object had the method by its class alone.
    """

    def __init__(self, obj: Any, method: str, kept: Call | None):
        self.obj, self.method, self.kept = obj, method, kept
        self.original: Call = getattr(obj, method) if kept is None else kept
        functools.update_wrapper(self, self.original, updated=())  # with its signature, at which pipelines look
        self.hooks: dict[int, list[_Hook]] = {}
        """By thread, the innermost last."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        here = self.hooks.get(threading.get_ident())
        if here:
            return here[-1].handler(self.obj, self.original, args, kwargs)
        for others in [*self.hooks.values()]:
            for other in others[-1:]:
                other.elsewhere()
        return self.original(*args, **kwargs)

    def __deepcopy__(self, memo: dict) -> Any:
        """A copied scheduler steps by itself: pipelines copy theirs for a second modality."""
        if id(self.obj) not in memo:  # only the attributes are copied, to be given back to the same scheduler
            return self
        return copy.deepcopy(self.original, memo)

    def __reduce__(self) -> tuple:
        return getattr, (self.obj, self.method)


class _Bare:
    """Stands in `obj` for `__getstate__`, which copying and pickling ask: copies come without any stand-in."""

    def __init__(self, obj: Any):
        self.obj = obj

    def __deepcopy__(self, memo: dict) -> Any:
        return self  # of attributes that are to be given back to the same object

    def __call__(self) -> Any:
        own = getattr(type(self.obj), "__getstate__", None)  # before Python 3.11 not every class has one
        state = vars(self.obj) if own is None else own(self.obj)
        if not isinstance(state, dict):
            return state
        stands = {name: each for name, each in state.items() if isinstance(each, _StandIn) and each.obj is self.obj}
        kept = {name: stand.kept for name, stand in stands.items() if stand.kept is not None}
        return {name: each for name, each in state.items() if name not in stands and each is not self} | kept


_lock = threading.Lock()
"""Held while a stand-in comes or goes, which another thread may be about to use."""


_NO_THREAD = -1


@contextmanager
def _intercept(obj: Any, attribute: str, method: str, hook: _Hook, thread: int | None = None) -> Iterator[None]:
    """Routes the calling thread's calls of `obj`'s `method` through a handler, by a stand-in in its `attribute`."""
    thread = threading.get_ident() if thread is None else thread
    with _lock:
        there = vars(obj).get(attribute)
        if not isinstance(there, _StandIn) or there.obj is not obj:
            # What a copy was left with by its original's stand-in is not its own.
            vars(obj).pop(attribute, None)
            own = there is not None and not isinstance(there, _StandIn) and not is_inherited(obj, method, there)
            there = vars(obj)[attribute] = _StandIn(obj, method, there if own else None)
            if not isinstance(obj, torch.nn.Module):  # whose copies come without it as it is
                vars(obj)["__getstate__"] = _Bare(obj)
        there.hooks.setdefault(thread, []).append(hook)
    try:
        yield
    finally:
        with _lock:
            there.hooks[thread].remove(hook)
            if not there.hooks[thread]:
                del there.hooks[thread]
            if not there.hooks and vars(obj).get(attribute) is there:
                del vars(obj)[attribute]
                if there.kept is not None:
                    vars(obj)[attribute] = there.kept
                if not any(isinstance(each, _StandIn) for each in vars(obj).values()):
                    vars(obj).pop("__getstate__", None)


def is_inherited(obj: Any, method: str, bound: Any) -> bool:
    """Whether `bound` is the `method` that `obj` has by its class, and nobody's own."""
    function = getattr(bound, "__func__", None)
    return function is not None and function is getattr(type(obj), method, None) and bound.__self__ is obj


def intercept_call(
    module: torch.nn.Module, handler: Handler, elsewhere: Callable[[], None] = lambda: None
) -> AbstractContextManager[None]:
    """Routes `module(...)` through `handler` inside the block, in this thread; of nested ones the innermost counts.

    Calls from threads in which nobody routes it are told to `elsewhere`.
    """
    return _intercept(module, "_compiled_call_impl", "_call_impl", _Hook(handler, elsewhere))


def intercept_method(
    obj: Any, method: str, handler: Handler, elsewhere: Callable[[], None] = lambda: None
) -> AbstractContextManager[None]:
    """Likewise `obj.method(...)`, of a scheduler."""
    return _intercept(obj, method, method, _Hook(handler, elsewhere))


def told_of(obj: Any, method: str | None, elsewhere: Callable[[], None]) -> AbstractContextManager[None]:
    """Tells `elsewhere` of calls of `obj`, or of its `method`, from threads in which nobody routes them."""
    attribute, method = ("_compiled_call_impl", "_call_impl") if method is None else (method, method)
    hook = _Hook(lambda obj, call, args, kwargs: call(*args, **kwargs), elsewhere)
    return _intercept(obj, attribute, method, hook, _NO_THREAD)
