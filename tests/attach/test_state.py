"""Networks that others have put code on: caches and counters, and what looks at its place in the batch.

The truth is throughout the same network, unattached and evaluated in full, whose unused half is overwritten.
"""

import functools
import itertools
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import conformance
import diffusers
import pytest
import torch
from conformance import Until, overwritten, relative
from diffusers.models.attention_processor import AttnProcessor2_0
from pairwise import diagonal, pairwise
from strangers import Loop
from tiny import PIPELINES, Tiny, counting, run

from diffusers_guidance import CFG, Decision, EveryStep, History, Hold, Policy, Step, attach

pytestmark = pytest.mark.slow

SD = PIPELINES["StableDiffusionPipeline"]  # one call of its UNet a step
WAN = PIPELINES["WanPipeline"]  # two calls of its transformer
COG = PIPELINES["CogVideoXPipeline"]  # one call
STEPS = conformance.STEPS
Put = Callable[[Any, int], None]
"""Puts something on a network that is evaluated so many times a step."""


def network(pipe: Any, entry: Tiny) -> Any:
    return getattr(pipe, entry.denoisers[0])


def first(y: Any) -> torch.Tensor:
    return y[0] if isinstance(y, tuple) else y


def expected(entry: Tiny, put: Put, batch: int, after: int = 2, steps: int = STEPS) -> torch.Tensor:
    pipe = entry.build()
    put(network(pipe, entry), 1 if entry.style == "batched" else 2)
    with overwritten(pipe, entry, after, steps):
        return run(pipe, entry, steps, batch)


def found(entry: Tiny, put: Put, batch: int, policy: Any, steps: int = STEPS) -> tuple[torch.Tensor, Any]:
    pipe = entry.build()
    put(network(pipe, entry), 1 if entry.style == "batched" else 2)
    with attach(pipe, CFG(), policy) as handle, counting(network(pipe, entry)) as count:
        result = run(pipe, entry, steps, batch)
    assert handle.report.nfe == count.total
    return result, handle.report


# What keeps state


