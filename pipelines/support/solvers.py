"""Other schedulers for a pipeline: which fit it, and a fresh one by its class's name."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import diffusers


def scheduler_of(own: Any, name: str | None) -> Any:
    """A fresh scheduler of that class, configured as the pipeline's own: solvers carry history between calls.

    Args:
        own: the pipeline's.
        name: a class of diffusers that `own` can be exchanged for; None for its own.

    Raises:
        ValueError: it cannot, since it expects other noise levels or other predictions; the message lists what can.
    """
    if name is None:
        return copy.deepcopy(own)
    fitting = {cls.__name__: cls for cls in own.compatibles}
    if type(own).__name__.startswith("FlowMatch"):  # diffusers lists nothing as compatible with these
        fitting |= {each: getattr(diffusers, each) for each in FLOW if hasattr(diffusers, each)}
    if name not in fitting:
        raise ValueError(f"scheduler {name}: does not fit {type(own).__name__}; here fit {', '.join(sorted(fitting))}")
    return fitting[name].from_config(own.config)


@contextmanager
def scheduled(pipe: Any, name: str | None) -> Iterator[None]:
    """Puts a scheduler of that class in place, and the pipeline's own back at the end; see `scheduler_of`."""
    own = pipe.scheduler
    pipe.scheduler = scheduler_of(own, name)
    try:
        yield
    finally:
        pipe.scheduler = own


FLOW = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler")
