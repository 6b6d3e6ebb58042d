"""Triton's interpreter with programs that take turns, as those of one launch do that wait for one another.

The interpreter runs a launch's programs one after the other, so one that waits for a later one would wait for ever.
Here each is a greenlet, which runs up to its next atomic operation; a random one goes on from there.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import greenlet
import pytest
from triton.runtime import interpreter

from diffusers_guidance.kernels import launch


class TakingTurns(interpreter.GridExecutor):
    """Runs a grid on tensors of the CPU."""

    draw = random.Random(0)

    def __call__(self, *given: Any, **options: Any) -> None:
        names = interpreter.inspect.getfullargspec(self.fn).args
        options = {name: value for name, value in options.items() if name in names}
        arguments = interpreter.inspect.getcallargs(self.fn, *given, **options)
        arguments = {
            name: value if name in self.constexprs else interpreter._implicit_cvt(value)
            for name, value in arguments.items()
        }
        grid = (*self.grid, 1, 1)[:3]
        interpreter.interpreter_builder.set_grid_dim(*grid)
        programs = [
            (greenlet.greenlet(lambda: self.fn(**arguments)), (x, y, z))
            for x in range(grid[0])
            for y in range(grid[1])
            for z in range(grid[2])
        ]
        patched = interpreter._patch_lang(self.fn)
        try:
            while programs:
                at = self.draw.randrange(len(programs))
                program, place = programs[at]
                interpreter.interpreter_builder.set_grid_idx(*place)
                program.switch()
                if program.dead:
                    programs.pop(at)
        finally:
            patched.restore()


@contextmanager
def taking_turns(seed: int, together: int = 24) -> Iterator[None]:
    """Inside the block, up to `together` programs of a launch are interpreted at once."""
    builder = interpreter.InterpreterBuilder
    atomic = builder.create_atomic_rmw

    def one_turn(self: Any, *args: Any) -> Any:
        found = atomic(self, *args)
        if (outside := greenlet.getcurrent().parent) is not None:
            outside.switch()
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TakingTurns, "draw", random.Random(seed))
        patch.setattr(interpreter, "GridExecutor", TakingTurns)
        patch.setattr(builder, "create_atomic_rmw", one_turn)
        patch.setattr(launch, "_together", lambda device: together)
        yield
