"""What a bug report needs: versions, device, what is available, and whether a first picture works.

This file needs only Python itself until a check runs, so that it can say what is missing.
"""

import os
import platform
import sys
from collections.abc import Iterator
from importlib import metadata
from importlib.util import find_spec
from typing import NamedTuple

NAME = "diffusers-guidance"
CORE = ("torch", "diffusers", "transformers", "safetensors", "accelerate", "triton", "huggingface-hub")
EXTRAS = {
    "cli": "the commands",
    "bench": "the benchmark",
    "ray": "work spread over a cluster",
    "app": "the page",
    "mcp": "the page as an MCP server",
}
"""The extras that users install, and what each is for."""


class Finding(NamedTuple):
    """A line of the report: what was checked, what was found, and whether that is a problem."""

    what: str
    found: str
    bad: bool = False


def examine(run: bool = True) -> Iterator[Finding]:
    """Every finding, in the order to print them.

    Args:
        run: also make a picture of four steps with the bundled model, which takes seconds.
    """
    yield Finding(NAME, f"{metadata.version(NAME)}, {_origin()}")
    yield Finding("Python", f"{platform.python_version()}, {platform.system()} {platform.machine()}")
    yield from _packages()
    if find_spec("torch"):
        yield from _device()
    yield from _extras()
    yield Finding("bundled models", ", ".join(_models()))
    offline = [name for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") if os.environ.get(name)]
    yield Finding(
        "model hub", f"not asked: {' and '.join(offline)} set" if offline else "asked for models that are not here"
    )
    if run:
        yield _picture()


def _origin() -> str:
    """Whether it is installed or in a checkout. The path is not shown, since paths contain names of people."""
    if find_spec("torch") is None:
        return "installed"
    from diffusers_guidance.pipelines.support.machine import commit

    at = commit()
    return f"a checkout at {at}" if at else "installed"


def _packages() -> Iterator[Finding]:
    """The versions of its requirements, compared with those it declares."""
    from packaging.requirements import Requirement

    declared = [Requirement(text) for text in metadata.requires(NAME) or ()]
    wanted = {
        each.name: each.specifier for each in declared if each.marker is None or each.marker.evaluate({"extra": ""})
    }
    for name in CORE:
        version = _version(name)
        if version is None:
            bad = name in wanted
            yield Finding(name, f"missing: pip install '{name}{wanted[name]}'" if bad else "not installed", bad)
        elif name in wanted and not wanted[name].contains(version, prereleases=True):
            yield Finding(name, f"{version}, but {wanted[name]} is needed: pip install '{name}{wanted[name]}'", True)
        else:
            yield Finding(name, version)


def _device() -> Iterator[Finding]:
    import torch

    from diffusers_guidance import kernels
    from diffusers_guidance.pipelines.support.machine import machine

    yield Finding("processor", machine("cpu"))
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if found is None:
        yield Finding("accelerator", "none that torch can use")
    elif found.type == "cuda":
        for i in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(i)
            memory = f"{about.total_memory / 2**30:.0f} GiB"
            yield Finding("accelerator", f"{about.name}, {memory}, compute capability {about.major}.{about.minor}")
        yield Finding("CUDA", f"{torch.version.cuda or torch.version.hip}, as torch was built for")
    else:
        yield Finding("accelerator", found.type)
    on_gpu = found is not None and found.type in ("cuda", "xpu")
    yield Finding("arithmetic", "in Triton" if on_gpu and kernels.dispatch.launch is not None else "in torch")


def _extras() -> Iterator[Finding]:
    """For every extra, the packages that are missing."""
    for extra, what in EXTRAS.items():
        missing = sorted(_missing(NAME, extra))
        yield Finding(what, f"needs {', '.join(missing)}: pip install '{NAME}[{extra}]'" if missing else "there")


def _missing(name: str, extra: str) -> set[str]:
    """The missing packages of an extra, including those of its packages' own extras."""
    from packaging.requirements import Requirement

    found = set()
    for each in map(Requirement, metadata.requires(name) or ()):
        if each.marker and each.marker.evaluate({"extra": extra}) and not each.marker.evaluate({"extra": ""}):
            if _version(each.name) is None:
                found.add(each.name)
            else:
                found |= {more for further in each.extras for more in _missing(each.name, further)}
    return found


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _models() -> Iterator[str]:
    from diffusers_guidance import samples

    for name in samples.NAMES:
        try:
            samples.model(name)
            yield name
        except ValueError:
            yield f"not {name}"


def _picture() -> Finding:
    """One picture with the bundled model: loading, guidance, a forecast."""
    try:
        from diffusers_guidance import samples
        from diffusers_guidance.pipelines.attach.attach import attach
        from diffusers_guidance.pipelines.support.loading import load

        pipe = load(str(samples.MODEL))
        with attach(pipe) as handle:
            picture = pipe("a rocket", num_inference_steps=6, guidance_scale=5.0).images[0]
        varied = max(high - low for low, high in picture.convert("RGB").getextrema())
        if not varied:
            return Finding("a picture", "all of one colour", True)
        return Finding("a picture", f"made on {pipe.device}, with {handle.report.nfe} of {handle.report.nfe_full} NFEs")
    except Exception as error:  # the report is for whatever goes wrong here
        return Finding("a picture", f"{type(error).__name__}: {error}", True)


def report(run: bool = True) -> tuple[str, bool]:
    """The findings as text, and whether all is well."""
    found = list(examine(run))
    width = max(len(each.what) for each in found)
    lines = [f"{'! ' if each.bad else '  '}{each.what:<{width}}  {each.found}" for each in found]
    bad = sum(each.bad for each in found)
    lines.append(
        "all is well" if not bad else f"{bad} of these {'is a problem' if bad == 1 else 'are problems'}: see !"
    )
    return "\n".join(lines), not bad


def main(run: bool = True) -> None:
    """Prints the report; ends with 1 if something is a problem."""
    text, well = report(run)
    print(text)
    sys.exit(not well)
