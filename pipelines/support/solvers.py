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
    fitting = {cls.__name__: cls for cls in own.compatibles}
    if type(own).__name__.startswith("FlowMatch"):  # diffusers lists nothing as compatible with these
        fitting |= {each: getattr(diffusers, each) for each in FLOW if hasattr(diffusers, each)}
    if name not in fitting:
        raise ValueError(f"scheduler {name} does not fit {type(own).__name__}; these do: {', '.join(sorted(fitting))}")
    return fitting[name].from_config(own.config)


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
