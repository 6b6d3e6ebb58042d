"""A benchmark's suite: one readable YAML file, and its cells of work."""

import functools
import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BeforeValidator

from diffusers_guidance import samples
from diffusers_guidance.calibration import Calibration
from diffusers_guidance.pipelines.pictures.columns import Column, calibration_file
from diffusers_guidance.pipelines.search.search import search
from diffusers_guidance.pipelines.support.files import read_lines, read_text
from diffusers_guidance.pipelines.support.written import Count, Scale, Seed, Text, checked, in_a_file, parts_of
from diffusers_guidance.rules import CFG
from diffusers_guidance.scales import Given

SUITE = samples.SUITE
"""The bundled model's suite."""

JUDGED = ("saved", "share_of_possible", "psnr", "ssim", "lpips", "saturation", "contrast", "clipped", "clip_score",
          "retrieval")  # fmt: skip
"""What a target may be about: shares of NFEs and of the possible time, and the measures of pictures."""


def _judgeable(target: Any) -> dict[str, Any]:
    """Refuses targets that could not be checked after the run."""
    kinds = ({"at_least"}, {"within", "of"}, {"within_points", "of"})
    asked = set(target) - {"column", "measure"} if isinstance(target, dict) else set()
    if asked not in kinds or not {"column", "measure"} <= set(target):
        raise ValueError(
            f"targets: {target!r}; write a column, a measure, and at_least, or within and of, or within_points and of"
        )
    if target["measure"] not in JUDGED:
        raise ValueError(f"targets: there is no measure {target['measure']!r}; there are {', '.join(JUDGED)}")
    if "of" in target and target["measure"] in JUDGED[:2]:
        raise ValueError(f"targets: {target['measure']} of {target['column']} cannot be a reference: use at_least")
    for name in asked - {"of"}:
        if isinstance(target[name], bool) or not isinstance(target[name], int | float):
            raise ValueError(f"targets: {name} of {target['column']} is {target[name]!r}; a number")
    return target


Target = Annotated[dict[str, Any], BeforeValidator(_judgeable)]


def _within(where: str) -> Callable[[str, Any, str], str]:
    """Makes sentences about a value at a place in a file."""
    return lambda name, value, wanted: f"{where}: {in_a_file(name, value, wanted)}"


@dataclass(frozen=True)
class Entry:
    """One column of a suite; see the comments in `samples/suites/emoji.yaml`."""

    name: Text
    pair: Text = "CFG"
    steps: Count | None = None
    search: Count | None = None
    as_strong_as: Text | None = None

    @classmethod
    def read(cls, name: str, given: Any, beside: Path) -> "Entry":
        where = f"columns: {name!r}"
        if not isinstance(given, str | dict) or not given or "name" in given:
            raise ValueError(f"{where} is {given!r}; write a pair such as AG or APG@15, or some of its parts by name")
        given = {"pair": given} if isinstance(given, str) else given
        given = checked(Annotated[dict, parts_of(cls, but="name")], given, _within(where))
        entry: Entry = checked(cls, given | {"name": name}, _within(where))
        if ("pair" in given and (entry.search or entry.as_strong_as)) or (entry.search and entry.as_strong_as):
            raise ValueError(f"columns: {name!r} has more than one of pair, search and as_strong_as")
        Column.parse(entry.pair, beside)
        return entry


@dataclass(frozen=True)
class Timing:
    """The columns to time, the batch sizes, and the number of turns."""

    columns: tuple[Text, ...] = ()
    batches: tuple[Count, ...] = (1,)
    rounds: Count = 7


