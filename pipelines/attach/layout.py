"""How a denoiser's outputs hold the predictions of a step's branches, and how the scheduler holds the guided one.

`Layout` says which calls and rows are which branch; `View`, which part of a branch is the scheduler's prediction.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import takewhile

import torch
from torch import Tensor


@dataclass(frozen=True)
class View:
    """Which part of a branch's output is the scheduler's prediction, and how the scheduler holds it.

    Guidance works on (rows, ...), one row per sample. `view(branch)` takes a branch of the denoiser's output
    there, `working(tensor)` a scheduler's tensor, and `emit` brings a prediction back to the scheduler.

    Args:
        dim, start, stop: the slice of the branch that counts; stop None: all of it.
        sign: -1 where the pipeline negates.
        shape: of the working tensor, but for its rows.
        tokens: the branch is (rows, tokens, C) of a (rows, C, frames, height, width), with one more frame in front
            or without it.
        frames: the scheduler holds the frames of (rows, C, frames, ...) as rows of their own; 0: it does not.
        copies: the scheduler holds the batch that many times over.
        channels: only the first `channels` are guided, the others follow the conditional branch; 0: all.
    """

    shape: tuple[int, ...]
    dim: int = 0
    start: int = 0
    stop: int | None = None
    sign: int = 1
    tokens: bool = False
    frames: int = 0
    copies: int = 1
    channels: int = 0

    def __call__(self, y: Tensor) -> Tensor:
        return self.signed(self.part(y))

    def signed(self, y: Tensor) -> Tensor:
        return y if self.sign == 1 else -y

    def part(self, y: Tensor) -> Tensor:
        """The part of a branch that is the prediction, not yet negated."""
        if self.tokens:
            y = y.transpose(1, 2).unflatten(2, (-1, *self.shape[2:]))[:, :, -self.shape[1] :]
        if self.stop is not None:
            y = y.narrow(self.dim, self.start, self.stop - self.start)
        return y.reshape(-1, *self.shape)

    def working(self, t: Tensor) -> Tensor:
        """The scheduler's tensor `t` with one row per sample."""
        if self.frames:
            return t.unflatten(0, (-1, self.frames)).transpose(1, 2)
        if self.copies > 1:
            t = t[: t.shape[0] // self.copies]
        return t[:, : self.channels] if self.channels else t

    def rest(self, t: Tensor, of: Tensor) -> Tensor:
        """The unguided channels of a branch or of the scheduler's tensor `t`, as many as `of`, the latter, has."""
        rest = t[:, self.channels : of.shape[1]].to(of.dtype)
        return rest if t is of or self.sign == 1 else -rest

    def holds(self, output: Tensor) -> bool:
        """Whether all of the scheduler's `output` is told by one row per sample: copies must be equal."""
        return self.copies == 1 or torch.equal(self.emit(self.working(output), output), output)

    def emit(self, prediction: Tensor, output: Tensor) -> Tensor:
        """A working prediction as the scheduler holds `output`."""
        if self.frames:
            return prediction.transpose(1, 2).flatten(0, 1)
        if self.channels:
            prediction = torch.cat([prediction, output[: prediction.shape[0], self.channels :]], 1)
        return torch.cat([prediction] * self.copies) if self.copies > 1 else prediction

    def __str__(self) -> str:
        part = "" if self.stop is None else f"[dim {self.dim}: {self.start}..{self.stop}]"
        layout = [
            *(["unpacked"] if self.tokens else []),
            *([f"{self.frames} frames apart"] if self.frames else []),
            *([f"{self.copies} times"] if self.copies > 1 else []),
            *([f"first {self.channels} channels"] if self.channels else []),
        ]
        return f"{'-' if self.sign < 0 else ''}output{part}{' ' if layout else ''}{', '.join(layout)}"


def views(
    branch: torch.Size,
    target: torch.Size,
    sample: torch.Size | None = None,
    follows: Callable[[View], bool] = lambda view: False,
) -> Iterator[View]:
    """The views between a branch of shape `branch` and a scheduler's prediction of shape `target`, plain ones first.

    Args:
        follows: whether the channels that a view leaves unguided are those of a branch. Where they are not, a view of
            fewer guided channels leaves them unguided too, and is not asked about.
    """
    rows, shape = branch[0], tuple(target[1:])
    for sign in (1, -1):
        view = partial(View, sign=sign)
        if target[0] == rows:
            yield from _parts(view, branch, target, sample, follows)
        elif len(branch) == 5 and target[0] == rows * branch[2] and shape == (branch[1], *branch[3:]):
            yield view(tuple(branch[1:]), frames=branch[2])
        elif target[0] == 2 * rows:
            yield from _parts(partial(view, copies=2), branch, torch.Size((rows, *shape)), sample, follows)


def _parts(
    view: Callable[..., View],
    branch: torch.Size,
    target: torch.Size,
    sample: torch.Size | None,
    follows: Callable[[View], bool],
) -> Iterator[View]:
    shape = tuple(target[1:])

    def first(channels: int) -> View:
        return view((channels, *shape[1:]), 1, 0, channels, channels=channels)

    if branch.numel() == target.numel():
        yield view(shape)
    if len(branch) == len(target):
        differing = [i for i, (h, t) in enumerate(zip(branch, target, strict=True)) if h != t]
        if len(differing) == 1 and branch[differing[0]] > target[differing[0]]:
            dim, whole, kept = differing[0], branch[differing[0]], target[differing[0]]
            yield view(shape, dim, 0, kept)
            yield view(shape, dim, whole - kept, whole)
        if differing in ([], [1]) and len(shape) > 1 and branch[1] >= shape[0]:
            # Learned variance: the scheduler gets more channels than are guided; those of its sample, most likely.
            likely = [sample[1]] if sample is not None and sample[1] < shape[0] else []
            fewer = (n for n in range(shape[0] - 1, 0, -1) if n not in likely)
            yield from filter(follows, map(first, likely))
            yield from takewhile(follows, map(first, fewer))
    if len(branch) == 3 and len(target) == 5 and branch[2] == target[1]:
        frame = target[3] * target[4]
        if branch[1] % frame == 0 and branch[1] // frame in (target[2], target[2] + 1):
            yield view(shape, tokens=True)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where a step's branches are among its denoiser's outputs.

    Args:
        batched: one call on all branches, else one call for each.
        branches: how many predictions of a sample these calls evaluate.
        cond_index: which of them is the conditional one.
        view: from a branch to the scheduler's prediction and back.
        rows: samples in the batch.
        further: how many calls follow on one more branch each, such as the conditional one with layers skipped.
    """

    batched: bool
    branches: int
    cond_index: int
    view: View
    rows: int
    further: int = 0

    @cached_property
    def head(self) -> int:
        """Calls of the denoiser before any further ones."""
        return 1 if self.batched else self.branches

    @cached_property
    def calls(self) -> int:
        """The calls of the denoiser at a guided step."""
        return self.head + self.further

    @cached_property
    def evaluations(self) -> int:
        """The evaluations of a sample at a guided step."""
        return self.branches + self.further

    @cached_property
    def others(self) -> list[int]:
        """All branches but the conditional one."""
        return [i for i in range(self.evaluations) if i != self.cond_index]

    @cached_property
    def is_direct(self) -> bool:
        """Whether the scheduler holds the prediction as guidance works on it, one row per sample."""
        return not self.view.frames and self.view.copies == 1 and not self.view.channels

    def apply(self, branches: Sequence[Tensor]) -> list[Tensor]:
        """A step's outputs, from its branches, (rows, ...) each."""
        head, further = branches[: self.branches], branches[self.branches :]
        return [*([torch.cat([*head])] if self.batched else head), *further]

    def invert(self, outputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """The branches of a step's outputs."""
        head, further = outputs[: self.head], outputs[self.head :]
        return [*(head[0].chunk(self.branches) if self.batched else head), *further]

    @cached_property
    def names(self) -> list[str]:
        """The names of the branches."""
        return ["cond" if i == self.cond_index else "uncond" for i in range(self.evaluations)]

    def told(self, names: Sequence[str]) -> str:
        """In words, with these `names` of the branches."""
        head, further = names[: self.branches], names[self.branches :]
        calls = f"one call on [{', '.join(head)}]" if self.batched else f"{self.branches} calls, {' then '.join(head)}"
        more = f", then {' then '.join(further)}" if further else ""
        return f"{calls}{more}; {self.view}"

    def __str__(self) -> str:
        return self.told(self.names)
