"""Spreads work over a Ray cluster, or does it here piece by piece. A worker has one pipeline; lost work is repeated."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from diffusers import DiffusionPipeline

from diffusers_guidance.pipelines.support.loading import load

T = TypeVar("T")
R = TypeVar("R")

RETRIES = 3
"""How many times to restart a piece whose worker was lost."""


def spread(
    work: Callable[[T], R], pieces: Sequence[T], *, on_ray: bool = False, resources: dict[str, float] | None = None,
    at_once: int | None = None,
) -> Iterator[tuple[T, R]]:  # fmt: skip
    """(piece, work(piece)) for each piece when it is finished: in order here, in any order on Ray.

    If a worker dies, only its current piece is tried again (at most `RETRIES` times). An exception from `work`
    ends everything.

    Args:
        on_ray: whether to use the cluster of `cluster()`; if not, this process.
        resources: what a piece needs, such as {"num_gpus": 1}. Default: a GPU if the cluster has any, else a CPU.
        at_once: the largest number of pieces at the same time; None for as many as fit on the cluster.
    """
    if not on_ray:
        for piece in pieces:
            yield piece, work(piece)
        return
    import ray

    if resources is None:
        resources = {"num_gpus": 1} if ray.cluster_resources().get("GPU") else {"num_cpus": 1}
    remote = ray.remote(max_retries=RETRIES, **resources)(work)
    left = list(pieces)
    running: dict[Any, T] = {}
    try:
        while left or running:
            while left and len(running) < (at_once or len(pieces)):
                piece = left.pop(0)
                running[remote.remote(piece)] = piece
            done, _ = ray.wait(list(running))
            for reference in done:
                yield running.pop(reference), ray.get(reference)
    finally:
        for reference in running:  # after an interrupt, nothing keeps running on the cluster
            ray.cancel(reference, force=True)


@contextlib.contextmanager
def cluster(address: str | None = None) -> Iterator[None]:
    """A Ray cluster for the block: the one at `address`, the one already in use, or one on this machine.

    Raises:
        ImportError: Ray is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise ImportError(
            "spreading work over a Ray cluster needs it: pip install 'diffusers-guidance[ray]'"
        ) from error
    started = not ray.is_initialized()
    if started:
        ray.init(address=address, include_dashboard=False, log_to_driver=False)
    try:
        yield
    finally:
        if started:
            ray.shutdown()


@functools.lru_cache(maxsize=1)
def pipeline(model: str, device: str | None, dtype: str | None) -> DiffusionPipeline:
    """This process's pipeline: loaded once, and kept until another is requested."""
    return load(model, device=device, dtype=dtype)