@dataclass(frozen=True)
class Suite:
    """What to measure; `Suite.read` reads it from a file."""

    model: Text
    prompts: tuple[Text, ...]
    columns: tuple[Entry, ...]
    seeds: tuple[Seed, ...] = (0, 1, 2)
    steps: Count = 20
    guidance_scale: Scale = 5.0
    schedulers: tuple[Text | None, ...] = (None,)
    batch: Count = 8
    negative: Text | None = None
    calibration: Text | None = None
    baseline: Text = "CFG"
    timing: Annotated[Timing, parts_of(Timing)] = field(default_factory=Timing)
    targets: tuple[Target, ...] = ()
    held_out: bool = False
    """Whether the prompts were compared with those used for fitting."""
    name: str = "suite"
    folder: str = "."
    """The folder of its file, which its columns' paths are relative to."""

    @classmethod
    def read(cls, file: Path = SUITE) -> "Suite":
        """The suite in a YAML file, or the bundled one of that name; paths in it are relative to it.

        Raises:
            ValueError: something is missing, unknown or of the wrong kind; the message says what.
        """
        bundled = SUITE.parent / f"{file}.yaml"
        file = bundled if not file.exists() and file.name == str(file) and bundled.is_file() else file
        try:
            given = yaml.safe_load(read_text(file))
        except yaml.YAMLError as error:
            raise ValueError(f"{file}: not YAML ({' '.join(str(error).split())})") from None
        known = (set(cls.__dataclass_fields__) - {"name", "held_out", "folder"}) | {"held_out_from"}
        if not isinstance(given, dict):
            raise ValueError(f"{file}: no values by name. A suite has {', '.join(sorted(known))}")
        missing, unknown = {"model", "prompts", "columns"} - set(given), {str(name) for name in set(given) - known}
        if missing or unknown:
            what = [f"{', '.join(sorted(names))} {verb}" for names, verb in ((missing, "missing"), (unknown, "unknown"))
                    if names]  # fmt: skip
            raise ValueError(f"{file}: {'; '.join(what)}. A suite has {', '.join(sorted(known))}")
        try:
            return cls._from(given, file)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None

    @classmethod
    def _from(cls, given: dict[str, Any], file: Path) -> "Suite":
        beside = file.parent
        seen = set(read_lines(_prompts(str(given.pop("held_out_from")), beside))) if "held_out_from" in given else None
        if isinstance(given["prompts"], str):
            listed = _prompts(given["prompts"], beside)
            if not listed.is_file():
                raise ValueError(f"prompts: {given['prompts']!r} is not a file; write [{given['prompts']}] for a list")
            given["prompts"] = read_lines(listed)
        if not isinstance(given["columns"], dict) or not given["columns"]:
            raise ValueError(f"columns: {given['columns']!r}; each by a name, such as {{fewer steps: StepAG(0.5)}}")
        given["columns"] = [Entry.read(str(name), value, beside) for name, value in given["columns"].items()]
        given |= {"name": file.stem, "held_out": seen is not None, "folder": str(beside.resolve())}
        suite: Suite = checked(cls, given)
        if both := sorted(set(suite.prompts) & (seen or set())):
            raise ValueError(f"prompts: {both[0]!r} is not held out")
        model = str(samples.MODEL) if suite.model == "bundled" else suite.model
        suite = replace(suite, model=str(beside / model) if (beside / model).is_dir() else model)
        if suite.calibration is not None:
            suite = replace(suite, calibration=str(calibration_file(suite.calibration, beside).resolve()))
        suite._check()
        return suite

    def _check(self) -> None:
        names = [entry.name for entry in self.columns]
        used = [self.baseline, *self.timing.columns]
        used += [t[k] for t in self.targets for k in ("column", "of") if k in t]
        used += [entry.as_strong_as for entry in self.columns if entry.as_strong_as]
        for name in used:
            if name not in names:
                raise ValueError(f"there is no column {name!r}, which is used elsewhere; there are {', '.join(names)}")
        for name in (self.baseline, *self.timing.columns):
            if self.entry(name).as_strong_as:
                raise ValueError(f"column {name!r} is as strong as another: it can be neither baseline nor timed")
        for name in ("prompts", "seeds", "schedulers"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name}: {list(values)!r}; at least one, and each once")
        if any(entry.search for entry in self.columns) and self.calibration is None:
            raise ValueError("columns that search need a calibration")

    def entry(self, name: str) -> Entry:
        return next(entry for entry in self.columns if entry.name == name)

    def column(self, entry: Entry, effective: float | None = None) -> Column:
        """The pair of an entry; `effective` is the measured scale of the column whose strength it matches."""
        if entry.as_strong_as is not None:
            return Column(entry.name, CFG(), Column.parse("CFG").policy, effective)
        if entry.search is not None:
            assert self.calibration is not None
            return Column(entry.name, CFG(), _searched(self.calibration, entry.search))
        return _parsed(entry.pair, self.folder)

    def scale(self, column: Column) -> Given:
        return self.guidance_scale if column.guidance_scale is None else column.guidance_scale

    # Cells

    def effective_cells(self) -> list["Cell"]:
        """A cell for each scheduler and each column whose strength another matches."""
        wanted = dict.fromkeys(entry.as_strong_as for entry in self.columns if entry.as_strong_as)
        return [self._cell("effective", s, name, seed=self.seeds[0]) for s in self.schedulers for name in wanted]

    def picture_cells(self) -> list["Cell"]:
        return [
            self._cell("pictures", scheduler, entry.name, seed=seed)
            for scheduler in self.schedulers
            for seed in self.seeds
            for entry in self.columns
        ]

    def timing_cells(self) -> list["Cell"]:
        """The cost of a half batch, then the columns, at each batch size, with the first scheduler."""
        first = self.schedulers[0]
        cells = []
        for batch in self.timing.batches if self.timing.columns else ():
            cells.append(self._cell("rate", first, self.baseline, batch=batch))
            cells += [self._cell("timing", first, name, batch=batch) for name in self.timing.columns]
        return cells

    def _cell(self, kind: str, scheduler: str | None, column: str, seed: int = 0, batch: int | None = None) -> "Cell":
        return Cell(kind, scheduler, column, seed, batch or self.batch)


