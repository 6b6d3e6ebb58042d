"""Loading: pipelines and networks as diffusers and transformers load them, but never with weights drawn at random."""

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from threading import RLock, get_ident
from typing import Any

from diffusers import ModelMixin

_one_at_a_time = RLock()


class MissingWeights(ValueError):
    """Not all weights of a network are in its files."""


def load_whole(cls: Any, source: Any, **options: Any) -> Any:
    """`cls.from_pretrained(source, **options)`, of a pipeline or a network.

    Raises:
        MissingWeights: what diffusers and transformers only warn of.
    """
    with _watched() as missing:
        loaded = cls.from_pretrained(source, **options)
    for name, weights in missing.items():
        more = f" and {len(weights) - 1} more" if len(weights) > 1 else ""
        raise MissingWeights(
            f"{str(source)!r} does not have all weights of its {name}: {weights[0]}{more} would be random numbers. "
            "Use a copy that has them under the names the installed transformers and diffusers read, or the versions "
            "of these that it was saved with"
        )
    return loaded


@contextmanager
def _watched() -> Iterator[dict[str, list[str]]]:
    """By class, the weights that networks loaded inside the block, in this thread, do not find in their files."""
    from transformers import PreTrainedModel

    missing: dict[str, list[str]] = {}
    thread = get_ident()

    def tell(cls: type, names: list[str]) -> None:
        if names and get_ident() == thread:
            missing[cls.__name__] = sorted(names)

    with _one_at_a_time, ExitStack() as stack:
        for base in (PreTrainedModel, ModelMixin):
            own = base.__dict__["from_pretrained"]
            stack.callback(setattr, base, "from_pretrained", own)
            base.from_pretrained = classmethod(_telling(own.__func__, tell))
        yield missing


def _telling(load: Callable, tell: Callable[[type, list[str]], None]) -> Callable:
    """A `from_pretrained` that tells of missing weights."""

    @functools.wraps(load)
    def from_pretrained(cls: type, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        loaded, info = load(cls, *args, output_loading_info=True, **kwargs)
        tell(cls, list(info["missing_keys"]))
        return (loaded, info) if output_loading_info else loaded

    return from_pretrained
