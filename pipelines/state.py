"""What of a network lives from call to call: diffusers' stateful hooks, and what code that others put on it remembers.

A part of a batch can stand for the whole, and a call can be skipped, only where the network is the same function at
every call. Networks of diffusers are. What people put on them may not be: a step cache in a replaced `forward`, an
attention processor that counts its calls, a forward hook with a bank of tensors. `scan` finds such code, a `Memory`
is all that it can remember, and a `Watch` compares its memory before and after each call.

What changes is state, but for buffers: CUDA graphs and engines copy what they are given into tensors of their own,
and write what they put out into one. What is set for the first time may belong to either, and is looked at again.
"""

import sys
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from io import IOBase
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

_KNOWN = {"torch", "diffusers", "diffusers_guidance", "transformers", "accelerate", "peft", "safetensors"}
_KNOWN |= {"huggingface_hub", "torchao", "bitsandbytes", "numpy", "triton", "xformers", *sys.stdlib_module_names}
"""Packages whose code is known to be the same function at every call, but for diffusers' stateful hooks."""
_TOLERANT = ("diffusers.hooks.first_block_cache", "diffusers.hooks.text_kv_cache")
"""Hooks that keep tensors by cache context, and count nothing: one half's calls may be skipped."""
_INTERNAL = frozenset(vars(nn.Module())) | {"_compiled_call_impl", "_hf_hook", "_diffusers_hook"}
"""Attributes of a module that no cache is in."""
_GLOBAL_HOOKS = (torch.nn.modules.module._global_forward_hooks, torch.nn.modules.module._global_forward_pre_hooks)
_FUNCTIONS = (types.FunctionType, types.MethodType, partial)
_PLAIN = (int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.layout)
_LIMIT = 20_000
"""Objects within reach of foreign code that are looked at."""
_COPIED = 1 << 20
"""Numbers of a tensor of which a copy is kept; larger ones may be weights."""


# Which code is foreign


class Foreign(NamedTuple):
    """Code on a network that is none of its authors'."""

    what: str
    """In words, for the report."""
    code: Any
    owner: nn.Module | None
    """The module whose attributes it may write to; None of a global hook."""
    table: Any = None
    """Where a forward hook is registered, and by which number."""
    number: int = 0


@dataclass
class Finds:
    """What is on a network."""

    code: list[Foreign] = field(default_factory=list)
    hooks: list[Foreign] = field(default_factory=list)
    """Forward hooks, of which only their calls tell whether they do anything."""
    stateful: list[Any] = field(default_factory=list)
    """Hooks of diffusers that keep tensors of the batch."""


def _home(code: Any) -> str:
    """The package that a function, a class or an object is of; a wrapper may have taken on another's name."""
    if isinstance(code, types.FunctionType):
        return str(code.__globals__.get("__name__") or "torch").partition(".")[0]
    return str((code if isinstance(code, type) else type(code)).__module__).partition(".")[0]


def is_foreign(code: Any, depth: int = 6) -> bool:
    """Whether a callable is, or through wrappers of known packages calls, code of others."""
    if isinstance(code, types.MethodType):
        return is_foreign(code.__func__, depth) or is_foreign(code.__self__)
    if isinstance(code, partial):
        return depth > 0 and any(is_foreign(each, depth - 1) for each in (code.func, *code.args) if callable(each))
    if _home(code) not in _KNOWN or not isinstance(code, types.FunctionType) or not depth:
        return _home(code) not in _KNOWN
    if hasattr(code, "_torchdynamo_orig_callable"):  # whatever compiles it is no part of it
        return is_foreign(code._torchdynamo_orig_callable, depth - 1)
    return any(is_foreign(each, depth - 1) for each in _contents(code) if isinstance(each, _FUNCTIONS))


def _contents(function: types.FunctionType) -> list[Any]:
    return [value for cell in function.__closure__ or () for value in _held(cell).values()]


def scan(parts: Iterable[nn.Module]) -> Finds:
    """What is on a network, given all its parts: thousands, most of which have nothing."""
    finds, tables = Finds(), [(None, table) for table in _GLOBAL_HOOKS]
    classes = _ByClass("forward")
    processors = _ByClass("__call__")
    for part in parts:
        own, cls = part.__dict__, part.__class__
        if classes[cls]:
            finds.code.append(Foreign(f"the forward of {cls.__name__}", cls.forward, part))
        if own["_forward_hooks"] or own["_forward_pre_hooks"]:
            tables += [(part, own["_forward_hooks"]), (part, own["_forward_pre_hooks"])]
        if "forward" in own or "_diffusers_hook" in own:
            _scan_forwards(part, own, finds)
        processor = own["processor"] if "processor" in own else own["_modules"].get("processor")
        if processor is not None and (processors[processor.__class__] or is_foreign(processor)):
            finds.code.append(Foreign(f"one of its attention processors ({_called(processor)})", processor, part))
    for owner, table in tables:
        hooks = [(number, hook) for number, hook in table.items() if is_foreign(hook)]
        finds.hooks += [Foreign(f"the forward hook {_called(h)}", h, owner, table, number) for number, h in hooks]
    return finds


