"""The guidance arithmetic behind one dispatcher: `guide`, `step`, `similarity`, `extrapolate`."""

from diffusers_guidance.kernels.dispatch import backend_of, extrapolate, guide, similarity, step, use_backend
from diffusers_guidance.kernels.reference import Coefficients, Gram, Update

__all__ = [
    "Coefficients",
    "Gram",
    "Update",
    "backend_of",
    "extrapolate",
    "guide",
    "similarity",
    "step",
    "use_backend",
]
