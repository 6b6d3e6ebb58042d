"""Other schedulers for a pipeline: which ones fit, and a fresh one by its class name."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import diffusers


def scheduler_of(own: Any, name: str | None) -> Any:
    """A new scheduler of that class with the pipeline's configuration, since solvers keep history between calls.

    Args:
        own: the pipeline's.
        name: a class of diffusers that can replace `own`; None for its own.

    Raises:
        ValueError: it expects other noise levels or other predictions; the message lists the classes that fit.
    """
    if name is None:
        return copy.deepcopy(own)
    found = fitting(own)
    if name not in found:
        raise ValueError(f"scheduler {name} does not fit {type(own).__name__}; these do: {', '.join(sorted(found))}")
    return found[name].from_config(own.config)


def fitting(own: Any) -> dict[str, Any]:
    """The classes of diffusers that can replace a pipeline's scheduler, by name."""
    found = {cls.__name__: cls for cls in own.compatibles}
    if type(own).__name__.startswith("FlowMatch"):  # diffusers lists nothing as compatible with these
        found |= {each: getattr(diffusers, each) for each in FLOW if hasattr(diffusers, each)}
    return found


@contextmanager
def scheduled(pipe: Any, name: str | None) -> Iterator[None]:
    """Sets a scheduler of that class, and restores the pipeline's own at the end; see `scheduler_of`."""
    own = pipe.scheduler
    pipe.scheduler = scheduler_of(own, name)
    try:
        yield
    finally:
        pipe.scheduler = own


FLOW = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler")
