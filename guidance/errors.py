"""The errors this package raises on its own account; all of them are a `GuidanceError`."""


class GuidanceError(Exception):
    """Base of every error of this package that is not a plain bad argument (`ValueError`, `TypeError`)."""


class UnsupportedPipeline(GuidanceError):
    """The pipeline's own guidance could not be identified and verified; the message says what was seen."""


class UnsupportedScheduler(GuidanceError):
    """The scheduler's predictions could not be turned into denoised predictions."""


class CalibrationMismatch(GuidanceError):
    """A calibration was made for another denoiser, scheduler, number of steps or guidance scale."""
