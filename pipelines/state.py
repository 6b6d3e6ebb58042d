"""What of a network lives from call to call: diffusers' stateful hooks, and what code that others put on it remembers.

A part of a batch can stand for the whole, and a call can be skipped, only where the network is the same function at
every call. Networks of diffusers are. What people put on them may not be: a step cache in a replaced `forward`, an
attention processor that counts its calls, a forward hook with a bank of tensors. A `Watch` finds such code, looks at
everything that it can remember before and after each call, and can put it back as it was.
"""

import dis
import sys
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from io import IOBase
from itertools import count
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
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_GLOBAL_HOOKS = (torch.nn.modules.module._global_forward_hooks, torch.nn.modules.module._global_forward_pre_hooks)
_PLAIN = (int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.layout)
_LIMIT = 20_000
"""Objects within reach of foreign code that are looked at."""
_EFFECTS = {"append", "appendleft", "extend", "add", "update", "put", "write", "print", "info", "debug", "record"}
"""What is called for its effect: a hook that returns what these return returns nothing."""
_MOVES = {"SWAP", "ROT_TWO", "POP_TOP", "END_FOR", "CACHE"}
"""What comes between a value and its return, out of a loop say."""


class Misfit(RuntimeError):
    """What a part of the batch gave cannot stand for the same part of the whole."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a call failed for want of memory, by whatever name."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "out of memory" in str(error).lower()


class Foreign(NamedTuple):
    """Code on a network that is none of its authors'."""

    what: str
    """In words, for the report."""
    code: Any
    owner: nn.Module | None
    """The module whose attributes it may write to; None of a hook, which is found out by itself."""


# Which code is foreign


def _home(code: Any) -> str:
    """The package that a function, a class or an object is of; a wrapper may have taken on another's name."""
    if isinstance(code, types.FunctionType):
        return str(code.__globals__.get("__name__") or "torch").partition(".")[0]
    if isinstance(code, types.MethodType):
        return _home(code.__func__)
    return str((code if isinstance(code, type) else type(code)).__module__).partition(".")[0]


def _is_known(code: Any) -> bool:
    return _home(code) in _KNOWN


def is_foreign(code: Any, depth: int = 6) -> bool:
    """Whether a callable is, or through wrappers of known packages calls, code of others."""
    if isinstance(code, types.MethodType):
        return is_foreign(code.__func__, depth) or is_foreign(code.__self__)
    if isinstance(code, partial):
        return any(is_foreign(each, depth - 1) for each in (code.func, *code.args) if callable(each) and depth)
    if not _is_known(code):
        return True
    if not isinstance(code, types.FunctionType) or not depth:
        return False
    if hasattr(code, "_torchdynamo_orig_callable"):  # whatever compiles it is no part of it
        return is_foreign(code._torchdynamo_orig_callable, depth - 1)
    inner = (_content(cell) for cell in code.__closure__ or ())
    return any(is_foreign(each, depth - 1) for each in inner if isinstance(each, _CALLABLES))


_CALLABLES = (types.FunctionType, types.MethodType, partial)


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # nothing yet
        return None


def found_on(parts: list[tuple[str, nn.Module]]) -> list[Foreign]:
    """All foreign code on a network, given all its parts by name, but for forward hooks."""
    found = []
    classes = {cls: is_foreign(cls) or is_foreign(cls.forward) for cls in {type(part) for _, part in parts}}
    for _, part in parts:
        own = part.__dict__
        if classes[type(part)]:
            found.append(Foreign(f"the forward of {type(part).__name__}", type(part).forward, part))
        if "forward" in own or "_diffusers_hook" in own:
            what = f"the replaced forward of {type(part).__name__}"
            found += [Foreign(what, f, part) for f in _replaced(own) if is_foreign(f)]
            found += [Foreign(f"the hook {type(h).__name__}", h, part) for h in _registered(own) if is_foreign(h)]
        processor = getattr(part, "processor", None) if "processor" in own or "processor" in own["_modules"] else None
        if processor is not None and (is_foreign(processor) or is_foreign(type(processor).__call__)):
            found.append(Foreign(f"one of its attention processors ({_called(processor)})", processor, part))
    return found


def _replaced(own: dict) -> Iterator[Any]:
    """What stands in the place of a module's `forward`, also beneath the hooks of accelerate and diffusers."""
    yield from (own[name] for name in ("forward", "_old_forward") if name in own)
    for reference in own["_diffusers_hook"]._fn_refs if "_diffusers_hook" in own else ():
        yield from (each for each in (reference.forward, reference.original_forward) if each is not None)


def _registered(own: dict) -> list[Any]:
    """Hooks of diffusers' kind on a module."""
    return list(own["_diffusers_hook"].hooks.values()) if "_diffusers_hook" in own else []