class _ByClass(dict[type, bool]):
    """Whether a class, or the method of it that is called, is foreign."""

    def __init__(self, method: str):
        self.method = method

    def __missing__(self, cls: type) -> bool:
        self[cls] = is_foreign(cls) or is_foreign(getattr(cls, self.method))
        return self[cls]


def _scan_forwards(part: nn.Module, own: dict, finds: Finds) -> None:
    """What is in the place of a module's `forward`, also beneath hooks of accelerate and diffusers."""
    forwards = [own[name] for name in ("forward", "_old_forward") if name in own]
    if (registry := own.get("_diffusers_hook")) is not None:
        forwards += [f for each in registry._fn_refs for f in (each.forward, each.original_forward) if f is not None]
        hooks = list(registry.hooks.values())
        finds.code += [Foreign(f"the hook {_called(each)}", each, part) for each in hooks if is_foreign(each)]
        finds.stateful += [each for each in hooks if each._is_stateful]
    what = f"the replaced forward of {type(part).__name__}"
    finds.code += [Foreign(what, each, part) for each in forwards if is_foreign(each)]


def _called(code: Any) -> str:
    return str(getattr(code, "__name__", type(code).__name__))


# What it remembers


def _held(thing: Any) -> dict[Any, Any]:
    """What a thing holds that may change, by key."""
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
        return own if _home(thing) not in _KNOWN else {k: v for k, v in own.items() if not hasattr(v, "__get__")}
    if hasattr(type(thing), "__next__") and not isinstance(thing, IOBase):
        return {"position": object()}  # it cannot be seen
    declared = [vars(cls).get("__slots__", ()) for cls in type(thing).__mro__]
    names = {name for each in declared for name in ([each] if isinstance(each, str) else each) if name[:2] != "__"}
    names |= {"cell_contents"} if isinstance(thing, types.CellType) else set()
    return {name: getattr(thing, name) for name in names if hasattr(thing, name)}


def _put_back(thing: Any, was: dict[Any, Any]) -> None:
    """Makes a thing hold what it held."""
    now = _held(thing)
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
        kind = type if isinstance(thing, type) else object  # past a __setattr__ of their own
        for name in now.keys() - was.keys():
            kind.__delattr__(thing, name)
        for name in (name for name in was if name not in now or now[name] is not was[name]):
            kind.__setattr__(thing, name, was[name])


def _globals(function: types.FunctionType) -> tuple[set[str], list[dict]]:
    """The names that a function may look up, and where: its module, and others' modules that it names."""
    codes, names, space = [function.__code__], set(), function.__globals__
    while codes:
        code = codes.pop()
        names |= {*code.co_names}
        codes += [each for each in code.co_consts if isinstance(each, types.CodeType)]
    modules = [space[name] for name in sorted(names & space.keys()) if isinstance(space[name], types.ModuleType)]
    return names, [space, *(vars(each) for each in modules if each.__name__.partition(".")[0] not in _KNOWN)]


def _reach(thing: Any) -> list[Any]:
    """What else is in reach of a thing, beside what it holds."""
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
    """Changes with its numbers."""
    copy: Tensor | None


