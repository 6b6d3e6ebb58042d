"""Rows of a denoiser's call: taken out, put back together, told apart.

The truth is the same call made for those rows alone: every argument here is built row by row.
"""

from collections import OrderedDict
from typing import Any, NamedTuple

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_guidance.pipelines.attach.output import merged, prediction, puts_out_more, with_prediction
from diffusers_guidance.pipelines.attach.rows import READINGS, Reading, doubts, take
from diffusers_guidance.pipelines.attach.told import carries, marks
from diffusers_guidance.pipelines.attach.trees import copied
from diffusers_guidance.steps import pick


class Pair(NamedTuple):
    first: Any
    second: Any


def numbers(key: int, row: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(100 * key + row))


# What arguments are made of, each for the rows that a call has.
SHARED = torch.arange(60.0).view(5, 12)
LEAVES = {
    "sample": lambda rows: torch.stack([numbers(0, row, 4, 6) for row in rows]),
    "timestep": lambda rows: torch.tensor([float(row) for row in rows]),
    "hidden_states": lambda rows: [numbers(1, row, 5, 2 + row) for row in rows],  # as many tokens as each has
    "frames": lambda rows: torch.cat([numbers(2, row, 3, 5) for row in rows]),  # three a row, folded into the batch
    "tokens": lambda rows: torch.stack([numbers(3, row, 7, 5) for row in rows], 1),  # the rows second
    "halves": lambda rows: (torch.stack([numbers(4, row, 3) for row in rows]), None),
    "named": lambda rows: Pair(torch.stack([numbers(5, row, 2, 2) for row in rows]), "text"),
    "added": lambda rows: {"text_embeds": torch.stack([numbers(6, row, 8) for row in rows]), "scale": 0.5},
    "ordered": lambda rows: OrderedDict(a=torch.stack([numbers(7, row, 8) for row in rows])),
    "residuals": lambda rows: [torch.stack([numbers(8 + k, row, 3, 3) for row in rows]) for k in range(2)],
    "t": lambda rows: torch.tensor(981),
    "nothing": lambda rows: None,
    "flag": lambda rows: True,
    "rotary_table": lambda rows: SHARED,
}


def assert_same(found: Any, expected: Any) -> None:
    assert type(found) is type(expected)
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key in expected:
            assert_same(found[key], expected[key])
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for mine, other in zip(found, expected, strict=True):
            assert_same(mine, other)
    else:
        assert found == expected


@settings(deadline=None)
@given(st.data())
def test_some_rows_of_a_call_are_the_call_for_those_rows(data):
    count = data.draw(st.sampled_from([3, 4, 6, 8]))  # two residuals are no rows; nor are five entries of a table
    index = data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=count, unique=True))
    names = data.draw(st.lists(st.sampled_from(list(LEAVES)), min_size=1, unique=True))

    def call(rows: Any) -> dict[str, Any]:
        return {name: LEAVES[name](rows) for name in names}

    assert_same(take(call(range(count)), count, index), call(index))


def test_what_is_taken_is_a_copy():
    sample = LEAVES["sample"](range(4))
    taken = take(sample, 4, [1, 2])
    taken.zero_()
    assert torch.equal(sample, LEAVES["sample"](range(4)))


@pytest.mark.parametrize(
    ("name", "value", "reading", "expected"),
    [
        # A table with as many entries as the batch has rows: rows of it, or a table.
        ("freqs_cos", lambda x: x, Reading(), lambda x: x[[2, 0]]),
        ("freqs_cos", lambda x: x, Reading(tables=False), lambda x: x),
        ("image_rotary_emb", lambda x: (x, x), Reading(tables=False), lambda x: (x, x)),
        # A list of as many tensors as rows, each of which has that many rows too.
        ("residuals", lambda x: [x, x + 1, x + 2], Reading(), lambda x: [x[[2, 0]], x[[2, 0]] + 1, x[[2, 0]] + 2]),
        ("residuals", lambda x: [x, x + 1, x + 2], Reading(elements=True), lambda x: [x + 2, x]),
        # Such a list whose tensors have not: one for each row, or one for each of three adapters.
        ("embeds", lambda x: [x[:2], x[:2] + 1, x[:2] + 2], Reading(), lambda x: [x[:2] + 2, x[:2]]),
        ("embeds", lambda x: [x[:2], x + 1, x[:1]], Reading(lists=False), lambda x: [x[:2], x[[2, 0]] + 1, x[:1]]),
        # Twice as many entries as rows: two a row, or as many of something else.
        ("frames", lambda x: x.repeat_interleave(2, 0), Reading(), lambda x: x[[2, 0]].repeat_interleave(2, 0)),
        ("frames", lambda x: x.repeat_interleave(2, 0), Reading(folded=False), lambda x: x.repeat_interleave(2, 0)),
        ("img_ids", lambda x: x.repeat_interleave(2, 0), Reading(), lambda x: x.repeat_interleave(2, 0)),
        # As many entries as rows in the second dimension, or in both.
        ("tokens", lambda x: x[None].expand(2, 3, 4), Reading(), lambda x: x[[2, 0]][None].expand(2, 2, 4)),
        ("tokens", lambda x: x[None].expand(2, 3, 4), Reading(second=False), lambda x: x[None].expand(2, 3, 4)),
        ("mask", lambda x: x[:, None, :] + x[None], Reading(), lambda x: (x[:, None, :] + x[None])[[2, 0]]),
        ("mask", lambda x: x[:, None, :] + x[None], Reading(first=False), lambda x: (x[:, None] + x[None])[:, [2, 0]]),
    ],
)
def test_a_reading_decides_where_shapes_leave_it_open(name, value, reading, expected):
    x = torch.arange(12.0).view(3, 4)
    assert reading in READINGS
    assert_same(take({name: value(x)}, 3, [2, 0], reading), {name: expected(x)})


