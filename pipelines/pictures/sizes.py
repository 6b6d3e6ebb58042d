"""The size of pictures: what a call asks for, what the pipeline makes, and whether both agree."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from diffusers import DiffusionPipeline
from PIL import Image

SIDES = ("height", "width")


def check_sides(arguments: Mapping[str, Any]) -> dict[str, int]:
    """The sides that a call's arguments name; a `ValueError` says which one is not a side."""
    asked = {side: arguments[side] for side in SIDES if arguments.get(side) is not None}
    for side, value in asked.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{side}={value!r}: a whole number of pixels from 1 up")
    return asked


def sized(pipe: DiffusionPipeline, arguments: dict[str, Any]) -> dict[str, Any]:
    """A call's arguments; if they name one side, the model's own is added for the other.

    If either is missing, many pipelines of diffusers silently take their own size for both.
    """
    asked = check_sides(arguments)
    if len(asked) != 1:
        return arguments
    (missing,) = set(SIDES) - set(asked)
    parameter = inspect.signature(type(pipe).__call__).parameters.get(missing)
    if parameter is None or isinstance(parameter.default, int):
        return arguments  # each side has its own default
    own = own_size(pipe)
    if own is None:
        (side,) = asked
        raise ValueError(
            f"{side}={asked[side]} without {missing}: {type(pipe).__name__} has no default size; name both"
        )
    return arguments | {missing: own[SIDES.index(missing)]}


def own_size(pipe: Any) -> tuple[int, int] | None:
    """(height, width) in pixels of the pictures that a pipeline makes by default; None if unknown."""
    network = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
    size = getattr(pipe, "default_sample_size", None) or getattr(getattr(network, "config", None), "sample_size", None)
    pair = (size, size) if isinstance(size, int) else tuple(size or ())
    if len(pair) != 2:
        return None
    factor = getattr(pipe, "vae_scale_factor", 1)
    return pair[0] * factor, pair[1] * factor


def check_size(pictures: Sequence[Image.Image], arguments: Mapping[str, Any]) -> None:
    """Refuses pictures of another size than requested: a pipeline may round or ignore the request."""
    for side, wanted in check_sides(arguments).items():
        made = getattr(pictures[0], side)
        if made != wanted:
            raise ValueError(f"{side}={wanted}: the pipeline turns it into {made}; use that, or another size")
