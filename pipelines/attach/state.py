"""A network's state between calls: diffusers' stateful hooks, and what foreign code on the network remembers.

A run may evaluate a part of a batch, or skip a call, only if the network is the same function at every call. Networks
of diffusers are. Foreign code on them may not be: a step cache in a replaced `forward`, an attention processor that
counts its calls, a forward hook with a bank of tensors. A `Watch` compares what such code (`foreign.py`) can remember
(`memory.py`) before and after each call.

What has changed is state, unless it is a buffer: CUDA graphs and engines copy their inputs into tensors of their own,
and write their outputs into one. A value that is set for the first time may be either; another call tells.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from diffusers_guidance.pipelines.attach.foreign import Finds, Foreign, scan
from diffusers_guidance.pipelines.attach.memory import Memory, address, changes, fill, held, is_among, total
from diffusers_guidance.pipelines.attach.trees import leaves, tensors

_TOLERANT = ("diffusers.hooks.first_block_cache", "diffusers.hooks.text_kv_cache")
"""Hooks that keep tensors by cache context and do not count calls: one half's calls may be skipped."""


@dataclass
class Watch:
    """Watches one network in one run: whether foreign code on it keeps state, and which of that code takes part."""

    module: nn.Module
    found: str = ""
    """Why all its calls must be made as without `attach`, in words; empty if nothing was found."""
    takes_part: dict[str, None] = field(default_factory=dict)
    """Foreign code that had a part in the network's output, in words."""
    in_doubt: bool = False
    """Whether a value was set for the first time, or a possible buffer written; then a call is made once more."""
    raised: BaseException | None = None
    """The exception of a forward hook that only watches: somebody wants the run to end."""
    is_settled: bool = False
    """Whether the step that tries parts of the batch is over."""
    finds: Finds = field(default_factory=Finds)
    _memory: Memory | None = None
    """The memory before the last call."""
    _outputs: frozenset[int] = frozenset()
    """The addresses of outputs."""
    _once_more: bool = False
    _acting: set[int] = field(default_factory=set)
    """Forward hooks that have acted, by number."""

    @cached_property
    def _parts(self) -> list[nn.Module]:
        return list(self.module.modules())

    @property
    def counting(self) -> str:
        """The names of diffusers' hooks that count their calls."""
        names = (type(each).__name__ for each in self.finds.stateful if type(each).__module__ not in _TOLERANT)
        return ", ".join(dict.fromkeys(names))

    def find(self, why: str) -> None:
        """Notes why all calls must be made as without `attach`."""
        self.found = self.found or why

    def take_in(self, other: "Watch") -> None:
        """Takes over what another has seen of a part of this network."""
        self.found, self.in_doubt = self.found or other.found, self.in_doubt or other.in_doubt
        self.takes_part |= other.takes_part
        self._outputs |= other._outputs
        self._acting |= other._acting

    def unwatched(self, call: Callable) -> Callable:
        """The call behind one of `over`."""
        return call.args[0] if isinstance(call, partial) and call.func == self._call else call

    def settle(self) -> None:
        """Notes that the step at which parts of the batch are tried is over."""
        self.is_settled = True

    def scan(self) -> None:
        """Finds the foreign code on the network now."""
        self.finds = scan(self._parts)
        for each in self.finds.code:
            self._takes_part(each.what)

    def _takes_part(self, what: str) -> None:
        if self.is_settled and what not in self.takes_part:
            self.find(f"{what} came in after the first guided step")
        self.takes_part[what] = None

    def _acts(self, foreign: Foreign) -> bool:
        return foreign.table is None or id(foreign.code) in self._acting

    def over(self, call: Callable) -> Callable:
        """`call`, watched if there is anything to find out."""
        is_plain = self.found or not (self.finds.code or self.finds.hooks)
        return call if is_plain else partial(self._call, call)

    def _call(self, call: Callable, *args: Any, **kwargs: Any) -> Any:
        self._memory, random = self._now(), self._random()
        with self._in_front_of_hooks():
            output = call(*args, **kwargs)
        outputs = [*tensors(output)]
        given = (leaf for _, leaf in leaves((args, kwargs)) if _is_number(leaf))
        self._compare(self._memory, [*map(torch.as_tensor, given), *outputs], outputs)
        self._outputs |= {address(each) for each in outputs}
        if random != self._random():
            self.find("random numbers are drawn at every call")
        return output

    def _now(self) -> Memory:
        return Memory(self.finds.code + self.finds.hooks, self._acts, self._outputs)

    def _compare(self, before: Memory, given: list[Tensor], outputs: list[Tensor]) -> None:
        """Records a call's changes: state, or possibly a buffer's."""
        state: list[Foreign] = [*before.unseen]
        doubt: list[Foreign] = []
        for whose, thing, saved in before.held:
            for was, now in changes(saved, held(thing)):
                first = was is None and (isinstance(now, bool) or not isinstance(now, int | float))
                flag = isinstance(was, bool) and isinstance(now, bool) and not self.is_settled
                (doubt if (first or flag) and not self._once_more else state).append(whose)
        addresses = {address(each) for each in outputs}
        for number, (whose, tensor, now, _) in self._now().tensors.items():
            earlier = before.tensors.get(number)
            is_output = address(tensor) in addresses
            if earlier is None or earlier.state != now:
                (doubt if is_output or is_among(tensor, given) else state).append(whose)
            elif is_among(tensor, outputs) and not (is_output and now[1] is None):  # else a graph may have written it
                state.append(whose)  # the output is from an earlier call
        self.in_doubt |= any(map(self._acts, doubt))
        for whose in filter(self._acts, state):
            self.find(f"{whose.what} keeps state from call to call")

    @contextmanager
    def once_more(self) -> Iterator[None]:
        """For a repeated call: it must set nothing new, and must not depend on the last output's numbers.

        It leaves no trace.
        """
        memory, self._once_more = self._now(), True
        for _, tensor, _, copy in memory.tensors.values():
            if copy is not None and address(tensor) in self._outputs:
                fill(tensor, torch.full_like(tensor, float("nan") if tensor.is_floating_point() else 0))
        try:
            yield
        finally:
            self._once_more = False
            memory.restore(self._acts)

    def restore(self) -> None:
        """Removes all traces of the last call."""
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
        """Records which hooks return something, or change their inputs."""
        hooks = [hook for hook in self.finds.hooks if hook.table.get(hook.number) is hook.code]
        placed = [(hook, partial(self._seeing, hook)) for hook in hooks]
        for hook, seeing in placed:
            hook.table[hook.number] = seeing
        try:
            yield
        finally:
            for hook, seeing in placed:
                if hook.table.get(hook.number) is seeing:  # else it has removed itself
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


def _is_number(leaf: Any) -> bool:
    return isinstance(leaf, Tensor | int | float) and not isinstance(leaf, bool)


def _versions(tree: Any) -> list[Any]:
    return [total(each) if each.is_inference() else each._version for each in tensors(tree)]
