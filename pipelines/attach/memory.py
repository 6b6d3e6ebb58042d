"""All that code can remember from call to call: what it can reach, and the tensors there; and how to restore it."""

import sys
import types
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from io import IOBase
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from diffusers_guidance.pipelines.attach.foreign import FUNCTIONS, KNOWN, Foreign, contents, home

_INTERNAL = frozenset(vars(nn.Module())) | {"_compiled_call_impl", "_hf_hook", "_diffusers_hook"}
"""Attributes of a module that never hold a cache."""
_PLAIN = (int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.layout)
_OPEN: tuple[type, ...] = (dict, list, deque, set, np.ndarray, torch.Generator, types.CellType, types.MethodType)
_OPEN += (partial, staticmethod, classmethod, types.SimpleNamespace)
"""Types of known packages that may hold others' objects."""
_LIMIT = 20_000
"""The most objects to look at within reach of foreign code."""
_COPIED = 1 << 20
"""The largest tensor to copy, in numbers; larger ones may be weights."""


def held(thing: Any) -> dict[Any, Any]:
    """What an object holds that may change, by key."""
    if isinstance(thing, dict):
        return {k: v for k, v in thing.items() if k not in _INTERNAL}
    if isinstance(thing, list | deque):
        return dict(enumerate(thing))
    if isinstance(thing, set):
        return {id(each): each for each in thing}
    if isinstance(thing, np.ndarray):
        return {"numbers": thing.tobytes()}
    if isinstance(thing, torch.Generator):
        return {"state": thing.get_state().numpy().tobytes()}
    if isinstance(thing, types.FunctionType):
        names, spaces = _globals(thing)
        return {(i, name): space[name] for i, space in enumerate(spaces) for name in names & space.keys()}
    if isinstance(thing, type):
        own = {k: v for k, v in vars(thing).items() if k == "__call__" or not k.startswith("__")}
        return own if home(thing) not in KNOWN else {k: v for k, v in own.items() if not hasattr(v, "__get__")}
    if hasattr(type(thing), "__next__") and not isinstance(thing, IOBase):
        return {"position": object()}  # it cannot be read
    declared = [vars(cls).get("__slots__", ()) for cls in type(thing).__mro__]
    names = {name for each in declared for name in ([each] if isinstance(each, str) else each) if name[:2] != "__"}
    names |= {"cell_contents"} if isinstance(thing, types.CellType) else set()
    return {name: getattr(thing, name) for name in names if hasattr(thing, name)}


def _put_back(thing: Any, was: dict[Any, Any]) -> None:
    """Restores what an object held."""
    now = held(thing)
    if isinstance(thing, dict):
        for key in now.keys() - was.keys():
            del thing[key]
        thing.update(was)
    elif isinstance(thing, list | deque | set):
        thing.clear()
        (thing.update if isinstance(thing, set) else thing.extend)(was.values())
    elif isinstance(thing, np.ndarray):
        thing[...] = np.frombuffer(was["numbers"], thing.dtype).reshape(thing.shape)
    elif isinstance(thing, torch.Generator):
        thing.set_state(torch.frombuffer(bytearray(was["state"]), dtype=torch.uint8))
    elif isinstance(thing, types.FunctionType):
        for (i, name), value in was.items():
            _globals(thing)[1][i][name] = value
    elif not hasattr(type(thing), "__next__"):
        kind = type if isinstance(thing, type) else object  # bypasses their own __setattr__
        for name in now.keys() - was.keys():
            kind.__delattr__(thing, name)
        for name in (name for name in was if name not in now or now[name] is not was[name]):
            kind.__setattr__(thing, name, was[name])


def _globals(function: types.FunctionType) -> tuple[set[str], list[dict]]:
    """The names that a function may look up, and where: in its module, and in foreign modules that it names."""
    codes, names, space = [function.__code__], set(), function.__globals__
    while codes:
        code = codes.pop()
        names |= {*code.co_names}
        codes += [each for each in code.co_consts if isinstance(each, types.CodeType)]
    modules = [space[name] for name in sorted(names & space.keys()) if isinstance(space[name], types.ModuleType)]
    return names, [space, *(vars(each) for each in modules if each.__name__.partition(".")[0] not in KNOWN)]


def _reach(thing: Any) -> list[Any]:
    """What else an object can reach, besides what it holds."""
    if isinstance(thing, types.FunctionType):
        return [*(thing.__closure__ or ()), thing.__defaults__, thing.__kwdefaults__, thing.__dict__]
    if isinstance(thing, types.MethodType | partial | staticmethod | classmethod):
        names = ("__self__", "__func__", "func", "args", "keywords")
        return [getattr(thing, name) for name in names if hasattr(thing, name)]
    if isinstance(thing, nn.Module):
        return [vars(thing), thing._buffers, *type(thing).__mro__, *thing.children()]
    if isinstance(thing, type):
        return list(thing.__mro__)
    return [getattr(thing, "__dict__", None), *type(thing).__mro__]


