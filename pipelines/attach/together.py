"""Several networks whose predictions make one step: a weak one beside the strong (AutoGuidance), one for no text
(Ideogram 4).

They are followed as one denoiser, whose calls go to one network or another. Where one puts out more, such as a text's
tokens before the picture's, it is cut to what they share: which end that is, the formula tells.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from diffusers_guidance.pipelines.attach.denoiser import Denoiser
from diffusers_guidance.pipelines.attach.output import prediction, with_prediction


@dataclass(frozen=True)
class Part:
    """What is taken of a network's prediction: `length` of the `whole` along `dim`, from `start` on."""

    dim: int
    start: int
    length: int
    whole: int

    @property
    def is_all(self) -> bool:
        return self.length == self.whole

    def of(self, output: Any) -> Any:
        y = None if self.is_all else prediction(output)
        return output if y is None else with_prediction(output, y.narrow(self.dim, self.start, self.length))

    def called(self, call: Callable, *args: Any, **kwargs: Any) -> Any:
        """What it is of a call's output."""
        return self.of(call(*args, **kwargs))

    def run(self, run: Callable, call: Callable, args: tuple, kwargs: dict) -> Any:
        """What `run` makes of the call as if the network put out this part alone; in the form that the network has."""
        if self.is_all:
            return run(call, args, kwargs)
        seen: list[tuple[Any, Any]] = []

        def cut(*args: Any, **kwargs: Any) -> Any:
            whole = call(*args, **kwargs)
            seen.append((whole, self.of(whole)))
            return seen[-1][1]

        output = run(cut, args, kwargs)
        for whole, found in seen:
            if output is found:  # untouched
                return whole
        y = prediction(output)
        if y is None or y.shape[self.dim] != self.length:
            return output
        shape = [*y.shape]
        shape[self.dim] = self.whole
        made = y.new_zeros(shape)
        made.narrow(self.dim, self.start, self.length).copy_(y)
        return with_prediction(output, made)


@dataclass
class Together(Denoiser):
    """The denoiser that several are, in the order of their calls; they have made one step so far."""

    is_several = True
    parts: dict[int, Part] = field(default_factory=dict)
    """By a network's id."""
    networks: tuple[str, ...] = ()
    """Their names; its own is the first one's."""

    @classmethod
    def of(cls, each: Sequence[Denoiser], parts: Sequence[Part]) -> "Together":
        first = each[0]
        made = cls(first.name, torch.nn.ModuleList(one.module for one in each), first.policy, first.may_skip)
        made.networks = tuple(one.name for one in each)
        made.parts = {id(one.module): part for one, part in zip(each, parts, strict=True)}
        made.hands_copies = not all(part.is_all for part in parts)
        made.clock, made.loop, made.sample_shape = first.clock, first.loop, first.sample_shape
        watch = made.cut.watch
        for one in each:
            watch.take_in(one.cut.watch)
        watch.scan()
        for one, part in zip(each, parts, strict=True):
            for was in one.now.inputs:
                again = partial(part.called, watch.over(one.cut.watch.unwatched(was.call)))
                made.now.inputs.append(was._replace(call=again, output=part.of(was.output)))
            made.now.outputs += [part.of(y) for y in one.now.outputs]
            made.now.nfe += one.now.nfe
            made.now.nfe_full += one.now.nfe_full
            made.aside += one.aside
        return made

    @property
    def label(self) -> str:
        return " and ".join(self.networks)

    def run_of(self, module: Any, call: Callable, args: tuple, kwargs: dict) -> Any:
        return self.parts[id(module)].run(self.run, call, args, kwargs)


def together(called: Sequence[Denoiser]) -> Iterator[Together]:
    """The ways in which the networks called for a step may make it together."""
    each = [one for one in {id(one): one for one in called}.values() if one.now.outputs]
    if len(each) < 2 or any(one.formula is not None or isinstance(one, Together) for one in each):
        return
    shapes = [one.now.outputs[0].shape for one in each]
    if len({len(shape) for shape in shapes}) > 1:
        return
    unlike = [i for i in range(1, len(shapes[0])) if len({shape[i] for shape in shapes}) > 1]
    if len(unlike) < 2:
        (dim,) = unlike or (0,)
        wholes = [shape[dim] for shape in shapes] if unlike else [1] * len(each)
        n = min(wholes)
        for at_end in (True, False) if unlike else (True,):
            yield Together.of(each, [Part(dim, m - n if at_end else 0, n, m) for m in wholes])
