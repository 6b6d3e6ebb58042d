"""A denoiser's calls without a pipeline: what a plan evaluates of them, and what the pipeline is given for the rest."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from diffusers_guidance.engine import Engine
from diffusers_guidance.pipelines.attach.denoiser import Denoiser
from diffusers_guidance.pipelines.attach.formula import Formula
from diffusers_guidance.pipelines.attach.layout import Layout, View
from diffusers_guidance.policies import Policy
from diffusers_guidance.report import Recording, Report
from diffusers_guidance.rules import CFG
from diffusers_guidance.steps import Decision, History

ROWS = 3
LAYOUTS = {"[uncond, cond]": (True, 1), "[cond, uncond]": (True, 0), "cond then uncond": (False, 0)}
LAYOUTS |= {"uncond then cond": (False, 1)}


@dataclass(frozen=True)
class Given(Policy):
    """The same actions at every step; by default it evaluates all."""

    actions: tuple[str, ...] = ()

    def plan(self, step, history):
        return [Decision(action) for action in self.actions or ["both"] * history.rows]


def met(layout, actions):
    """(denoiser, how many rows each call of a step evaluated, cond, uncond, what the pipeline was given for both)."""
    batched, cond_index = LAYOUTS[layout]
    policy, called = Given(actions), []
    denoiser = Denoiser("net", nn.Identity(), policy)  # others' code on it would be tried first
    x, c, u = torch.randn(3, ROWS, 4)
    parts = [u, c] if cond_index else [c, u]

    def net(sample, context):
        called.append(len(sample))
        return sample + context

    def step():
        called.clear()
        denoiser.begin_step(None)
        if batched:
            return denoiser.run(net, (torch.cat([x, x]), torch.cat(parts)), {}).chunk(2)
        return [denoiser.run(net, (x, part), {}) for part in parts]

    step()
    denoiser.know(
        Formula(
            layout=Layout(batched=batched, branches=2, cond_index=cond_index, view=View((4,)), rows=ROWS),
            anchor="u", upcast=False, finish="", scale=None, dtype=torch.float32,
        )
    )  # fmt: skip
    denoiser.find_out(cuts=True)
    engine = Engine(CFG(), policy, History(ROWS), Recording(Report("", "", "")))
    denoiser.is_guided_by(engine, denoiser.step(None))
    given = step()
    return denoiser, called, x + c, x + u, (given[cond_index], given[1 - cond_index])


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=8, deadline=None)  # all plans of three samples
@given(actions=st.tuples(*[st.sampled_from(["both", "conditional"])] * ROWS))
def test_what_is_planned_is_evaluated_and_the_rest_is_conditional(layout, actions):
    denoiser, called, cond, uncond, found = met(layout, actions)
    both = torch.tensor([action == "both" for action in actions])
    assert sum(called) == denoiser.now.nfe == ROWS + int(both.sum())
    assert denoiser.now.nfe_full == 2 * ROWS
    assert torch.equal(found[0], cond)
    assert torch.equal(found[1], torch.where(both[:, None], uncond, cond))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_another_batch_is_another_value(layout):
    denoiser, *_ = met(layout, ("conditional",) * ROWS)
    assert denoiser.now.nfe < denoiser.now.nfe_full
    denoiser.forget()
    assert (denoiser.batch, denoiser.formula, denoiser.engine, denoiser.skips) == (None, None, None, False)
    assert denoiser.now.nfe == ROWS  # the coming step's evaluations stay
