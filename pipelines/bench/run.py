"""The benchmark's engine: finds the cells left to do, does them here or on Ray, and keeps their results.

`results.jsonl` has a line for each finished cell and for each environment one ran in. A line is written after all its
pictures. So an interruption leaves only finished cells, and the next call does the rest.
"""

import functools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffusers_guidance.files import append, write
from diffusers_guidance.pipelines.bench.cells import Done, run_cell
from diffusers_guidance.pipelines.bench.suite import Cell, Suite
from diffusers_guidance.pipelines.support.loading import fingerprint
from diffusers_guidance.pipelines.support.machine import machine
from diffusers_guidance.pipelines.support.progress import Progress, silent
from diffusers_guidance.pipelines.support.resume import resumed


def bench(
    suite: Suite,
    out: Path,
    *,
    device: str | None = None,
    dtype: str | None = None,
    on_ray: bool = False,
    resources: dict[str, float] | None = None,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Does the suite's cells that `out` does not have yet; returns the lines of all its cells, environments first.

    Args:
        out: folder of results.jsonl and pictures/; cells of other suites in it stay there.
        device, dtype: as on the command line; None chooses.
        on_ray: whether to use the Ray cluster of `support.ray.cluster()`. Timing never runs beside other work.
        resources: what a cell needs on Ray; see `spread`.

    Raises:
        ValueError: the suite names something that does not exist.
        GuidanceError: not because of a single column; its lines then say what was not measured and why.
    """
    progress = progress or silent
    results = Results(out / "results.jsonl")
    key = functools.partial(
        Cell.key, suite=suite, model=fingerprint(suite.model), device=device or "", dtype=dtype or "",
        machine=machine(device),
    )  # fmt: skip
    total = len(suite.effective_cells()) + len(suite.picture_cells()) + len(suite.timing_cells())
    mine: list[dict[str, Any]] = []

    def work(cell: Cell) -> Done:
        return run_cell(suite, cell, device, dtype)

    def keep(cell: Cell, done: Done) -> dict[str, Any]:
        return _keep(results, out, key(cell), cell, done)

    def do(cells: Sequence[Cell], at_once: int | None = None) -> None:
        left = [cell for cell in cells if results.found(key(cell)) is None]
        had = len(mine) + len(cells) - len(left)
        for cell in left[:1]:
            progress(f"{cell.kind}: {cell.column}", had, total)
        found = resumed(
            work, cells, lambda cell: results.found(key(cell)), keep,
            on_ray=on_ray, resources=resources, at_once=at_once,
        )  # fmt: skip
        for cell, record in found:
            mine.append(record)
            progress(f"{cell.kind}: {cell.column}", max(had, len(mine)), total)

    do(suite.effective_cells())
    strength = {(r["scheduler_asked"], r["column"]): r.get("guidance_scale") for r in mine}
    cells = []
    for cell in suite.picture_cells():
        wanted = suite.entry(cell.column).as_strong_as
        scale = strength[cell.scheduler, wanted] if wanted else None
        if wanted is None or scale is not None:
            cells.append(replace(cell, effective=scale))
        else:
            total -= 1  # the column to match in strength was not measured; its line says so
    do(cells)
    do(suite.timing_cells(), at_once=1)
    used = {record["environment"] for record in mine}
    return [line for n, line in results.environments.items() if n in used] + mine


def _keep(results: "Results", out: Path, key: str, cell: Cell, done: Done) -> dict[str, Any]:
    files = [f"pictures/{key}/{n:03}.png" for n in range(len(done.pictures))]
    for file, content in zip(files, done.pictures, strict=True):
        write(out / file, content)
    record = {"key": key, **done.record, "scheduler_asked": cell.scheduler}
    if files:
        record |= {"pictures": files, "decoded": f"pictures/{key}/decoded.safetensors"}
        write(out / record["decoded"], done.decoded)
    return results.add(record, done.environment)


class Results:
    """A file of JSON lines that only grows. If a killed run left half a line at its end, that is cut off."""

    def __init__(self, file: Path):
        self.file = file
        self.cells: dict[str, dict[str, Any]] = {}
        self.environments: dict[int, dict[str, Any]] = {}
        file.parent.mkdir(parents=True, exist_ok=True)
        content = file.read_bytes() if file.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            write(file, whole)
        for number, line in enumerate(whole.decode().splitlines(), 1):
            try:
                record = json.loads(line)
                if record["kind"] == "environment":
                    self.environments[record["id"]] = record
                else:
                    self.cells[record["key"]] = record
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{file}, line {number}: not a benchmark's result; move the file away") from None

    def found(self, key: str) -> dict[str, Any] | None:
        """The finished cell of that key; None if it is still to do, or its pictures are gone."""
        record = self.cells.get(key)
        if record is not None and "pictures" in record:
            files = [*record["pictures"], record.get("decoded", "")]  # earlier versions kept no floats
            record = record if all((self.file.parent / name).is_file() for name in files) else None
        return record

    def add(self, record: dict[str, Any], environment: dict[str, Any]) -> dict[str, Any]:
        """Writes the line of a finished cell, after its environment's if that is new."""
        ran = {"kind": "environment", **environment}
        found = next((n for n, other in self.environments.items() if other == ran | {"id": n}), None)
        if found is None:
            found = len(self.environments)
            self.environments[found] = ran | {"id": found}
            self._append(self.environments[found])
        record |= {"environment": found}
        self._append(record)
        self.cells[record["key"]] = record
        return record

    def _append(self, record: dict[str, Any]) -> None:
        append(self.file, json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n")