def counted(net: Any, calls: int) -> None:
    """Every other step reuses what the step before has added, by the number of the call."""
    own, state = net.forward, {"n": 0, "kept": {}}

    def forward(hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        step, which = divmod(state["n"], calls)
        state["n"] += 1
        if step % 2:
            return (hidden_states + state["kept"][which],)
        y = own(hidden_states, *args, **kwargs)
        state["kept"][which] = first(y) - hidden_states
        return y

    net.forward = forward


def wrapped(net: Any, calls: int) -> None:
    """The same in the name of the network's own forward, as decorators leave it."""
    own = net.forward
    counted(net, calls)
    net.forward = functools.wraps(own)(net.forward)


class Box:
    __slots__ = ("kept", "n")

    def __init__(self) -> None:
        self.n, self.kept = 0, {}


def bound(net: Any, calls: int) -> None:
    """A method of an object that has no dict."""

    class Cache(Box):
        __slots__ = ()

        def forward(self, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
            step, which = divmod(self.n, calls)
            self.n += 1
            if step % 2:
                return (hidden_states + self.kept[which],)
            y = own(hidden_states, *args, **kwargs)
            self.kept[which] = first(y) - hidden_states
            return y

    own = net.forward
    net.forward = Cache().forward


def on_itself(net: Any, calls: int) -> None:
    """TeaCache's way: attributes of the network, from a forward that is a method of it."""
    own = net.forward

    def forward(self: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        self.cnt = getattr(self, "cnt", -1) + 1
        step, which = divmod(self.cnt, calls)
        if step % 2:
            return (hidden_states + getattr(self, f"residual_{which}"),)
        y = own(hidden_states, *args, **kwargs)
        setattr(self, f"residual_{which}", first(y) - hidden_states)
        return y

    net.forward = types.MethodType(forward, net)


def by_subclass(net: Any, calls: int) -> None:
    """A class of its own, whose counter is the class's."""

    class Cached(type(net)):  # type: ignore[misc]
        cnt = -1
        kept: dict = {}  # noqa: RUF012

        def forward(self, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
            Cached.cnt += 1
            step, which = divmod(Cached.cnt, calls)
            if step % 2:
                return (hidden_states + self.kept[which],)
            y = super().forward(hidden_states, *args, **kwargs)
            self.kept[which] = first(y) - hidden_states
            return y

    net.__class__ = Cached


COUNTER = 0


def by_a_global(net: Any, calls: int) -> None:
    global COUNTER
    COUNTER, own, kept = 0, net.forward, torch.zeros(())

    def forward(hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        global COUNTER
        COUNTER += 1
        y = first(own(hidden_states, *args, **kwargs))
        return (y * (1 + 0.1 * (COUNTER % 3)) + kept,)

    net.forward = forward


def in_place(net: Any, calls: int) -> None:
    """A running mean in a tensor of its own."""
    own, mean = net.forward, torch.zeros(())

    def forward(*args: Any, **kwargs: Any) -> Any:
        y = first(own(*args, **kwargs))
        mean.mul_(0.5).add_(0.5 * y.mean())
        return (y + mean,)

    net.forward = forward


def by_an_iterator(net: Any, calls: int) -> None:
    own, numbers = net.forward, itertools.count()

    def forward(*args: Any, **kwargs: Any) -> Any:
        return (first(own(*args, **kwargs)) * (1 + 0.1 * (next(numbers) % 3)),)

    net.forward = forward


def attention(net: Any) -> Any:
    return next(m for name, m in net.named_modules() if name.endswith("attn1"))


def block(net: Any, calls: int) -> None:
    """DeepCache's way: a block within the network is skipped at every other step."""
    counted_part(attention(net), calls)


def counted_part(part: Any, calls: int) -> None:
    own, n, kept = part.forward, [0], {}

    def forward(*args: Any, **kwargs: Any) -> Any:
        step, which = divmod(n[0], calls)
        n[0] += 1
        if step % 2 == 0:
            kept[which] = own(*args, **kwargs)
        return kept[which]

    part.forward = forward


class Controller:
    def __init__(self, calls: int):
        self.calls, self.n = calls, 0


class Controlled(AttnProcessor2_0):
    """Prompt-to-Prompt's way: a controller that all processors share counts their calls."""

    def __init__(self, controller: Controller):
        super().__init__()
        self.controller = controller

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.controller.n += 1
        return super().__call__(*args, **kwargs) * (1 + self.controller.n // (8 * self.controller.calls) % 2)


def processors(net: Any, calls: int) -> None:
    net.set_attn_processor(Controlled(Controller(calls)))


def hooked(net: Any, calls: int) -> None:
    """A forward hook that at first only keeps, and later hands out."""
    n, kept = [0], {}

    def hook(module: Any, args: Any, output: Any) -> Any:
        step, which = divmod(n[0], calls)
        n[0] += 1
        if step % 2:
            return kept[which]
        kept[which] = output

    attention(net).register_forward_hook(hook)


def bank(net: Any, calls: int) -> None:
    """A hook with no variables but those of its module."""

    def hook(module: Any, args: Any, output: Any) -> Any:
        module.bank = [*getattr(module, "bank", []), output]
        return output + 0.1 * module.bank[0]

    attention(net).register_forward_hook(hook)


def hooked_in_place(net: Any, calls: int) -> None:
    """A hook that at first only counts, and from the third step on writes."""
    n = [0]

    def hook(module: Any, args: Any, output: Any) -> None:
        n[0] += 1
        if n[0] > 2 * calls:
            first(output).mul_(0.9)

    net.register_forward_hook(hook)


def random(net: Any, calls: int) -> None:
    own = net.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        y = first(own(*args, **kwargs))
        return (y + 0.1 * torch.randn_like(y),)

    net.forward = forward


def late(net: Any, calls: int) -> None:
    """A cache that is on from the third step."""
    own, kept = net.forward, {}

    def forward(hidden_states: Any, timestep: Any, *args: Any, **kwargs: Any) -> Any:
        y = first(own(hidden_states, timestep, *args, **kwargs))
        if float(torch.as_tensor(timestep).max()) < 600:
            kept.setdefault("mean", y.mean())
            y = y + kept["mean"]
        return (y,)

    net.forward = forward


BOTH = [counted, on_itself, by_a_global, in_place, by_an_iterator, block, bank, random]
CASES = [
    *pairwise([SD, WAN], BOTH, [1, 3]),
    (SD, wrapped, 1),
    (SD, bound, 3),
    (SD, by_subclass, 1),
    (SD, processors, 3),
]


def named(each: Any) -> str:
    return getattr(each, "name", None) or getattr(each, "__name__", None) or repr(each)


@pytest.mark.parametrize(("entry", "put", "batch"), CASES, ids=named)
def test_what_keeps_state_is_left_whole(entry, put, batch):
    reference = expected(entry, put, batch)
    result, report = found(entry, put, batch, Until(2))
    assert relative(result, reference) < 1e-5
    assert report.nfe == report.nfe_full  # a trial would have left its trace
    assert "EveryStep()" in report.steps[0].note
    assert ("keeps state" in report.steps[0].note) is (put is not random)


@pytest.mark.parametrize(("entry", "put", "batch"), pairwise([SD, WAN], [hooked, hooked_in_place], [1, 3]), ids=named)
def test_hooks_that_act_late(entry, put, batch):
    """They are found when they first do something; a part of the batch that was on its way is undone."""
    reference = expected(entry, put, batch)
    result, report = found(entry, put, batch, Until(2))
    assert relative(result, reference) < 1e-5
    assert report.nfe - report.nfe_full in (0, batch)
    assert "came in after the first guided step" in report.steps[-1].note


def test_state_that_begins_late():
    reference = expected(SD, late, 2)
    result, report = found(SD, late, 2, Until(2))
    assert relative(result, reference) < 1e-5
    assert "keeps state" in report.steps[-1].note


def test_a_forward_patched_on_the_class():
    """Of the network and of a part of it; gone with the patch."""
    for cls in (diffusers.UNet2DConditionModel, diffusers.models.attention.BasicTransformerBlock):
        own = cls.forward

        def forward(self: Any, *args: Any, own: Any = own, **kwargs: Any) -> Any:
            self.calls = getattr(self, "calls", 0) + 1
            y = own(self, *args, **kwargs)
            return (y[0] / self.calls,) if isinstance(y, tuple) else y / self.calls

        cls.forward = forward
        try:
            reference = expected(SD, lambda net, calls: None, 2)
            result, report = found(SD, lambda net, calls: None, 2, Until(2))
        finally:
            cls.forward = own
        assert relative(result, reference) < 1e-5
        assert report.nfe == report.nfe_full
        assert f"the forward of {cls.__name__} keeps state" in report.steps[0].note
    assert found(SD, lambda net, calls: None, 2, Until(2))[1].saved > 0


def test_a_processor_set_in_mid_run():
    def put(pipe: Any, i: int, timestep: Any, kwargs: dict) -> dict:
        if i == 1:
            pipe.unet.set_attn_processor(Controlled(Controller(1)))
        return {}

    pipe = SD.build()
    with overwritten(pipe, SD, 2):
        reference = run(pipe, SD, STEPS, 2, callback_on_step_end=put)
    pipe = SD.build()
    with attach(pipe, CFG(), Until(2)) as handle:
        assert relative(run(pipe, SD, STEPS, 2, callback_on_step_end=put), reference) < 1e-5
    assert "came in after the first guided step" in handle.report.steps[-1].note


@pytest.mark.parametrize("entry", [SD, WAN], ids=lambda entry: entry.name)
def test_hooks_that_only_look_on_do_not_hinder(entry):
    seen, times = [], {"n": 0}

    def put(net: Any, calls: int) -> None:
        def count(module: Any, args: Any, output: Any) -> None:
            times["n"] += 1
            seen.append(first(output).clone())

        net.register_forward_hook(count)
        net.register_forward_hook(lambda module, args, output: seen.append(len(args)))
        attention(net).register_forward_pre_hook(lambda *_: times.update(n=times["n"] + 1))

    reference = expected(entry, put, 2)
    result, report = found(entry, put, 2, Until(2))
    assert relative(result, reference) < 1e-5
    assert report.nfe == 2 * (2 * 2) + 2 * 2  # and nothing was tried


# Caches that keep nothing but what the network was given and put out


def sample(args: tuple, kwargs: dict) -> torch.Tensor:
    return args[0] if args else kwargs["hidden_states"]


def now(args: tuple, kwargs: dict) -> float:
    return float(torch.as_tensor(args[1] if len(args) > 1 else kwargs["timestep"]).max())


def branch(kwargs: dict) -> float:
    return float(kwargs["encoder_hidden_states"].sum())


def last_output(net: Any, calls: int) -> None:
    """Gives its last output again at low noise, in a tensor of the network's."""
    own, state = net.forward, {"kept": None}

    def forward(*args: Any, **kwargs: Any) -> Any:
        x = sample(args, kwargs)
        if now(args, kwargs) > 600 or state["kept"] is None or len(state["kept"]) != len(x):
            state["kept"] = first(own(*args, **kwargs))
        return (state["kept"],)

    net.forward = forward


def last_output_of_each(net: Any, calls: int) -> None:
    """One for each batch size and prompt, and a copy of it."""
    own, kept = net.forward, {}

    def forward(*args: Any, **kwargs: Any) -> Any:
        x = sample(args, kwargs)
        key = (len(x), branch(kwargs))
        if now(args, kwargs) > 600 or key not in kept:
            kept[key] = first(own(*args, **kwargs))
        return (kept[key].clone(),)

    net.forward = forward


def last_output_in_place(net: Any, calls: int) -> None:
    """In a buffer that it writes to only where it evaluates."""
    own, buffers = net.forward, {}

    def forward(*args: Any, **kwargs: Any) -> Any:
        x = sample(args, kwargs)
        key = (len(x), branch(kwargs))
        if now(args, kwargs) > 600 or key not in buffers:
            y = first(own(*args, **kwargs))
            buffers.setdefault(key, torch.empty_like(y)).copy_(y)
        return (buffers[key],)

    net.forward = forward


def smoothed(net: Any, calls: int) -> None:
    """A mean over the steps, in the buffer that is put out."""
    own, buffers = net.forward, {}

    def forward(*args: Any, **kwargs: Any) -> Any:
        x = sample(args, kwargs)
        y = first(own(*args, **kwargs))
        return (buffers.setdefault((len(x), branch(kwargs)), y.clone()).mul_(0.5).add_(y, alpha=0.5),)

    net.forward = forward


def where_it_is_like_the_last(net: Any, calls: int) -> None:
    """Its last output for a sample like the last, both in buffers."""
    own, kept = net.forward, {}

    def forward(*args: Any, **kwargs: Any) -> Any:
        x = sample(args, kwargs)
        key = (len(x), branch(kwargs))
        if key in kept and relative(x, kept[key][0]) < 2:
            return (kept[key][1].clone(),)
        y = first(own(*args, **kwargs))
        last = kept.setdefault(key, (torch.empty_like(x), torch.empty_like(y)))
        last[0].copy_(x)
        last[1].copy_(y)
        return (y,)

    net.forward = forward


LAST = [last_output, last_output_of_each, last_output_in_place, smoothed, where_it_is_like_the_last]


@pytest.mark.parametrize(
    ("entry", "put", "batch", "policy"), pairwise([SD, WAN], LAST, [1, 3], [Until(2), Until(1)]), ids=named
)
def test_caches_of_the_last_output(entry, put, batch, policy):
    """In a buffer of its own they are like an engine until they give the same again, and are then found at once."""
    policy = Until(2) if put is last_output_in_place else policy
    reference = expected(entry, put, batch, policy.first)
    result, report = found(entry, put, batch, policy)
    assert relative(result, reference) < 1e-5
    assert "EveryStep()" in report.steps[-1].note
    assert report.steps[-1].nfe == report.steps[-1].nfe_full


# Buffers


def outputs_in_buffers(net: Any, calls: int) -> None:
    """As engines put out; one for each prompt, where a pipeline calls for one after another."""
    own, buffers = net.forward, {}

    def forward(*args: Any, **kwargs: Any) -> Any:
        y = first(own(*args, **kwargs))
        return (buffers.setdefault((y.shape, branch(kwargs)), torch.empty_like(y)).copy_(y),)

    net.forward = forward


def outputs_in_one_buffer(net: Any, calls: int) -> None:
    """Room for the largest batch, of which a part is put out."""
    own, room = net.forward, []

    def forward(*args: Any, **kwargs: Any) -> Any:
        y = first(own(*args, **kwargs))
        if not room:
            room.append(torch.zeros(2 * len(y), *y.shape[1:]))
        return (room[0][: len(y)].copy_(y),)

    net.forward = forward


class Graphed:
    """Captures the network for each batch size as CUDA graphs do, whose writes leave no trace at the tensor."""

    def __init__(self, own: Callable):
        self.own, self.captured, self.graphs, self.pool = own, False, {}, None

    def __call__(self, x: Any, timestep: Any = None, encoder_hidden_states: Any = None, **rest: Any) -> Any:
        given = [x, torch.as_tensor(timestep), encoder_hidden_states]
        if x.shape not in self.graphs:
            self.graphs[x.shape] = [each.clone() for each in given], first(self.own(*given, **rest)).clone()
            self.captured, self.pool = True, self.pool or object()
        inputs, output = self.graphs[x.shape]
        for static, each in zip(inputs, given, strict=True):
            static.copy_(each)
        output.data.copy_(first(self.own(*inputs, **rest)))
        return (output,)


def graphed(net: Any, calls: int) -> None:
    net.forward = Graphed(net.forward)


def inputs_in_buffers(net: Any, calls: int) -> None:
    """Room for the largest batch, and half precision for the prompts."""
    own, room, called = net.forward, {}, {"yet": False}

    def forward(*args: Any, **kwargs: Any) -> Any:
        for name, kind in ("sample", torch.float32), ("encoder_hidden_states", torch.bfloat16):
            each = kwargs[name] if name in kwargs else sample(args, kwargs)
            buffer = room.setdefault(name, torch.zeros(9, *each.shape[1:], dtype=kind))
            buffer[: len(each)].copy_(each)
        called["yet"] = True
        return own(*args, **kwargs)

    net.forward = forward


@pytest.mark.parametrize(
    ("entry", "put", "batch"),
    [
        (SD, outputs_in_one_buffer, 1),
        (SD, graphed, 3),
        *pairwise([SD, WAN], [outputs_in_buffers, inputs_in_buffers], [1, 3]),
    ],
    ids=named,
)
def test_buffers_are_no_state(entry, put, batch):
    policies = [Until(2), Hold(2)]
    plain = [found(entry, lambda net, calls: None, batch, policy) for policy in policies]
    pipe = entry.build()
    net = network(pipe, entry)
    put(net, 1)
    # Buffers are made in the first run and there in the next.
    for policy, (result, report) in zip(policies, plain, strict=True):
        with attach(pipe, CFG(), policy) as handle:
            assert torch.equal(run(pipe, entry, STEPS, batch), result)
        again = handle.report
        assert [step.nfe for step in again.steps][1:] == [step.nfe for step in report.steps][1:]
        assert "keeps state" not in str(again)


@pytest.mark.parametrize("inference", [True, False])
def test_buffers_in_inference_mode(inference):
    result, _ = found(SD, lambda net, calls: None, 2, Hold(2))
    with torch.inference_mode(inference):
        again, report = found(SD, graphed, 2, Hold(2))
    assert torch.equal(again, result)
    assert [step.nfe for step in report.steps][1:] == [2, 4, 2]


# Hooks of diffusers


def pyramid(pipe: Any) -> Any:
    ranges = {"spatial_attention_block_skip_range": 2, "spatial_attention_timestep_skip_range": (-1, 1001)}
    return diffusers.PyramidAttentionBroadcastConfig(current_timestep_callback=lambda: 500, **ranges)


def mag(pipe: Any) -> Any:
    ratios = torch.linspace(1.0, 0.9, 8)
    return diffusers.MagCacheConfig(threshold=0.3, num_inference_steps=8, mag_ratios=ratios, retention_ratio=0.1)


def taylor(pipe: Any) -> Any:
    return diffusers.TaylorSeerCacheConfig(
        cache_interval=2,
        disable_cache_before_step=1,
        taylor_factors_dtype=torch.float32,
        cache_identifiers=[r".*attn1"],
    )


@pytest.mark.parametrize(("entry", "config", "batch"), pairwise([WAN, COG], [pyramid, mag, taylor], [1, 2]), ids=named)
def test_caches_that_count_calls(entry, config, batch):
    def put(net: Any, calls: int) -> None:
        try:
            net.enable_cache(config(None))
        except AttributeError:
            pytest.skip(f"this diffusers has no {config.__name__} cache")

    reference = expected(entry, put, batch, 4, 8)
    result, report = found(entry, put, batch, Until(4), 8)
    assert relative(result, reference) < 1e-5
    assert report.nfe == report.nfe_full
    assert "counts the calls" in report.steps[0].note


# What looks at its place in the batch


def style(part: Any, rows: int) -> None:
    """Keys and values are those of each half's first sample."""
    own = part.forward

    def forward(hidden_states: Any, encoder_hidden_states: Any = None, **rest: Any) -> Any:
        halves = hidden_states.chunk(2) if len(hidden_states) > 1 else (hidden_states,)
        shared = torch.cat([half[:1].expand(len(half), -1, -1) for half in halves])
        return own(hidden_states, encoder_hidden_states=shared, **rest)

    part.forward = forward


def second_half(part: Any, rows: int) -> None:
    def hook(module: Any, args: Any, output: Any) -> None:
        output[len(output) // 2 :] *= 0.5

    part.register_forward_hook(hook)


def across(part: Any, rows: int) -> None:
    """The unconditional rows, which come before `rows` others, look at the first of these."""

    class Across(AttnProcessor2_0):
        def __call__(self, attention: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
            y = super().__call__(attention, hidden_states, *args, **kwargs)
            u, c = y[:-rows], y[-rows:]
            return torch.cat([u + 0.5 * c[: len(u)], c])

    part.set_processor(Across())


def same_for_each(part: Any, rows: int) -> None:
    own = part.forward
    part.forward = lambda *args, **kwargs: own(*args, **kwargs) * 0.5


@dataclass(frozen=True)
class OneByOne(Policy):
    """Sample i is guided for i + 1 steps; `last` turns the order of the samples round."""

    last: bool = False

    def plan(self, step: Step, history: History) -> list[Decision]:
        order = range(history.rows)[:: -1 if self.last else 1]
        return [Decision("both" if step.index <= i else "conditional") for i in order]


BATCHES = [(1, Until(2)), (2, OneByOne()), (3, OneByOne(last=True)), (3, Until(2))]
"""A sample alone has nobody to be one by one with."""


@pytest.mark.parametrize(
    ("put", "batch", "policy"),
    [(put, *each) for put, each in diagonal([style, second_half, across, same_for_each], BATCHES, 3)],
    ids=named,
)
def test_attention_that_looks_at_the_batch(put, batch, policy):
    def on(net: Any, calls: int) -> None:
        put(attention(net), batch)

    def overwrite(module: Any, args: Any, output: Any) -> Any:
        u, c = output[0].chunk(2)
        alone = [d.action == "conditional" for d in policy.plan(Step(next(steps), STEPS), History(batch))]
        return (torch.cat([torch.where(torch.tensor(alone).view(-1, 1, 1, 1), c, u), c]),)

    pipe, steps = SD.build(), itertools.count()
    on(pipe.unet, 1)
    pipe.unet.register_forward_hook(overwrite)
    reference = run(pipe, SD, STEPS, batch)
    result, report = found(SD, on, batch, policy)
    assert relative(result, reference) < 1e-5
    if put is same_for_each:
        assert report.steps[-1].nfe == batch


def test_perturbed_attention_is_not_tried():
    entry = PIPELINES["StableDiffusionPAGPipeline"]
    pipe = entry.build()
    with attach(pipe, CFG(), Hold(2)) as handle, counting(pipe.unet) as count:
        run(pipe, entry, STEPS, 2)
    # Its pair of processors tells what goes on without the unconditional branch.
    assert handle.report.nfe == count.total == 20 < handle.report.nfe_full == 24


# Networks of one batch size


class TheEnginesOwn(Exception):
    pass


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("error", [AssertionError("Guard failed"), TheEnginesOwn("profile"), KeyError(1)], ids=repr)
def test_a_network_of_one_batch_size(batch, error):
    pipe = SD.build()
    plain, own = run(pipe, SD, STEPS, batch), pipe.unet.forward

    def forward(sample: Any, *args: Any, **kwargs: Any) -> Any:
        if len(sample) != 2 * batch:
            raise error
        return own(sample, *args, **kwargs)

    pipe.unet.forward = forward
    with attach(pipe, CFG(), Hold(2)) as handle:
        assert torch.equal(run(pipe, SD, STEPS, batch), plain)
    assert "no part of the batch can be evaluated on its own" in handle.report.steps[0].note
    assert handle.report.nfe == handle.report.nfe_full + batch  # one trial


def test_a_network_of_one_batch_size_that_nothing_shows_it():
    """Compiled below its forward: known only when the first part of the batch is asked for."""
    pipe = SD.build()
    with overwritten(pipe, SD, 2):
        reference = run(pipe, SD, STEPS, 2)
    inner = pipe.unet.conv_in._conv_forward
    sizes = []

    def conv(x: Any, *args: Any) -> Any:
        sizes.append(len(x))
        if len(x) != 4:
            raise AssertionError("Guard failed: sample.size()[0] == 4")
        return inner(x, *args)

    pipe.unet.conv_in._conv_forward = conv
    with attach(pipe, CFG(), Until(2)) as handle:
        assert relative(run(pipe, SD, STEPS, 2), reference) < 1e-5
    assert sizes == [4, 4, 2, 4, 4]
    assert "own (Guard failed: sample.size()[0] == 4)" in handle.report.steps[-1].note


@pytest.mark.parametrize("names", [True, False])
def test_out_of_memory_is_no_misfit(names):
    pipe = SD.build()
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    inner = pipe.unet.conv_in._conv_forward

    def conv(x: Any, *args: Any) -> Any:
        if len(x) != 4:
            raise error
        return inner(x, *args)

    pipe.unet.conv_in._conv_forward = conv
    if names:  # then a part is tried at once
        same_for_each(attention(pipe.unet), 2)
    with attach(pipe, CFG(), Until(2)), pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
        run(pipe, SD, STEPS, 2)


def test_rows_that_come_back_for_none_that_was_sent():
    pipe = SD.build()
    with overwritten(pipe, SD, 2):
        reference = run(pipe, SD, STEPS)
    conv = pipe.unet.conv_out._conv_forward
    pipe.unet.conv_out._conv_forward = lambda x, *args: conv(torch.cat([x] * (2 // len(x))), *args)
    with attach(pipe, CFG(), Until(2)) as handle:
        assert relative(run(pipe, SD, STEPS), reference) < 1e-5
    assert "1 rows were sent, and 2 came back" in handle.report.steps[-1].note


def test_a_failing_part_leaves_no_trace():
    """What was counted on the way to the failure is taken back."""

    def put(net: Any, calls: int) -> None:
        own, state = attention(net).forward, {"parts": 0}

        def forward(x: Any, *args: Any, **kwargs: Any) -> Any:
            if len(x) != 4:
                state["parts"] += 1
                raise ValueError("halves")
            return own(x, *args, **kwargs) * (1 + state["parts"])

        attention(net).forward = forward

    reference = expected(SD, put, 2)
    result, report = found(SD, put, 2, Until(2))
    assert relative(result, reference) < 1e-5
    assert "on its own" in report.steps[0].note


def test_a_controlnet_that_keeps_state():
    """It works ahead of its network, and is asked for everything, as the network is not."""
    entry = PIPELINES["StableDiffusionControlNetPipeline"]

    def go(policy: Any = None) -> Any:
        pipe = entry.build()
        own, n = pipe.controlnet.forward, [0]

        def forward(*args: Any, **kwargs: Any) -> Any:
            n[0] += 1
            down, middle = own(*args, **kwargs)
            return [each / n[0] for each in down], middle / n[0]

        pipe.controlnet.forward = forward
        if policy is None:
            with overwritten(pipe, entry, 2):
                return run(pipe, entry, STEPS, 2)
        with attach(pipe, CFG(), policy) as handle, counting(pipe.controlnet) as count:
            result = run(pipe, entry, STEPS, 2)
        return result, handle.report, count.rows

    result, report, rows = go(Until(2))
    assert relative(result, go()) < 1e-5
    assert rows == [4] * STEPS
    assert report.saved > 0


# A timestep that comes first


class TimestepFirst(Loop):
    """Calls its network with a tensor of one entry before the samples."""

    def __call__(self, guidance_scale: float = 4.0) -> torch.Tensor:
        x, context = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), self.context
        self.scheduler.set_timesteps(STEPS)
        for t in self.scheduler.timesteps:
            given = {"timestep": t[None], "sample": torch.cat([x, x]), "encoder_hidden_states": context}
            uncond, cond = self.unet(**given, return_dict=False)[0].chunk(2)
            x = self.scheduler.step(uncond + guidance_scale * (cond - uncond), t, x, return_dict=False)[0]
        return x


def test_a_timestep_of_one_entry_that_comes_first():
    tiny = SD.build()
    pipe = TimestepFirst(tiny.unet, tiny.scheduler)
    width = tiny.unet.config.cross_attention_dim
    pipe.context = torch.randn(2, 5, width, generator=torch.Generator().manual_seed(1))
    with overwritten(pipe, SD, 2):
        reference = pipe()
    with attach(pipe, CFG(), Until(2)) as handle:
        assert relative(pipe(), reference) < 1e-5
    assert handle.report.nfe == 6
    with attach(pipe, CFG(), EveryStep()) as handle:
        pipe()
    assert handle.report.nfe == 8