class Memory:
    """All that `roots` can remember, as it is just now; without copies of the tensors of those that do not act.

    Tensors at the addresses `outputs` are told by their numbers, since CUDA graphs write without leaving a trace.
    """

    def __init__(self, roots: list[Foreign], acts: Callable[[Foreign], bool], outputs: frozenset[int]):
        self.held: list[tuple[Foreign, Any, dict]] = []
        self.tensors: dict[int, _Numbers] = {}
        self.unseen: list[Foreign] = []
        """Whose memory is too large to be looked at."""
        self._seen: dict[int, Any] = {}  # what was looked at, by number; kept, so that none comes back
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
        """Looks at a thing; what is to be looked at next."""
        if isinstance(thing, tuple):
            return list(thing)
        known = _home(thing) in _KNOWN
        if known and isinstance(thing, types.FunctionType):
            return [each for each in _contents(thing) if isinstance(each, _FUNCTIONS)]
        if known and isinstance(thing, nn.Module):
            return [vars(thing), thing._buffers]
        if known and not isinstance(thing, _OPEN):
            if not isinstance(thing, type) and not hasattr(type(thing), "__next__"):
                # Somebody may write to a pipeline.
                thing = {} if _home(thing) in sys.stdlib_module_names else getattr(thing, "__dict__", {})
            self.held.append((whose, thing, _held(thing)))
            return []
        self.held.append((whose, thing, _held(thing)))
        return [*self.held[-1][2].values(), *_reach(thing)]

    def _add_tensor(self, tensor: Tensor, whose: Foreign, acts: bool, outputs: frozenset[int]) -> None:
        is_output, unversioned = _address(tensor) in outputs, tensor.is_inference()
        state = (None if unversioned else tensor._version, _sum(tensor) if is_output or unversioned else None)
        copy = tensor.detach().clone() if acts and (is_output or tensor.numel() <= _COPIED) else None
        self.tensors[id(tensor)] = _Numbers(whose, tensor, state, copy)

    def restore(self, acts: Callable[[Foreign], bool]) -> None:
        """Puts back what has changed; but what those have seen that only look on has happened."""
        for whose, thing, was in self.held:
            if acts(whose) and any(_changes(was, _held(thing))):
                _put_back(thing, was)
        for _, tensor, _, copy in self.tensors.values():
            if copy is not None and not torch.equal(tensor, copy):
                _fill(tensor, copy)


_OPEN = (dict, list, deque, set, np.ndarray, torch.Generator, types.CellType, types.MethodType, partial)
_OPEN += (staticmethod, classmethod, types.SimpleNamespace)
"""What of known packages may hold others' things."""


def _changes(was: dict, now: dict) -> Iterator[tuple[Any, Any]]:
    """What is held now that was not, each after what it was."""
    for key in {**was, **now}:
        if _differ(now.get(key), was.get(key)):
            yield was.get(key), now.get(key)


def _differ(now: Any, was: Any) -> bool:
    if now is was or type(now) is not type(was):
        return now is not was
    if isinstance(now, tuple):
        return len(now) != len(was) or any(map(_differ, now, was))
    return not isinstance(now, _PLAIN) or bool(now != was and not (now != now and was != was))  # NaN is as it was


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else id(tensor)


def _sum(tensor: Tensor) -> str:
    return str(tensor.detach().to(torch.complex128).sum().item())  # NaN is as it was


def _fill(tensor: Tensor, value: Any) -> None:
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        tensor.copy_(value)


