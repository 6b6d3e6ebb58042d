"""Foreign code on a network, not its authors': replaced forwards, processors, hooks; and diffusers' own hooks."""

import functools
import sys
import types
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

KNOWN = {"torch", "diffusers", "diffusers_guidance", "transformers", "accelerate", "peft", "safetensors"}
KNOWN |= {"huggingface_hub", "torchao", "bitsandbytes", "numpy", "triton", "xformers", *sys.stdlib_module_names}
"""Packages whose code is known to be the same function at every call, except diffusers' stateful hooks."""
FUNCTIONS = (types.FunctionType, types.MethodType, partial)
_GLOBAL_HOOKS = (torch.nn.modules.module._global_forward_hooks, torch.nn.modules.module._global_forward_pre_hooks)


class Foreign(NamedTuple):
    """Code on a network that is not its authors'."""

    what: str
    """In words, for the report."""
    code: Any
    owner: nn.Module | None
    """The module whose attributes it may write to; None for a global hook."""
    table: Any = None
    """Where a forward hook is registered, under `number`."""
    number: int = 0


@dataclass
class Finds:
    """The code found on a network."""

    code: list[Foreign] = field(default_factory=list)
    hooks: list[Foreign] = field(default_factory=list)
    """Forward hooks; only their calls tell whether they act."""
    stateful: list[Any] = field(default_factory=list)
    """Hooks of diffusers that keep tensors of the batch."""


def home(code: Any) -> str:
    """The package of a function, a class or an object; a wrapper may have another's name."""
    if isinstance(code, types.FunctionType):
        return str(code.__globals__.get("__name__") or "torch").partition(".")[0]
    return str((code if isinstance(code, type) else type(code)).__module__).partition(".")[0]


def is_foreign(code: Any, depth: int = 6) -> bool:
    """Whether a callable is foreign code, or calls it through wrappers of known packages."""
    if isinstance(code, types.MethodType):
        return is_foreign(code.__func__, depth) or is_foreign(code.__self__)
    if isinstance(code, partial):
        return depth > 0 and any(is_foreign(each, depth - 1) for each in (code.func, *code.args) if callable(each))
    if home(code) not in KNOWN or not isinstance(code, types.FunctionType) or not depth:
        return home(code) not in KNOWN
    if hasattr(code, "_torchdynamo_orig_callable"):  # the compiler is not part of it
        return is_foreign(code._torchdynamo_orig_callable, depth - 1)
    return any(is_foreign(each, depth - 1) for each in contents(code) if isinstance(each, FUNCTIONS))


def contents(function: types.FunctionType) -> list[Any]:
    """What a function has captured in its closure."""
    cells = function.__closure__ or ()
    return [cell.cell_contents for cell in cells if hasattr(cell, "cell_contents")]


def scan(parts: Iterable[nn.Module]) -> Finds:
    """The code on a network, given all its parts: thousands, most of them bare."""
    finds = Finds()
    tables: list[tuple[nn.Module | None, Any]] = [(None, table) for table in _GLOBAL_HOOKS]

    @functools.cache
    def is_foreign_class(cls: type, method: str) -> bool:
        return is_foreign(cls) or is_foreign(getattr(cls, method))

    for part in parts:
        own: dict[str, Any] = part.__dict__
        cls: Any = part.__class__
        if is_foreign_class(cls, "forward"):
            finds.code.append(Foreign(f"the forward of {cls.__name__}", cls.forward, part))
        if own["_forward_hooks"] or own["_forward_pre_hooks"]:
            tables += [(part, own["_forward_hooks"]), (part, own["_forward_pre_hooks"])]
        if "forward" in own or "_diffusers_hook" in own:
            _scan_forwards(part, own, finds)
        processor = own["processor"] if "processor" in own else own["_modules"].get("processor")
        if processor is not None and (is_foreign_class(processor.__class__, "__call__") or is_foreign(processor)):
            finds.code.append(Foreign(f"one of its attention processors ({_called(processor)})", processor, part))
    for owner, table in tables:
        hooks = [(number, hook) for number, hook in table.items() if is_foreign(hook)]
        finds.hooks += [Foreign(f"the forward hook {_called(h)}", h, owner, table, number) for number, h in hooks]
    return finds


def _scan_forwards(part: nn.Module, own: dict, finds: Finds) -> None:
    """The replacements of a module's `forward`, also beneath hooks of accelerate and diffusers."""
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
