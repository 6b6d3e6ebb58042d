"""Calls that return before they have done their work: what they return does it under a watch of its own.

A generator, a coroutine, an asynchronous generator or a function stands for the work to come, by itself or within a
tuple, list or dict. `deferred` puts another of its kind in its place, which steps `within` a context for each stretch
of work, and tells `finish` when all is done.
"""

import functools
import inspect
import types
from collections.abc import AsyncGenerator, Callable, Generator, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

Within = Callable[[], AbstractContextManager[None]]
Finish = Callable[[Any], None]


def deferred(
    made: Any, within: Within, beside: Within, finish: Finish, again: Callable[[Callable[[], Any]], Any]
) -> Any:
    """What stands for `made`, if its work is still to come; else None.

    Args:
        within: makes the context of each stretch of work.
        beside: makes the context of the time in which a coroutine waits.
        finish: called with what the work came to, once it is done.
        again: makes the work of a function that was returned, each time it is called.
    """
    if inspect.isasyncgen(made):
        return _asynchronous(made, within, beside, finish)
    if inspect.iscoroutine(made):
        return _awaited(made, within, beside, finish)
    if isinstance(made, Iterator):
        return _stretches(made if inspect.isgenerator(made) else _generator(made), within, nullcontext, finish)
    if isinstance(made, types.FunctionType | types.MethodType | functools.partial):
        return lambda *args, **kwargs: again(lambda: made(*args, **kwargs))
    if type(made) in (tuple, list):
        parts = [deferred(each, within, beside, finish, again) for each in made]
        if any(part is not None for part in parts):
            return type(made)(old if new is None else new for old, new in zip(made, parts, strict=True))
    if type(made) is dict:
        later = {key: deferred(each, within, beside, finish, again) for key, each in made.items()}
        if any(each is not None for each in later.values()):
            return made | {key: each for key, each in later.items() if each is not None}
    return None


def _generator(made: Iterator) -> Generator:
    yield from made


def _stretches(made: Any, within: Within, beside: Within, finish: Finish) -> Generator[Any, Any, Any]:
    """Drives a generator or a coroutine from one `yield` to the next, as `yield from` does."""
    resume, value = made.send, None
    while True:
        with within():
            try:
                item = resume(value)
            except StopIteration as end:
                result = end.value
                break
        try:
            with beside():
                value = yield item
            resume = made.send
        except GeneratorExit:
            made.close()
            raise
        except BaseException as error:
            resume, value = made.throw, error
    finish(result)
    return result


async def _awaited(made: Any, within: Within, beside: Within, finish: Finish) -> Any:
    return await types.coroutine(_stretches)(made, within, beside, finish)


async def _asynchronous(made: Any, within: Within, beside: Within, finish: Finish) -> AsyncGenerator:
    try:
        while True:
            try:
                item = await _awaited(made.__anext__().__await__(), within, beside, lambda _: None)
            except StopAsyncIteration:
                break
            yield item
    finally:
        await made.aclose()
    finish(None)