def _tensors(tree: Any) -> Iterator[Tensor]:
    """The tensors and numbers of a call."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, int | float) and not isinstance(tree, bool):
        yield torch.tensor(tree)
    elif isinstance(tree, dict | list | tuple):
        for each in tree.values() if isinstance(tree, dict) else tree:
            yield from _tensors(each)


def _is_among(tensor: Tensor, given: list[Tensor]) -> bool:
    """Whether its numbers are those of one of `given`, in another dtype perhaps, and with rows to spare."""
    for each in given:
        part = tensor[: len(each)] if 0 < tensor.ndim == each.ndim else tensor
        number = each.reshape(()) if each.numel() == 1 else each
        comparable = part.numel() and number.shape in (part.shape, ())
        if comparable and torch.equal(part, number.to(part).expand_as(part)):
            return True
    return False


# A call


@dataclass
class Watch:
    """Over one network in one run: whether what others have put on it keeps state, and which of it takes part."""

    module: nn.Module
    found: str = ""
    """Why its calls must be made as they would be without us, in words; empty where nothing was found."""
    takes_part: dict[str, None] = field(default_factory=dict)
    """Foreign code that had a part in the network's output, in words."""
    in_doubt: bool = False
    """Whether something was set for the first time, or written that may be a buffer: to be called once more."""
    raised: BaseException | None = None
    """What came out of a forward hook that only looks on: somebody wants the run to end."""
    is_settled: bool = False
    """Whether the step is over at which parts of the batch are tried."""
    finds: Finds = field(default_factory=Finds)
    _memory: Memory | None = None
    """As it was before the last call."""
    _outputs: frozenset[int] = frozenset()
    """Where outputs were put."""
    _once_more: bool = False
    _acting: set[int] = field(default_factory=set)
    """Forward hooks that have done something, by number."""

    @cached_property
    def _parts(self) -> list[nn.Module]:
        return list(self.module.modules())

    @property
    def counting(self) -> str:
        """The names of those of diffusers' hooks that count their calls."""
        names = (type(each).__name__ for each in self.finds.stateful if type(each).__module__ not in _TOLERANT)
        return ", ".join(dict.fromkeys(names))

    def scan(self) -> None:
        """Sees what is on the network now."""
        self.finds = scan(self._parts)
        for each in self.finds.code:
            self._takes_part(each.what)

    def _takes_part(self, what: str) -> None:
        if self.is_settled and what not in self.takes_part:
            self.found = self.found or f"{what} came in after the first guided step"
        self.takes_part[what] = None

    def _acts(self, foreign: Foreign) -> bool:
        return foreign.table is None or id(foreign.code) in self._acting

    def over(self, call: Callable) -> Callable:
        """`call`, under watch where there is anything to find out."""
        is_plain = self.found or not (self.finds.code or self.finds.hooks)
        return call if is_plain else partial(self._call, call)

    def _call(self, call: Callable, *args: Any, **kwargs: Any) -> Any:
        self._memory, random = self._now(), self._random()
        with self._in_front_of_hooks():
            output = call(*args, **kwargs)
        outputs = [*_tensors(output)]
        self._compare(self._memory, [*_tensors((args, kwargs)), *outputs], outputs)
        self._outputs |= {_address(each) for each in outputs}
        if random != self._random():
            self.found = self.found or "random numbers are drawn at every call"
        return output

    def _now(self) -> Memory:
        return Memory(self.finds.code + self.finds.hooks, self._acts, self._outputs)

    def _compare(self, before: Memory, given: list[Tensor], outputs: list[Tensor]) -> None:
        """Takes in what a call has changed: state, or what may be a buffer's."""
        state, doubt = [*before.unseen], []
        for whose, thing, saved in before.held:
            for was, now in _changes(saved, _held(thing)):
                first = was is None and (isinstance(now, bool) or not isinstance(now, int | float))
                flag = isinstance(was, bool) and isinstance(now, bool) and not self.is_settled
                (doubt if (first or flag) and not self._once_more else state).append(whose)
        addresses = {_address(each) for each in outputs}
        for number, (whose, tensor, now, _) in self._now().tensors.items():
            was = before.tensors[number].state if number in before.tensors else None
            is_output = _address(tensor) in addresses
            if was != now:
                (doubt if is_output or _is_among(tensor, given) else state).append(whose)
            elif _is_among(tensor, outputs) and not (is_output and was[1] is None):  # else a graph may have written it
                state.append(whose)  # the output is one of an earlier call
        self.in_doubt |= any(map(self._acts, doubt))
        for whose in filter(self._acts, state):
            self.found = self.found or f"{whose.what} keeps state from call to call"

    @contextmanager
    def once_more(self) -> Iterator[None]:
        """For a call that is made again, to which nothing may be new, nor the last output's numbers matter.

        Leaves no trace.
        """
        memory, self._once_more = self._now(), True
        for _, tensor, _, copy in memory.tensors.values():
            if copy is not None and _address(tensor) in self._outputs:
                _fill(tensor, torch.full_like(tensor, float("nan") if tensor.is_floating_point() else 0))
        try:
            yield
        finally:
            self._once_more = False
            memory.restore(self._acts)

    def restore(self) -> None:
        """Leaves no trace of the last call."""
        if self._memory is not None:
            self._memory.restore(self._acts)

    def _random(self) -> list[bytes]:
        device = next((p.device for p in self.module.parameters()), torch.device("cpu"))
        generators = [torch.default_generator]
        if device.type == "cuda":
            generators.append(torch.cuda.default_generators[device.index or 0])
        return [each.get_state().numpy().tobytes() for each in generators]

    @contextmanager
    def _in_front_of_hooks(self) -> Iterator[None]:
        """Sees which hooks return something, or change what they are given."""
        hooks = [hook for hook in self.finds.hooks if hook.table.get(hook.number) is hook.code]
        placed = [(hook, partial(self._seeing, hook)) for hook in hooks]
        for hook, seeing in placed:
            hook.table[hook.number] = seeing
        try:
            yield
        finally:
            for hook, seeing in placed:
                if hook.table.get(hook.number) is seeing:  # else it has taken itself off
                    hook.table[hook.number] = hook.code

    def _seeing(self, hook: Foreign, *given: Any) -> Any:
        before = _versions(given)
        try:
            returned = hook.code(*given)
        except BaseException as error:
            if not self._acts(hook):
                self.raised = error
            raise
        if returned is not None or before != _versions(given):
            self._acting.add(id(hook.code))
            self._takes_part(hook.what)
        return returned


def _versions(tree: Any) -> list[Any]:
    return [_sum(each) if each.is_inference() else each._version for each in _tensors(tree)]
