"""Results on disk, so that a comparison that was stopped goes on."""

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
from diffusers.image_processor import VaeImageProcessor
from safetensors import SafetensorError

from diffusers_guidance.calibration import Calibration
from diffusers_guidance.files import write
from diffusers_guidance.pipelines.attach.fingerprint import module_fingerprints, scheduler_fingerprint
from diffusers_guidance.pipelines.pictures.columns import Column
from diffusers_guidance.pipelines.pictures.make import Case, Result, begun
from diffusers_guidance.pipelines.support.machine import environment
from diffusers_guidance.pipelines.support.resume import Record
from diffusers_guidance.report import Report
from diffusers_guidance.scales import Given


class Kept:
    """A folder of results: for each a record, its pictures, and what it learned.

    A result's files have the digest of all that it depends on as their name: the weights, the scheduler, the machine,
    the settings. So what was stopped before stays there while something else is made.

    Args:
        folder: None keeps nothing.
    """

    def __init__(self, folder: Path | None = None):
        self.folder, self._used = folder, set[str]()

    def begin(self, pipe: Any, cases: Sequence[Case], guidance_scale: Given, settings: dict[str, Any]) -> None:
        """Says what all results depend on.

        Args:
            guidance_scale: for columns without one.
            settings: more of it, as plain JSON values.
        """
        self.guidance_scale, self.about = guidance_scale, settings
        if self.folder is not None:
            self.about = settings | _about(pipe) | {"cases": [list(case) for case in cases]}

    def found(self, column: Column, part: str = "") -> Result | None:
        """The result of a column, if it is there and whole.

        Args:
            part: tells apart results that have the same column.
        """
        result = begun(column, self.guidance_scale)
        record = self._record(result, part)
        if record is None or (content := record.read()) is None:
            return None
        try:
            pictures = safetensors.torch.load_file(record.file.with_suffix(".safetensors"))["pictures"]
        except (OSError, SafetensorError):
            return None
        result.decoded = [*pictures]
        result.pictures = VaeImageProcessor.numpy_to_pil(pictures.permute(0, 2, 3, 1).numpy())
        result.seconds, result.reports = content["seconds"], [*map(Report.from_dict, content["reports"])]
        if content["learned"]:
            result.calibration = replace(Calibration.load(_learned(record)), source="")  # as it was made
        return result

    def keep(self, column: Column, result: Result, part: str = "") -> Result:
        """Writes a result, its record last; returns the result."""
        record = self._record(result, part)
        if record is not None:
            decoded = safetensors.torch.save({"pictures": result.floats.contiguous()})
            write(record.file.with_suffix(".safetensors"), decoded)
            if result.calibration is not None:
                result.calibration.save(_learned(record))
            reports = [report.to_dict() for report in result.reports]
            learned = result.calibration is not None
            record.write({"seconds": result.seconds, "reports": reports, "learned": learned})
        return result

    def clear(self) -> None:
        """Deletes the results that were found or kept, and the folder if nothing else is in it."""
        if self.folder is None:
            return
        for name in self._used:
            for file in self.folder.glob(f"{name}.*"):
                file.unlink(missing_ok=True)
        with suppress(OSError):
            self.folder.rmdir()

    def _record(self, result: Result, part: str) -> Record | None:
        if self.folder is None:
            return None
        calibration = result.policy.calibration
        about = self.about | {
            "column": result.name, "rule": repr(result.rule), "policy": repr(result.policy), "part": part,
            "calibration": None if calibration is None else calibration.digest,
        }  # fmt: skip
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
        self._used.add(digest)
        return Record(self.folder / f"{digest}.json", about)


def _about(pipe: Any) -> dict[str, Any]:
    return {
        "networks": module_fingerprints(pipe, sorted(pipe.components)),
        "scheduler": scheduler_fingerprint(pipe.scheduler),
        "environment": environment(pipe),
    }


def _learned(record: Record) -> Path:
    return record.file.with_suffix(".learned.safetensors")
