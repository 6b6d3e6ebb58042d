"""A network's output: the prediction in it, and what stands beside it."""

import itertools
from typing import Any

import torch
from torch import Tensor

from diffusers_guidance.pipelines.attach.rows import leads
from diffusers_guidance.pipelines.attach.trees import like
from diffusers_guidance.steps import pick


def prediction(output: Any) -> Tensor | None:
    """The first tensor of a denoiser's output; a list with one tensor per sample comes as a batch."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, dict):
        output = tuple(output.values())
    if isinstance(output, list) and output and all(isinstance(v, Tensor) for v in output):
        return torch.stack(output) if len({v.shape for v in output}) == 1 else None
    if isinstance(output, list | tuple) and output:
        return prediction(output[0])
    return None


def with_prediction(output: Any, value: Tensor) -> Any:
    """`output` again, with `value` as its first tensor."""
    if isinstance(output, Tensor):
        return value
    if isinstance(output, dict):
        first, *others = output.items()
        return like(output, {first[0]: with_prediction(first[1], value), **dict(others)})
    if isinstance(output, list) and output and all(isinstance(v, Tensor) for v in output):
        return list(value.unbind(0))
    return like(output, [with_prediction(output[0], value), *output[1:]])


def puts_out_more(output: Any) -> bool:
    """Whether a denoiser's output holds another tensor of numbers beside its prediction.

    A cache does not count: it is nested deeper than another prediction would be.
    """
    parts = tuple(output.values()) if isinstance(output, dict) else output
    if isinstance(parts, tuple | list) and len(parts) == 1 and isinstance(parts[0], tuple | list | dict):
        return puts_out_more(parts[0])
    beside = parts[1:] if isinstance(parts, tuple) else ()
    shallow = [each.values() if isinstance(each, dict) else each for each in beside if isinstance(each, list | dict)]
    return any(isinstance(each, Tensor) for each in (*beside, *itertools.chain(*shallow)))


def merged(chosen: list[bool], there: Any, otherwise: Any) -> Any:
    """Row by row of two outputs of one kind: `there` where chosen, else `otherwise`."""
    if isinstance(there, Tensor):
        fits = isinstance(otherwise, Tensor) and there.shape == otherwise.shape and leads(there, len(chosen))
        return pick(chosen, there, otherwise) if fits else there
    if isinstance(there, dict) and isinstance(otherwise, dict):
        return like(there, {key: merged(chosen, value, otherwise.get(key)) for key, value in there.items()})
    if isinstance(there, tuple) and isinstance(otherwise, tuple) and len(there) == len(otherwise):
        return like(there, [merged(chosen, a, b) for a, b in zip(there, otherwise, strict=True)])
    if isinstance(there, list) and isinstance(otherwise, list) and len(there) == len(otherwise) == len(chosen):
        return [a if was else b for was, a, b in zip(chosen, there, otherwise, strict=True)]
    return there