def test_only_what_shapes_leave_open_is_in_doubt():
    x = torch.arange(24.0).view(6, 4)
    latents = x[:2].repeat(3, 1)  # made by repeating: there is nothing to ask
    tree = {
        "sample": x,
        "latents": latents,
        "timestep": torch.tensor(981),
        "nested": {"frames": torch.cat([x, x + 1])},
        "freqs_cos": x,
        "repeated_ids": latents,
        "tokens": x[None].expand(2, 6, 4),
        "residuals": [x] * 6,
        "prompts": [x[:k] for k in (1, 2, 3, 4, 5, 7)],
        "table_ids": torch.cat([x, x]),
    }
    assert doubts(tree, 6, 3) == ["frames", "freqs_cos", "tokens", "residuals"]
    assert doubts({"sample": x, "timestep": None}, 6, 3) == []


@pytest.mark.parametrize("chosen", [[True, False, True], [False] * 3, [True] * 3])
def test_outputs_of_two_calls_are_merged_row_by_row(chosen):
    def made(sign: float, rows: Any = range(3)) -> dict[str, Any]:
        return {name: LEAVES[name](rows) for name in ("sample", "hidden_states", "halves", "added")}

    def signed(tree: Any, sign: float) -> Any:
        if isinstance(tree, torch.Tensor):
            return sign * tree
        if isinstance(tree, dict):
            return {key: signed(value, sign) for key, value in tree.items()}
        return type(tree)(signed(v, sign) for v in tree) if isinstance(tree, list | tuple) else tree

    there, otherwise = made(1), signed(made(1), -1.0)
    found = merged(chosen, there, otherwise)
    for row, was in enumerate(chosen):
        assert torch.equal(found["sample"][row], there["sample"][row] * (1 if was else -1))
        assert torch.equal(found["hidden_states"][row], there["hidden_states"][row] * (1 if was else -1))
        assert torch.equal(found["halves"][0][row], there["halves"][0][row] * (1 if was else -1))
        assert torch.equal(found["added"]["text_embeds"][row], there["added"]["text_embeds"][row] * (1 if was else -1))
    assert found["halves"][1] is None
    assert found["added"]["scale"] == 0.5 or not any(chosen)
    assert torch.equal(pick(chosen, there["sample"], otherwise["sample"]), found["sample"])


def test_what_does_not_fit_the_other_call_is_kept():
    x = torch.arange(12.0).view(3, 4)
    assert merged([False] * 3, x, x[:2]) is x
    assert merged([False] * 3, (x, x), (x,))[1] is x
    assert merged([False] * 3, x, None) is x


Y = torch.arange(24.0).view(2, 3, 4)
OUTPUTS = {
    "a tensor": Y,
    "a tuple": (Y,),
    "a model output": UNet2DConditionOutput(sample=Y),
    "a dict": {"sample": Y},
    "a list of samples": [Y[0], Y[1]],
    "a tuple with a list of samples": ([Y[0], Y[1]],),
    "nested": ((Y, "cache"), {"more": 1}),
    "beside others": (Y, Y + 1),
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_the_prediction_of_an_output_is_found_and_put_back(kind):
    output = OUTPUTS[kind]
    assert torch.equal(prediction(output), Y)
    changed = with_prediction(output, -Y)
    assert type(changed) is type(output)
    assert torch.equal(prediction(changed), -Y)
    assert_same(with_prediction(changed, Y), output)
    assert torch.equal(prediction(output), Y), "the output itself is left as it was"


def test_an_output_without_a_prediction_has_none():
    assert prediction([torch.zeros(1, 2), torch.zeros(1, 3)]) is None  # samples of several sizes
    for output in (None, (), [], "text", (None, Y)):
        assert prediction(output) is None


@pytest.mark.parametrize(
    ("output", "more"),
    [
        (Y, False),
        ((Y,), False),
        ((Y, Y), True),
        (UNet2DConditionOutput(sample=Y), False),
        ((Y, [Y]), True),
        ((Y, {"sound": Y}), True),
        ((Y, [(Y, Y)]), False),  # a cache: keys and values by layer
        (([Y[0], Y[1]],), False),
        (((Y, Y),), True),
        ((Y, None, "text"), False),
    ],
)
def test_numbers_beside_a_prediction_are_seen(output, more):
    assert puts_out_more(output) is more


@pytest.mark.parametrize("kind", [*OUTPUTS, "named"])
def test_a_copy_has_the_same_numbers_in_memory_of_its_own(kind):
    output = OUTPUTS.get(kind) if kind != "named" else Pair(Y, (Y, None))
    twin = copied(output)
    assert_same(twin, output)
    if kind == "named":
        twin.first.zero_()
        assert torch.equal(output.second[0], Y)
    else:
        prediction(twin).zero_()
        assert torch.equal(prediction(output), torch.arange(24.0).view(2, 3, 4))


def test_calls_are_told_apart_by_what_they_do_not_share():
    x, cond, uncond = torch.randn(3, 2, 4)
    calls = [{"x": x, "text": uncond, "t": torch.tensor(5)}, {"x": x, "text": cond, "t": torch.tensor(5)}]
    told = marks(calls)
    assert [list(mark) for mark in told] == [[".text"], [".text"]]
    again = {"x": x + 1, "text": cond.clone(), "t": torch.tensor(4)}  # a later step's
    assert [carries(mark, again) for mark in told] == [False, True]
    assert not carries(told[1], {"x": x})
    assert not carries(told[1], {"text": cond.double()})
    calls[1]["text"].zero_()  # what is marked has been copied
    assert carries(told[1], again)
    assert marks([{"x": x}, {"x": x.clone()}]) == []