def stateful_hooks(parts: list[tuple[str, nn.Module]]) -> tuple[bool, list[str]]:
    """Of diffusers' hooks: whether some keep tensors of the batch, and the names of those that count their calls."""
    stateful = [type(h) for _, part in parts for h in _registered(part.__dict__) if h._is_stateful]
    counting = [each.__name__ for each in stateful if each.__module__ not in _TOLERANT]
    return bool(stateful), list(dict.fromkeys(counting))


# What it remembers


class _Slot(NamedTuple):
    """One thing that can be changed: whose it is, how to read it, how to write it, and what was read."""

    whose: str
    read: Callable[[], Any]
    write: Callable[[Any], Any]
    saved: Any

    @property
    def is_changed(self) -> bool:
        return _differ(self.read(), self.saved)


def _differ(now: Any, saved: Any) -> bool:
    if now is saved:
        return False
    if type(now) is not type(saved):
        return True
    if isinstance(now, _PLAIN):
        return bool(now != saved) and not (now != now and saved != saved)  # NaN is as it was
    if isinstance(now, _Items):
        return len(now.items) != len(saved.items) or any(map(_differ, now.items, saved.items))
    if isinstance(now, tuple):
        return len(now) != len(saved) or any(map(_differ, now, saved))
    return True


class _Items:
    """What is in a container, in order."""

    def __init__(self, items: Iterable[Any]):
        self.items = tuple(items)


