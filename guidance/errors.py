"""The errors of this package; each is a `GuidanceError`."""


class GuidanceError(Exception):
    """The base of every error of this package except those for bad arguments (`ValueError`, `TypeError`)."""


class UnsupportedPipeline(GuidanceError):
    """The pipeline's own guidance could not be identified or verified; the message says what was seen."""


class UnsupportedScheduler(GuidanceError):
    """The scheduler's predictions could not be turned into denoised predictions."""


class CalibrationMismatch(GuidanceError):
    """A calibration was made for another denoiser, scheduler, number of steps or guidance scale."""
