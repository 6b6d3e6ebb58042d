"""Adaptive projected guidance, Adaptive Guidance and LinearAG for unmodified diffusers pipelines.

from diffusers_guidance import APG, AdaptiveGuidance, attach

handle = attach(pipe, rule=APG(), policy=AdaptiveGuidance())
image = pipe("a raccoon in a space suit", guidance_scale=12).images[0]
print(handle.report)
handle.detach()
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # at run time `__getattr__` finds these
    from diffusers_guidance.calibration import Calibration, Fit
    from diffusers_guidance.errors import (
        CalibrationMismatch,
        GuidanceError,
        UnsupportedPipeline,
        UnsupportedScheduler,
    )
    from diffusers_guidance.pipelines.attach.attach import Handle, attach, detach, handle_of
    from diffusers_guidance.pipelines.attach.guider import Guider
    from diffusers_guidance.pipelines.search.calibrate import calibrate
    from diffusers_guidance.pipelines.search.nas import search_nas
    from diffusers_guidance.pipelines.search.search import search
    from diffusers_guidance.policies import (
        AdaptiveGuidance,
        EveryStep,
        Forecast,
        Handed,
        Hold,
        Interval,
        LinearAG,
        Policy,
        Schedule,
        StepAG,
    )
    from diffusers_guidance.report import Report, StepReport
    from diffusers_guidance.rules import (
        ADG,
        APG,
        CFG,
        TAG,
        TCFG,
        BetaCFG,
        CFGZeroStar,
        Coefficients,
        Gram,
        MagnitudeAware,
        MomentumGuidance,
        RenormCFG,
        Rule,
    )
    from diffusers_guidance.steps import Action, Decision, History, Prediction, Step

__version__ = "0.1.0"  # the only place that states it

__all__ = [
    "ADG",
    "APG",
    "CFG",
    "TAG",
    "TCFG",
    "Action",
    "AdaptiveGuidance",
    "BetaCFG",
    "CFGZeroStar",
    "Calibration",
    "CalibrationMismatch",
    "Coefficients",
    "Decision",
    "EveryStep",
    "Fit",
    "Forecast",
    "Gram",
    "GuidanceError",
    "Guider",
    "Handed",
    "Handle",
    "History",
    "Hold",
    "Interval",
    "LinearAG",
    "MagnitudeAware",
    "MomentumGuidance",
    "Policy",
    "Prediction",
    "RenormCFG",
    "Report",
    "Rule",
    "Schedule",
    "Step",
    "StepAG",
    "StepReport",
    "UnsupportedPipeline",
    "UnsupportedScheduler",
    "attach",
    "calibrate",
    "detach",
    "handle_of",
    "search",
    "search_nas",
]

_HOMES = {
    "calibration": ("Calibration", "Fit"),
    "errors": ("CalibrationMismatch", "GuidanceError", "UnsupportedPipeline", "UnsupportedScheduler"),
    "pipelines.attach.attach": ("Handle", "attach", "detach", "handle_of"),
    "pipelines.attach.guider": ("Guider",),
    "pipelines.search.calibrate": ("calibrate",),
    "pipelines.search.nas": ("search_nas",),
    "pipelines.search.search": ("search",),
    "policies": (
        "AdaptiveGuidance", "EveryStep", "Forecast", "Handed", "Hold", "Interval", "LinearAG", "Policy", "Schedule",
        "StepAG",
    ),
    "report": ("Report", "StepReport"),
    "rules": (
        "ADG", "APG", "CFG", "TAG", "TCFG", "BetaCFG", "CFGZeroStar", "Coefficients", "Gram", "MagnitudeAware",
        "MomentumGuidance", "RenormCFG", "Rule",
    ),
    "steps": ("Action", "Decision", "History", "Prediction", "Step"),
}  # fmt: skip
_HOME = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    """A public name, imported on first use: rules and policies do not need diffusers."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
