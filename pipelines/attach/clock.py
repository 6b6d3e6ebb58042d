"""A run's place in its scheduler's table of steps, and with it the space of the coming prediction."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from diffusers_guidance.errors import UnsupportedPipeline, UnsupportedScheduler
from diffusers_guidance.pipelines.attach.schedulers import spaces, starts_step
from diffusers_guidance.policies import Policy
from diffusers_guidance.rules import Rule
from diffusers_guidance.spaces import Space
from diffusers_guidance.steps import Step

_HALVES = (torch.float16, torch.bfloat16)
_ROUNDINGS = (torch.float32, *_HALVES)
"""The dtypes that timesteps may have been rounded to, the finest first."""


class Clock:
    """Follows one run through one scheduler's timesteps; reads the table once, searches it only if it must.

    `steps` is how many a replaced scheduler made before this one.
    """

    def __init__(self, steps: int = 0) -> None:
        self.error: UnsupportedScheduler | None = None
        self.space: Space | None = None
        self.timestep: float | None = None
        self.count = 0
        """Evaluations of this run, by the scheduler's table."""
        self.begin = 0
        """The place of the run's first step in the table: image to image begins later."""
        self.went_back = False
        """Whether the last step did not advance beyond the one before it."""
        self.begins_anew = False
        """Whether the run itself has set its scheduler's timesteps since the last step."""
        self._scheduler: Any = None
        self._timesteps: Any = None
        self._values: list[float] = []
        self._table: tuple[Space, ...] | None = None
        self._index = -1
        self.steps = self.before = steps
        """Evaluations made so far; and those that another scheduler had made."""
        self.loops = 0
        """Loops begun."""
        self.stride = 1
        """How many entries of the table the loop advances by: some take every other one."""

    def begin_anew(self) -> None:
        """Takes note that the run itself has set its scheduler's timesteps."""
        self.begins_anew = True

    def tick(self, scheduler: Any, timestep: Any) -> None:
        """Sets `space` and `timestep`; called before every `scheduler.step`."""
        if not self._goes_on(scheduler):
            self._read(scheduler)
        before = self._index
        index = getattr(scheduler, "step_index", None)
        self._index = self._search(timestep) if index is None else int(index)
        known = 0 <= self._index < len(self._values)
        self.went_back = known and self._index <= before
        self.timestep = self._values[self._index] if known else None
        self.space = self._table[self._index] if known and self._table is not None else None
        if self.space is not None and (starts := starts_step(scheduler, self._index)) != self.space.new_step:
            self.space = self._as_counted(scheduler, self.space, starts)
        if self.count == 0:
            self.begin = max(self._index, 0)
            self.count = self.steps + len(self._values) - self.begin
        elif known and before >= 0 and self._index - before > self.stride == 1 and self.steps == self.before + 1:
            self.stride = self._index - before
            self.count = self.before - (self.begin - len(self._values)) // self.stride
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
        return self._values[begin :: self.stride][:count]

    def step(self, index: int, count: int, before: int, coming: bool = False) -> Step:
        """The current evaluation, as the `index`th of `count`; or the `coming` one, before it is made.

        Args:
            before: evaluations of the run before the first that this clock has seen.
        """
        space, count = self.next if coming else self.space, max(count, index + 1)
        timestep = None if coming else self.timestep
        if space is None:
            return Step(index, count, timestep)
        return Step(index, count, timestep, space, table=self.table(count, before), velocity=space.velocity)

    def denoising(self, name: str, rule: Rule, policy: Policy, sample: Tensor | None, cond: Tensor) -> Space | None:
        """The step's space, if the sample can denoise the prediction; None if not, and rule and policy do not need it.

        Raises:
            UnsupportedScheduler, UnsupportedPipeline: they need it; says why there is none.
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

    def table(self, count: int, before: int = 0) -> tuple[Space, ...]:
        """The spaces of a run of `count` evaluations; empty unless all are known.

        The run's first is `before` entries before the first that this clock has seen.
        """
        begin = self.begin - before * self.stride
        found = self._table[begin :: self.stride][:count] if self._table is not None and begin >= 0 else ()
        return found if len(found) == count else ()

    @property
    def next(self) -> Space | None:
        """The space of the evaluation after the last one."""
        if self._table is None or not 0 <= self._index < len(self._table) - self.stride:
            return None
        return self._table[self._index + self.stride]

    @property
    def ran_out(self) -> bool:
        """Whether the coming evaluation belongs to another loop: the table has ended, or is new."""
        if self._scheduler is None:
            return False
        return not self._goes_on(self._scheduler) or 0 <= len(self._values) - self.stride <= self._index

    def _goes_on(self, scheduler: Any) -> bool:
        """Whether the loop's table is still the scheduler's; another run may have made an equal one."""
        made = scheduler.timesteps
        if made is self._timesteps:
            return True
        before = self._timesteps
        if self.begins_anew or before is None or scheduler is not self._scheduler or len(made) != len(before):
            return False
        if self._index + 1 >= len(self._values) or [float(t) for t in made.tolist()] != self._values:
            return False
        self._timesteps = made
        return True

    def _as_counted(self, scheduler: Any, space: Space, starts: bool) -> Space | None:
        """A space if the scheduler's own count of stages differs from the table's."""
        if not hasattr(scheduler, "state_in_first_order"):
            return replace(space, new_step=starts)
        self.error = UnsupportedScheduler(  # its stages have different noise levels
            f"this run of {type(scheduler).__name__} began between the two stages of a step, at timestep "
            f"{self.timestep:g}, so the meaning of its predictions is unknown: begin at an even place in its timesteps"
        )
        return None

    def _read(self, scheduler: Any) -> None:
        if self._scheduler is not None:  # another loop
            self.steps = self.before = 0
        self.loops += 1
        self.begins_anew = False
        self._scheduler, self._timesteps = scheduler, scheduler.timesteps
        self._values = [float(t) for t in scheduler.timesteps.tolist()]
        self._index, self.count, self.stride = -1, 0, 1
        try:
            self._table = spaces(scheduler)
        except UnsupportedScheduler as error:
            self._table, self.error = None, error

    def _search(self, timestep: Any) -> int:
        """The place of this timestep: the table's next entry if equal, else the first later one, else the first of all.

        A loop may have rounded its timesteps to the dtype of its sample.
        """
        if isinstance(timestep, Tensor) and (place := self._place(timestep)) is not None:
            return place
        values = set(torch.as_tensor(timestep).flatten().tolist()) if timestep is not None else set()
        if len(values) != 1:  # a batch may have one each, but they must be equal
            return -1
        (value,) = values
        dtype = torch.as_tensor(timestep).dtype
        roundings = (dtype,) if dtype in _HALVES else (None, *_ROUNDINGS) if dtype.is_floating_point else (None,)
        tables = [self._rounded(each) for each in roundings]
        for start in (self._index + 1, 0):
            for table in tables:
                if value in table[start:]:
                    return table.index(value, start)
        return -1

    def _rounded(self, dtype: torch.dtype | None) -> list[float]:
        """The table's timesteps after a conversion to `dtype` and back."""
        exact = torch.tensor(self._values, dtype=torch.float64)
        return self._values if dtype is None else exact.to(dtype).tolist()

    def _place(self, timestep: Tensor) -> int | None:
        """The place of `timestep` if it is a view of the table, as in most loops; its value stays on its device."""
        table = self._timesteps
        if not isinstance(table, Tensor) or (any(timestep.stride()) and timestep.numel() != 1):
            return None
        if timestep.dtype != table.dtype or timestep.untyped_storage().data_ptr() != table.untyped_storage().data_ptr():
            return None
        place, between = divmod(int(timestep.storage_offset()) - int(table.storage_offset()), table.stride(0) or 1)
        return place if between == 0 and 0 <= place < len(self._values) else None
