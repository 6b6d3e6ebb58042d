"""The guidance arithmetic behind one dispatcher: `guide`, `step`, `observe`, `mix`, `similarity`, `extrapolate`."""

if __name__ == "kernels":
    # If Python starts in the checkout, diffusers and transformers find this folder when they look for Hugging Face's
    # package of the same name. Then load that package instead. If it is not installed, stay empty: they take that for
    # its absence.
    import importlib.util
    import sys
    from importlib.machinery import PathFinder
    from pathlib import Path

    _here = Path(__file__).resolve().parents[1]
    _spec = PathFinder.find_spec(__name__, [path for path in sys.path if Path(path or ".").resolve() != _here])
    if _spec is not None and _spec.loader is not None:
        sys.modules[__name__] = importlib.util.module_from_spec(_spec)
        _spec.loader.exec_module(sys.modules[__name__])
else:
    from diffusers_guidance.kernels.dispatch import (
        backend_of,
        extrapolate,
        guide,
        mix,
        observe,
        similarity,
        step,
        use_backend,
    )
    from diffusers_guidance.kernels.reference import Coefficients, Gram, Update

    __all__ = [
        "Coefficients",
        "Gram",
        "Update",
        "backend_of",
        "extrapolate",
        "guide",
        "mix",
        "observe",
        "similarity",
        "step",
        "use_backend",
    ]
