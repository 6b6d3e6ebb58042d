"""A run's place in its scheduler's table of steps, and with it the space of the coming prediction."""

from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffusers_guidance.errors import UnsupportedPipeline, UnsupportedScheduler
from diffusers_guidance.pipelines.attach.schedulers import Starts, spaces, starts_by_count
from diffusers_guidance.policies import Policy
from diffusers_guidance.rules import Rule
from diffusers_guidance.spaces import Space, Spaces
from diffusers_guidance.steps import Step

_HALVES = (torch.float16, torch.bfloat16)
_ROUNDINGS = (torch.float64, torch.float32, *_HALVES)
"""The dtypes that timesteps may have been rounded to, the finest first."""


class Table(NamedTuple):
    """A scheduler's timesteps, read once, and what its predictions mean at each."""

    scheduler: Any = None
    timesteps: Any = None
    values: tuple[float, ...] = ()
    spaces: Spaces = Spaces()
    """Empty if they are unknown."""
    starts: Starts | None = None
    """Whether its coming step is the first stage of one, if it does not count by the table."""
    error: UnsupportedScheduler | None = None
    """Why they are."""

    @classmethod
    def of(cls, scheduler: Any) -> "Table":
        values = tuple(float(t) for t in scheduler.timesteps.tolist())
        try:
            return cls(scheduler, scheduler.timesteps, values, Spaces.of(spaces(scheduler)), starts_by_count(scheduler))
        except UnsupportedScheduler as error:
            return cls(scheduler, scheduler.timesteps, values, error=error)

    def place(self, timestep: Any, before: int) -> int:
        """Where this timestep is: at the first equal entry after the one `before`, else at the first of all, else -1.

        A loop may have rounded its timesteps to the dtype of its sample.
        """
        if isinstance(timestep, Tensor) and (place := self._place_of(timestep)) is not None:
            return place
        given = torch.as_tensor([] if timestep is None else timestep)
        values = set(given.flatten().tolist())
        if len(values) != 1:  # a batch may have one each, but they must be equal
            return -1
        (value,), dtype = values, given.dtype
        exact = torch.tensor(self.values, dtype=torch.float64)
        roundings = (dtype,) if dtype in _HALVES else _ROUNDINGS if dtype.is_floating_point else _ROUNDINGS[:1]
        tables = [exact.to(each).tolist() for each in roundings]
        found = ((table, start) for start in (before + 1, 0) for table in tables if value in table[start:])
        return next((table.index(value, start) for table, start in found), -1)

    def _place_of(self, timestep: Tensor) -> int | None:
        """The place of a view of the table, as most loops have it; its value stays on its device."""
        table = self.timesteps
        if not isinstance(table, Tensor) or (any(timestep.stride()) and timestep.numel() != 1):
            return None
        if timestep.dtype != table.dtype or timestep.untyped_storage().data_ptr() != table.untyped_storage().data_ptr():
            return None
        place, between = divmod(int(timestep.storage_offset()) - int(table.storage_offset()), table.stride(0) or 1)
        return place if between == 0 and 0 <= place < len(self.values) else None