@dataclass(frozen=True)
class Cell:
    """A piece of work, done whole or not at all."""

    kind: str
    """"effective", "pictures", "rate" or "timing"."""
    scheduler: str | None
    column: str
    seed: int
    batch: int
    effective: float | None = None
    """The measured scale of the column whose strength this one matches."""

    def key(self, suite: Suite, model: str, device: str, dtype: str, machine: str = "") -> str:
        """Names the cell and all that its result depends on, so that no other result can be taken for it.

        Args:
            model: its `fingerprint`.
            device, dtype: as requested.
            machine: what seconds depend on besides.
        """
        entry = suite.entry(self.column)
        settings = [suite.steps, suite.guidance_scale, suite.negative, list(suite.prompts)]
        calibration = _content(suite.calibration) if entry.search and suite.calibration else None
        if not entry.search and (policy := suite.column(entry).policy) is not None and policy.calibration is not None:
            calibration = policy.calibration.digest
        timed = [suite.timing.rounds, machine, asdict(suite.entry(suite.baseline))]
        of = [
            *(version(package) for package in ("diffusers-guidance", "diffusers", "torch")),
            asdict(self),
            asdict(entry),
            settings,
            calibration,
            timed if self.kind in ("rate", "timing") else None,
            model,
            device,
            dtype,
        ]
        return hashlib.sha256(json.dumps(of).encode()).hexdigest()[:16]


@functools.cache
def _searched(calibration: str, nfe: int) -> Any:
    return search(Calibration.load(Path(calibration)), nfe)


@functools.cache
def _parsed(pair: str, folder: str) -> Column:
    return Column.parse(pair, Path(folder))


@functools.cache
def _content(file: str) -> str:
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]


def _prompts(name: str, beside: Path) -> Path:
    """A file of prompts: a path relative to `beside`, or the name of one of the bundled ones."""
    file, bundled = beside / name, samples.PROMPTS.parent / f"{name}.txt"
    return bundled if not file.is_file() and Path(name).name == name and bundled.is_file() else file
