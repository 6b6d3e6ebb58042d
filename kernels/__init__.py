"""The guidance arithmetic behind one dispatcher: `guide` and `similarity`."""

from diffusers_guidance.kernels.reference import Coefficients, Gram, guide, similarity

__all__ = ["Coefficients", "Gram", "guide", "similarity"]
