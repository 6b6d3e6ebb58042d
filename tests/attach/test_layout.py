"""How outputs lie: a branch of a denoiser's output, the scheduler's tensor, and one row per sample between them.

Every layout is built here from the rows themselves; the way back is the package's.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffusers_guidance.pipelines.attach import layout as attached
from diffusers_guidance.pipelines.attach.combination import Around
from diffusers_guidance.pipelines.attach.identify import identify
from diffusers_guidance.pipelines.attach.layout import View, views


@dataclass(frozen=True)
class Layout:
    """How a network puts (rows, C, ...) out, and how the scheduler holds it."""

    branch: Callable[[Tensor], Tensor]
    held: Callable[[Tensor], Tensor] = lambda y: y
    video: bool = False
    said: str = "output"


def beside(y: Tensor, sign: float = 1.0) -> Tensor:
    """As many more channels that are no prediction, as learned variances are."""
    return sign * y.flip(1) + 10


LAYOUTS = {
    "as the scheduler has it": Layout(lambda y: y),
    "variances behind it, which the scheduler is not given": Layout(
        lambda y: torch.cat([y, beside(y)], 1), said="output[dim 1: 0..3]"
    ),
    "something before it": Layout(lambda y: torch.cat([beside(y), y], 1), said="output[dim 1: 3..6]"),
    "reference tokens behind it": Layout(
        lambda y: torch.cat([y, beside(y)], -1), said="output[dim 3: 0..5]"
    ),
    "tokens, packed": Layout(lambda y: y.flatten(2), lambda y: y),
    "tokens of a video": Layout(
        lambda y: y.flatten(2).transpose(1, 2), video=True, said="output unpacked"
    ),
    "tokens of a video, a frame before it": Layout(
        lambda y: torch.cat([beside(y)[:, :, :1], y], 2).flatten(2).transpose(1, 2), video=True, said="output unpacked"
    ),
    "frames as the scheduler's rows": Layout(
        lambda y: y, lambda y: y.transpose(1, 2).flatten(0, 1), video=True, said="output 4 frames apart"
    ),
    "the batch twice": Layout(lambda y: y, lambda y: torch.cat([y, y]), said="output 2 times"),
    "the batch twice, of a part": Layout(
        lambda y: torch.cat([y, beside(y)], 1), lambda y: torch.cat([y, y]), said="output[dim 1: 0..3] 2 times"
    ),
}  # fmt: skip


def rows(count: int, video: bool, key: int = 0) -> Tensor:
    shape = (3, 4, 2, 5) if video else (3, 2, 5)
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(key))


def view_of(branch: Tensor, held: Tensor, y: Tensor) -> View:
    """The view that reads `y` off both."""
    found = [
        view
        for view in views(branch.shape, held.shape, held.shape, lambda view: True)
        if view(branch).shape == y.shape and torch.equal(view(branch), y) and torch.equal(view.working(held), y)
    ]
    assert found, f"no view between {tuple(branch.shape)} and {tuple(held.shape)}"
    return found[0]


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_view_goes_from_the_branch_to_rows_and_back_to_the_scheduler(name, count, sign):
    layout = LAYOUTS[name]
    y, other = rows(count, layout.video), rows(count, layout.video, key=1)
    branch, held = layout.branch(sign * y), layout.held(y)
    view = view_of(branch, held, y)
    assert str(view) == ("-" if sign < 0 else "") + layout.said
    assert view.sign == sign
    assert view.holds(held)
    assert torch.equal(view(layout.branch(sign * other)), other)
    assert torch.equal(view.part(branch), sign * y)
    assert torch.equal(view.emit(other, held), layout.held(other))
    assert torch.equal(view.working(view.emit(other, held)), other)


@pytest.mark.parametrize("sign", [1, -1])
def test_channels_that_are_not_guided_follow_as_they_are(sign):
    """A learned variance that the scheduler is given too: only the first channels are the prediction."""
    y, other = rows(2, False), rows(2, False, key=1)
    whole = torch.cat([y, beside(y)], 1)
    view = view_of(sign * whole, whole, y)
    assert view.channels == 3
    assert torch.equal(view.rest(whole, whole), beside(y))
    assert torch.equal(view.rest(sign * whole, whole), beside(y))
    assert torch.equal(view.emit(other, whole), torch.cat([other, beside(y)], 1))


def test_of_tens_of_thousands_of_tokens_that_are_all_guided_one_view_is_asked_about_by_sign():
    """Video tokens stand where channels do; a view for each took seconds a step."""
    shape, asked = torch.Size((1, 30_000, 4)), []

    def follows(view: View) -> bool:
        asked.append(view.channels)
        return False

    assert [str(view) for view in views(shape, shape, None, follows)] == ["output", "-output"]
    assert asked == [29_999, 29_999]


def test_views_of_fewer_guided_channels_follow_as_long_as_what_they_leave_does():
    shape = torch.Size((1, 8, 2, 2))
    found = [view.channels for view in views(shape, shape, torch.Size((1, 3, 2, 2)), lambda view: view.channels > 4)]
    assert found == [0, 7, 6, 5] * 2
    likely = [view.channels for view in views(shape, shape, torch.Size((1, 6, 2, 2)), lambda view: view.channels > 4)]
    assert likely == [0, 6, 7, 5] * 2


@given(batched=st.booleans(), branches=st.integers(2, 3), cond=st.integers(0, 1), rows_=st.integers(1, 3))
def test_a_layout_puts_branches_out_and_takes_them_apart_again(batched, branches, cond, rows_):
    parts = [rows(rows_, False, key) for key in range(branches)]
    view = View(tuple(parts[0].shape[1:]))
    layout = attached.Layout(batched=batched, branches=branches, cond_index=cond, view=view, rows=rows_)
    outputs = layout.apply(parts)
    assert len(outputs) == layout.calls == (1 if batched else branches)
    assert [len(y) for y in outputs] == [rows_ * branches // layout.calls] * layout.calls
    assert all(torch.equal(a, b) for a, b in zip(layout.invert(outputs), parts, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(layout.apply(layout.invert(outputs)), outputs, strict=True))


def test_copies_that_differ_are_not_told_by_one_row_a_sample():
    y = rows(2, False)
    view = view_of(y, torch.cat([y, y]), y)
    assert view.holds(torch.cat([y, y]))
    assert not view.holds(torch.cat([y, y + 1]))


def test_shapes_that_do_not_belong_together_have_no_view():
    for branch, target in (
        ((2, 4, 8, 8), (3, 4, 8, 8)),
        ((2, 4, 8, 8), (2, 5, 8, 8)),
        ((2, 8, 16, 16), (2, 4, 8, 8)),
        ((2, 60, 4), (2, 4, 5, 7, 2)),
    ):
        assert list(views(torch.Size(branch), torch.Size(target))) == []


@settings(deadline=None)
@given(
    name=st.sampled_from(list(LAYOUTS)),
    count=st.integers(1, 3),
    sign=st.sampled_from([1, -1]),
    cond=st.integers(0, 1),
    batched=st.booleans(),
    w=st.floats(1.5, 15),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_a_layout_is_identified_and_reproduces_what_the_scheduler_was_given(name, count, sign, cond, batched, w, dtype):
    layout = LAYOUTS[name]
    c, u = (rows(count, layout.video, key).to(dtype) for key in (0, 1))
    held = layout.held(u + w * (c - u))
    branches = [layout.branch(sign * half) for half in ((c, u) if cond == 0 else (u, c))]
    outputs = [torch.cat(branches)] if batched else branches
    formula = identify(outputs, held, {"guidance_scale": w}, Around(), None).formula
    assert (formula.cond_index, formula.batched, formula.view.sign) == (cond, batched, sign)
    assert formula.calls == (1 if batched else 2)
    cut = formula.cut(formula.halves(outputs), Around())
    assert torch.equal(cut[0], c) and torch.equal(cut[1], u)
    assert torch.equal(formula.view.emit(formula.reproduce(outputs, w, Around()), held), held)