class Memory:
    """All that `roots` can remember, as it is just now."""

    def __init__(self, roots: list[Foreign]):
        self._slots: list[_Slot] = []
        self._seen: dict[int, Any] = {}
        """What was looked at; kept, so that none of their numbers comes back."""
        self._queue: deque[Any] = deque()
        self._whose = ""
        for root in roots:
            self._whose = root.what
            self._queue.append(root.code)
            if root.owner is not None:
                self._attributes(root.owner)
                self._class(type(root.owner))
            while self._queue and len(self._seen) <= _LIMIT:
                self._look(self._queue.popleft())
        self.unseen = self._whose if self._queue else ""
        """Whose memory is too large to be looked at."""

    @property
    def changed(self) -> str:
        """Whose memory is another one by now, in words; empty where all is as it was."""
        return next((slot.whose for slot in self._slots if slot.is_changed), "")

    def restore(self) -> None:
        """Puts back what has changed."""
        for slot in self._slots:
            if slot.is_changed:
                slot.write(slot.saved)

    def _slot(self, read: Callable[[], Any], write: Callable[[Any], Any]) -> Any:
        saved = read()
        self._slots.append(_Slot(self._whose, read, write, saved))
        return saved

    def _is_new(self, thing: Any) -> bool:
        new = id(thing) not in self._seen
        self._seen[id(thing)] = thing
        return new

    def _look(self, thing: Any) -> None:
        if isinstance(thing, (*_PLAIN, nn.Parameter, types.ModuleType)) or not self._is_new(thing):
            return
        known = _is_known(thing)
        if isinstance(thing, Tensor):
            self._tensor(thing)
        elif isinstance(thing, torch.Generator):
            self._slot(lambda: _state(thing), lambda state: thing.set_state(_bytes(state)))
        elif isinstance(thing, types.FunctionType):
            self._function(thing)
        elif isinstance(thing, types.MethodType):
            self._queue += [thing.__self__, thing.__func__]
        elif isinstance(thing, partial):
            self._queue += [thing.func, *thing.args, *thing.keywords.values()]
        elif isinstance(thing, staticmethod | classmethod):
            self._queue.append(thing.__func__)
        elif isinstance(thing, property):
            self._queue += [each for each in (thing.fget, thing.fset) if each is not None]
        elif isinstance(thing, type):
            self._class(thing)
        elif isinstance(thing, dict):
            self._dict(thing)
        elif isinstance(thing, list | deque):
            self._queue += self._slot(lambda: _Items(thing), partial(_refill, thing)).items
        elif isinstance(thing, set):
            self._slot(lambda: _Items(sorted(thing, key=id)), partial(_refill, thing))
        elif isinstance(thing, tuple):
            self._queue += thing
        elif isinstance(thing, nn.Module):
            self._attributes(thing)
            if not known:
                self._queue += [type(thing), *thing.children()]
        elif isinstance(thing, np.ndarray):
            self._slot(
                thing.tobytes, lambda was: np.copyto(thing, np.frombuffer(was, thing.dtype).reshape(thing.shape))
            )
        elif isinstance(thing, count):
            self._slot(lambda: repr(thing), lambda was: None)
        elif hasattr(type(thing), "__next__") and not isinstance(thing, IOBase):
            self._slot(object, lambda was: None)  # how far it has come cannot be seen
        elif not known or isinstance(thing, types.SimpleNamespace):
            self._object(thing)
        elif isinstance(getattr(thing, "__dict__", None), dict) and _home(thing) not in sys.stdlib_module_names:
            self._dict(vars(thing), follow=False)  # somebody may write to a pipeline

    def _tensor(self, tensor: Tensor) -> None:
        copy = tensor.detach().clone() if tensor.numel() <= 1 << 26 else None

        def read() -> int:
            if not tensor.is_inference():
                return int(tensor._version)
            return int(copy is not None and not torch.equal(tensor, copy))

        def write(was: int) -> None:
            if copy is not None:
                with torch.inference_mode(tensor.is_inference()), torch.no_grad():
                    tensor.copy_(copy)

        self._slot(read, write)

    def _function(self, function: types.FunctionType) -> None:
        known = _is_known(function)
        for cell in function.__closure__ or ():
            content = self._slot(partial(_content, cell), partial(setattr, cell, "cell_contents"))
            if not known or isinstance(content, _CALLABLES):
                self._queue.append(content)
        if known:
            return
        self._queue += (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
        self._dict(function.__dict__)
        names = set(_names(function.__code__))
        for space in (function.__globals__, *_own_modules(function.__globals__, names)):
            for name in names & space.keys():
                write = partial(space.__setitem__, name)
                self._queue.append(self._slot(partial(space.get, name), write))

    def _class(self, cls: type) -> None:
        """What is written to classes; and the methods of those that are foreign."""
        for each in cls.__mro__:
            if each in (object, nn.Module, Tensor) or (each is not cls and not self._is_new(each)):
                continue
            known = _is_known(each)

            def attributes(each: type = each, known: bool = known) -> _Items:
                own = [(k, v) for k, v in vars(each).items() if k == "__call__" or not k.startswith("__")]
                return _Items((k, v) for k, v in own if not (known and (callable(v) or hasattr(type(v), "__get__"))))

            def write(was: _Items, each: type = each, read: Callable[[], _Items] = attributes) -> None:
                kept = dict(was.items)
                for name in dict(read().items).keys() - kept.keys():
                    delattr(each, name)
                for name, value in kept.items():
                    if vars(each).get(name) is not value:
                        setattr(each, name, value)

            self._queue += [value for _, value in self._slot(attributes, write).items]

    def _attributes(self, module: nn.Module) -> None:
        if self._is_new(vars(module)):
            self._dict(vars(module), _INTERNAL)
            self._dict(module._buffers)

    def _object(self, thing: Any) -> None:
        if isinstance(getattr(thing, "__dict__", None), dict):
            self._dict(vars(thing))
        for name in (name for cls in type(thing).__mro__ for name in _slots_of(cls)):
            write = partial(object.__setattr__, thing, name)
            self._queue.append(self._slot(partial(getattr, thing, name, None), write))
        self._queue.append(type(thing))

    def _dict(self, mapping: dict, without: frozenset[str] = frozenset(), follow: bool = True) -> None:
        def read() -> _Items:
            return _Items((k, v) for k, v in mapping.items() if k not in without)

        def write(was: _Items) -> None:
            kept = dict(was.items)
            for key in [key for key in mapping if key not in without and key not in kept]:
                del mapping[key]
            mapping.update(kept)

        saved = self._slot(read, write)
        if follow:
            self._queue += [value for _, value in saved.items]


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _slots_of(cls: type) -> tuple[str, ...]:
    slots = vars(cls).get("__slots__", ())
    return tuple(n for n in ((slots,) if isinstance(slots, str) else slots) if not n.startswith("__"))


def _own_modules(space: dict, names: set[str]) -> list[dict]:
    """The variables of modules, of no known package, that are among `names`."""
    modules = [space[name] for name in names & space.keys() if isinstance(space[name], types.ModuleType)]
    return [vars(each) for each in modules if each.__name__.partition(".")[0] not in _KNOWN]


def _refill(container: Any, was: _Items) -> None:
    container.clear()
    (container.update if isinstance(container, set) else container.extend)(was.items)


def _state(generator: torch.Generator) -> bytes:
    return bytes(generator.get_state().numpy().tobytes())


def _bytes(state: bytes) -> Tensor:
    return torch.frombuffer(bytearray(state), dtype=torch.uint8)


# Hooks


def may_act(hook: Any) -> bool:
    """Whether a forward hook that has only looked on may yet return or change something, as far as its code tells."""
    while isinstance(hook, types.MethodType | partial) or hasattr(hook, "__wrapped__"):
        hook = getattr(hook, "__wrapped__", None) or getattr(hook, "__func__", None) or hook.func
    if not hasattr(hook, "__code__"):
        hook = type(hook).__call__
    if not hasattr(hook, "__code__"):
        return False
    returned: list[tuple[dis.Instruction, list[Any]]] = []  # what each return returns, and what is on its line
    line: list[Any] = []
    before = None
    for each in dis.get_instructions(hook):
        if each.starts_line:
            line = []
        if each.opname == "RETURN_VALUE" and before is not None:
            returned.append((before, line))
        line = [*line, each.argval]
        if each.opname not in _MOVES:
            before = each

    def nothing(value: dis.Instruction, line: list[Any]) -> bool:
        if value.opname.startswith("CALL"):
            return len(returned) == 1 or any(name in _EFFECTS for name in line if isinstance(name, str))
        return value.opname == "LOAD_CONST" and value.argval is None

    writes = any(name.endswith("_") and hasattr(Tensor, name) for name in hook.__code__.co_names)
    return writes or not all(nothing(*each) for each in returned)


@dataclass
class Watch:
    """Over one network in one run: whether what others have put on it keeps state, and which of it takes part."""

    module: nn.Module
    found: str = ""
    """Why its calls must be made as they would be without us, in words; empty where nothing was found."""
    takes_part: dict[str, None] = field(default_factory=dict)
    """Foreign code that had a part in the network's output, in words."""
    raised: BaseException | None = None
    """What came out of a forward hook that only looks on: somebody wants the run to end."""
    is_settled: bool = False
    """Whether the step is over at which parts of the batch are tried."""
    _on: list[Foreign] = field(default_factory=list)
    _hooks: list[tuple[Foreign, dict, int]] = field(default_factory=list)
    _memory: Memory | None = None

    @cached_property
    def parts(self) -> list[tuple[str, nn.Module]]:
        return list(self.module.named_modules())

    def look(self) -> bool:
        """Sees what is on the network now; False where there is nothing to find out."""
        if self.found:
            self._memory = None
            return False
        self._on, self._hooks = found_on(self.parts), list(self._all_hooks())
        for each in self._on:
            self._takes_part(each.what)
        return bool(self._on or self._hooks)

    def _takes_part(self, what: str) -> None:
        if self.is_settled and what not in self.takes_part:
            self.found = self.found or f"{what} came in after the first guided step"
        self.takes_part[what] = None

    def _all_hooks(self) -> Iterator[tuple[Foreign, dict, int]]:
        """Foreign forward hooks, each with where it is."""
        tables = [(part, part.__dict__[name]) for _, part in self.parts for name in _HOOKS if part.__dict__.get(name)]
        for part, table in [*tables, *((None, each) for each in _GLOBAL_HOOKS)]:
            for number, hook in table.items():
                if is_foreign(hook):
                    yield Foreign(f"the forward hook {_called(hook)}", hook, part), table, number

    def call(self, call: Callable, *args: Any, **kwargs: Any) -> Any:
        """`call(*args, **kwargs)`, of which is found out whether it changes what the next call gives."""
        hooks = [h for h, *_ in self._hooks if h.what in self.takes_part or may_act(h.code)]
        if self._memory is None or self._memory.changed:  # between calls is none of the network's
            self._memory = Memory(self._on + hooks)
        random = self._random()
        with self._in_front_of_hooks():
            output = call(*args, **kwargs)
        if changed := self._memory.changed or self._memory.unseen:
            self.found = self.found or f"{changed} keeps state from call to call"
        elif random != self._random():
            self.found = self.found or "random numbers are drawn at every call"
        return output

    def restore(self) -> None:
        """Leaves no trace of the last call."""
        if self._memory is not None:
            self._memory.restore()

    def _random(self) -> list[bytes]:
        device = next((p.device for p in self.module.parameters()), torch.device("cpu"))
        generators = [torch.default_generator]
        if device.type == "cuda":
            generators.append(torch.cuda.default_generators[device.index or 0])
        return [_state(each) for each in generators]

    @contextmanager
    def _in_front_of_hooks(self) -> Iterator[None]:
        """Sees which hooks return something, or change what they are given."""
        placed = [(table, number, hook.code, partial(self._seeing, hook)) for hook, table, number in self._hooks]
        for table, number, _, seeing in placed:
            table[number] = seeing
        try:
            yield
        finally:
            for table, number, hook, seeing in placed:
                if table.get(number) is seeing:  # else it has taken itself off
                    table[number] = hook

    def _seeing(self, hook: Foreign, *given: Any) -> Any:
        before = _versions(given)
        try:
            returned = hook.code(*given)
        except BaseException as error:
            if hook.what not in self.takes_part:
                self.raised = error
            raise
        if returned is not None or before != _versions(given):
            self._takes_part(hook.what)
        return returned


def _called(code: Any) -> str:
    return str(getattr(code, "__name__", type(code).__name__))


def _versions(tree: Any) -> list[Any]:
    if isinstance(tree, Tensor):
        return [str(tree.sum().item()) if tree.is_inference() else tree._version]
    if isinstance(tree, dict | list | tuple):
        return [v for each in (tree.values() if isinstance(tree, dict) else tree) for v in _versions(each)]
    return []