class Clock:
    """Follows one run through one scheduler's timesteps.

    Args:
        steps: how many a scheduler made that this one has replaced.
    """

    def __init__(self, steps: int = 0) -> None:
        self.error: UnsupportedScheduler | None = None
        self.space: Space | None = None
        self.timestep: float | None = None
        self.begin = 0
        """The place of the run's first step in the table: image to image begins later."""
        self.stride = 1
        """How many entries of the table the loop advances by: some take every other one."""
        self.went_back = False
        """Whether the last step did not advance beyond the one before it."""
        self.steps = self.before = steps
        """Evaluations made so far; and those that another scheduler had made."""
        self.loops = 0
        """Loops begun."""
        self.begins_anew = False
        """Whether the run itself has set its scheduler's timesteps since the last step."""
        self._table = Table()
        self._index = -1

    @property
    def count(self) -> int:
        """Evaluations of this run, by the scheduler's table; 0 before its first step."""
        return self.before - (self.begin - len(self._table.values)) // self.stride if self._table.values else 0

    def begin_anew(self) -> None:
        """Notes that the run itself has set its scheduler's timesteps."""
        self.begins_anew = True

    def tick(self, scheduler: Any, timestep: Any) -> None:
        """Sets `space` and `timestep`; called before every `scheduler.step`."""
        if not self._goes_on(scheduler):
            self._begin(scheduler)
        table, before = self._table, self._index
        index = getattr(scheduler, "step_index", None)
        self._index = table.place(timestep, before) if index is None else int(index)
        known = 0 <= self._index < len(table.values)
        self.went_back = known and self._index <= before
        self.timestep = table.values[self._index] if known else None
        self.space = self._as_counted(table.spaces[self._index]) if known and table.spaces else None
        if self.steps == self.before:
            self.begin = max(self._index, 0)
        elif known and before >= 0 and self._index - before > self.stride == 1 and self.steps == self.before + 1:
            self.stride = self._index - before
        self.steps += 1

    def expects(self, scheduler: Any, timestep: Any) -> bool:
        """Whether this timestep is the next one of the `scheduler`'s table; before the first step, any of them."""
        table = getattr(scheduler, "timesteps", None)
        if table is None or timestep is None:
            return False
        values, at = torch.as_tensor(table).flatten().tolist(), torch.as_tensor(timestep).flatten().tolist()
        following = self._index + self.stride if self._index >= 0 else 0
        return at[0] in (values[following : following + 1] if following else values)

    def timesteps(self, begin: int, count: int) -> list[float]:
        """`count` of the table's, as the loop takes them."""
        return [*self._table.values[begin :: self.stride][:count]]

    def step(self, index: int, count: int, before: int, coming: bool = False, **known: Any) -> Step:
        """The current evaluation, as the `index`th of `count`; or the `coming` one, before it is made.

        Args:
            before: evaluations of the run before the first that this clock has seen.
            known: what else is known of it.
        """
        space, count = self.next if coming else self.space, max(count, index + 1)
        timestep = None if coming else self.timestep
        if space is not None:
            known = {"space": space, "table": self.table(count, before), "velocity": space.velocity} | known
        return Step(index, count, timestep, **known)

    def denoising(self, name: str, rule: Rule, policy: Policy, sample: Tensor | None, cond: Tensor) -> Space | None:
        """The step's space, if the sample can denoise the prediction; None if not, and rule and policy do not need it.

        Raises:
            UnsupportedScheduler, UnsupportedPipeline: rule or policy needs it; the message says why there is none.
        """
        if sample is not None and sample.shape == cond.shape and self.space is not None:
            return self.space
        if rule.needs_denoised or policy.needs_denoised:
            if self.error is not None:
                raise self.error
            of = "no latents" if sample is None else f"a sample of shape {tuple(sample.shape)}"
            raise UnsupportedPipeline(
                f"{name} steps {of} at timestep {self.timestep} with a prediction of shape {tuple(cond.shape)}: no "
                f"denoised prediction can be formed for {rule} and {policy}; choose ones that need none, such as CFG "
                "and Hold"
            )
        return None

    def table(self, count: int, before: int = 0) -> Spaces:
        """The spaces of a run of `count` evaluations; empty unless all are known.

        The run's first is `before` entries before the first that this clock has seen.
        """
        return _taken(self._table.spaces, self.begin - before * self.stride, self.stride, count)

    @property
    def next(self) -> Space | None:
        """The space of the evaluation after the last one."""
        known = self._table.spaces
        return known[self._index + self.stride] if 0 <= self._index < len(known) - self.stride else None

    @property
    def ran_out(self) -> bool:
        """Whether the coming evaluation belongs to another loop: the table has ended, or is new."""
        table = self._table
        if table.scheduler is None:
            return False
        return not self._goes_on(table.scheduler) or 0 <= len(table.values) - self.stride <= self._index

    def _goes_on(self, scheduler: Any) -> bool:
        """Whether the loop's table is still the scheduler's; another run may have made an equal one."""
        made, table = scheduler.timesteps, self._table
        if made is table.timesteps:
            return True
        is_over = self.begins_anew or self._index + 1 >= len(table.values)
        if is_over or scheduler is not table.scheduler or len(made) != len(table.values):
            return False
        if tuple(float(t) for t in made.tolist()) != table.values:
            return False
        self._table = table._replace(timesteps=made)
        return True

    def _begin(self, scheduler: Any) -> None:
        """Begins a loop over a table that has not been read yet."""
        if self._table.scheduler is not None:  # after another one
            self.steps = self.before = 0
        self.loops += 1
        self.begins_anew = False
        self._table, self._index, self.stride = Table.of(scheduler), -1, 1
        self.error = self._table.error or self.error

    def _as_counted(self, space: Space) -> Space | None:
        """The table's space by the scheduler's own count of stages; None if it has another noise level by that."""
        scheduler, by_count = self._table.scheduler, self._table.starts
        starts = space.new_step if by_count is None else by_count(self._index)
        if starts == space.new_step:
            return space
        if not hasattr(scheduler, "state_in_first_order"):
            return replace(space, new_step=starts)
        self.error = UnsupportedScheduler(
            f"this run of {type(scheduler).__name__} began between the two stages of a step, at timestep "
            f"{self.timestep:g}, so the meaning of its predictions is unknown: begin at an even place in its timesteps"
        )
        return None


@lru_cache(maxsize=64)
def _taken(spaces: Spaces, begin: int, stride: int, count: int) -> Spaces:
    """`count` of a table's, every `stride`th from the place `begin`; empty unless there are as many."""
    found = spaces[begin::stride][:count] if begin >= 0 else ()
    return Spaces(found if len(found) == count else ())