class _Numbers(NamedTuple):
    whose: Foreign
    tensor: Tensor
    state: tuple
    """It changes when the numbers do."""
    copy: Tensor | None


class Memory:
    """All that `roots` can remember, as it is now, without copies of the tensors of those that do not act.

    Tensors at the addresses `outputs` are compared by their numbers, since CUDA graphs write without leaving a trace.
    """

    def __init__(self, roots: list[Foreign], acts: Callable[[Foreign], bool], outputs: frozenset[int]):
        self.held: list[tuple[Foreign, Any, dict]] = []
        self.tensors: dict[int, _Numbers] = {}
        self.unseen: list[Foreign] = []
        """Those whose memory is too large to look at."""
        self._seen: dict[int, Any] = {}  # visited objects by id; kept alive, so that no id is reused
        for root in sorted(roots, key=acts, reverse=True):
            queue = deque([root.code])
            if root.owner is not None:
                queue += [vars(root.owner), root.owner._buffers, *type(root.owner).__mro__]
            while queue and len(self._seen) <= _LIMIT:
                thing = queue.popleft()
                if id(thing) in self._seen or isinstance(thing, (*_PLAIN, nn.Parameter, types.ModuleType)):
                    continue
                self._seen[id(thing)] = thing
                if isinstance(thing, Tensor):
                    self._add_tensor(thing, root, acts(root), outputs)
                else:
                    queue += self._add(thing, root)
            self.unseen += [root] if queue else []

    def _add(self, thing: Any, whose: Foreign) -> list[Any]:
        """Takes in an object, and returns what to look at next."""
        if isinstance(thing, tuple):
            return list(thing)
        known = home(thing) in KNOWN
        if known and isinstance(thing, types.FunctionType):
            return [each for each in contents(thing) if isinstance(each, FUNCTIONS)]
        if known and isinstance(thing, nn.Module):
            return [vars(thing), thing._buffers]
        if known and not isinstance(thing, _OPEN):
            if not isinstance(thing, type) and not hasattr(type(thing), "__next__"):
                # Somebody may write to a pipeline.
                thing = {} if home(thing) in sys.stdlib_module_names else getattr(thing, "__dict__", {})
            self.held.append((whose, thing, held(thing)))
            return []
        self.held.append((whose, thing, held(thing)))
        return [*self.held[-1][2].values(), *_reach(thing)]

    def _add_tensor(self, tensor: Tensor, whose: Foreign, acts: bool, outputs: frozenset[int]) -> None:
        is_output, unversioned = address(tensor) in outputs, tensor.is_inference()
        state = (None if unversioned else tensor._version, total(tensor) if is_output or unversioned else None)
        copy = tensor.detach().clone() if acts and (is_output or tensor.numel() <= _COPIED) else None
        self.tensors[id(tensor)] = _Numbers(whose, tensor, state, copy)

    def restore(self, acts: Callable[[Foreign], bool]) -> None:
        """Restores what has changed, except the memory of code that only watches."""
        for whose, thing, was in self.held:
            if acts(whose) and any(changes(was, held(thing))):
                _put_back(thing, was)
        for _, tensor, _, copy in self.tensors.values():
            if copy is not None and not torch.equal(tensor, copy):
                fill(tensor, copy)


def changes(was: dict, now: dict) -> Iterator[tuple[Any, Any]]:
    """The changed values, as pairs of (before, now)."""
    for key in {**was, **now}:
        if _differ(now.get(key), was.get(key)):
            yield was.get(key), now.get(key)


def _differ(now: Any, was: Any) -> bool:
    if now is was or type(now) is not type(was):
        return now is not was
    if isinstance(now, tuple):
        return len(now) != len(was) or any(map(_differ, now, was))
    return not isinstance(now, _PLAIN) or bool(now != was and not (now != now and was != was))  # NaN equals NaN


def address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else id(tensor)


def total(tensor: Tensor) -> str:
    """Its sum as text, so that NaN equals NaN."""
    kind = torch.complex128 if tensor.is_complex() else torch.float64
    return str(tensor.detach().sum(dtype=None if tensor.device.type == "mps" else kind).item())


def fill(tensor: Tensor, value: Any) -> None:
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        tensor.copy_(value)


def is_among(tensor: Tensor, given: list[Tensor]) -> bool:
    """Whether its numbers equal those of one of `given`, perhaps in another dtype and with more rows."""
    for each in given:
        part = tensor[: len(each)] if 0 < tensor.ndim == each.ndim else tensor
        number = each.reshape(()) if each.numel() == 1 else each
        comparable = part.numel() and number.shape in (part.shape, ())
        if comparable and torch.equal(part, number.to(part).expand_as(part)):
            return True
    return False
