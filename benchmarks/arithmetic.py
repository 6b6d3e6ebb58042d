"""Times the guidance arithmetic: diffusers' `normalized_guidance`, our reference, the same compiled, Triton.

    python benchmarks/arithmetic.py [--out benchmarks/results]

Checks every candidate against float64, then times one guidance step (APG with momentum): in CUDA graphs, where launches
cost least, and eager, as pipelines call it. *Cold* cycles through more inputs than the cache holds; *warm* repeats one
input, like a step whose network has just written its predictions. After every row it writes kernels.json (machine,
versions, every number), and at the end kernels.md (the table for the docs) and kernels.png. Without a GPU it measures
tiny sizes and interpreted kernels on the CPU, which only shows that it works.
"""

import argparse
import itertools
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before a kernel is defined

import diffusers
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance

from diffusers_guidance import kernels
from diffusers_guidance.files import write
from diffusers_guidance.kernels import launch
from diffusers_guidance.rules import APG

SIZES = {
    "SD 4x64x64": (4, 64, 64),
    "SDXL 4x128x128": (4, 128, 128),
    "SD3/Flux 16x128x128": (16, 128, 128),
    "Wan 16x21x90x160": (16, 21, 90, 160),
}
TINY = {"4x8x8": (4, 8, 8), "4x32x32": (4, 32, 32)}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
RULE = APG(7.5)
A, B = 1.0, -0.7
ROTATED = 256 * 2**20  # bytes of inputs to rotate among: more than a GPU's last-level cache
REPEATS = 50


def of_diffusers(x, c, u, m):
    """The formula of diffusers' guider. It acts on the raw predictions, so it does not read the sample."""
    buffer = MomentumBuffer(RULE.momentum)
    buffer.running_average = m
    return normalized_guidance(
        c, u, RULE.w - 1, buffer, RULE.eta, RULE.norm_threshold, use_original_formulation=True
    ), buffer.running_average


def reference(x, c, u, m):
    return kernels.guide(x, c, u, m, A, B, RULE, backend="torch")


def triton(x, c, u, m):
    return kernels.guide(x, c, u, m, A, B, RULE, backend="triton")


def two_launches(x, c, u, m):
    """Triton with two launches even for a small group."""
    fits = launch.fits_one_launch
    launch.fits_one_launch = lambda *_: False
    try:
        return triton(x, c, u, m)
    finally:
        launch.fits_one_launch = fits


def draw(shape, dtype, device):
    """A step's inputs; the two predictions nearly agree, as in a run."""
    sample, cond, difference, momentum = torch.randn(4, *shape, device=device)
    return sample.to(dtype), cond.to(dtype), (cond + 0.1 * difference).to(dtype), momentum


def rms_error(found, exact):
    return ((found.double() - exact).norm() / exact.norm()).item()


def check(candidates, inputs):
    """Each candidate's relative RMS error against its own arithmetic in float64."""
    exact_inputs = [t.double() for t in inputs]
    exact, exact_diffusers = reference(*exact_inputs)[0], of_diffusers(*exact_inputs)[0]
    errors = {}
    for name, function in candidates.items():
        errors[name] = rms_error(function(*inputs)[0], exact_diffusers if name == "diffusers" else exact)
        limit = 1e-6 if inputs[1].dtype == torch.float32 else 1.2 * torch.finfo(inputs[1].dtype).eps
        if name.startswith("Triton") and not errors[name] < limit:
            raise AssertionError(f"{name} is wrong: relative RMS error {errors[name]:.2e}, allowed {limit:.0e}")
    return errors


def quantiles(times):
    """20 %, 50 % and 80 % of the times, in microseconds."""
    cuts = statistics.quantiles(times, n=10, method="inclusive")
    return {"p20": cuts[1], "median": statistics.median(times), "p80": cuts[7]}


def in_graph(function, sets):
    """Microseconds per call, from replays of one CUDA graph that cycles through all input sets."""
    for _ in range(3):
        function(*sets[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for inputs in sets:
            function(*inputs)
    return by_events(graph.replay, REPEATS, len(sets))


def eager(function, sets):
    """Microseconds per call in the way that pipelines make it."""

    def cycle():
        for inputs in sets:
            function(*inputs)

    return by_events(cycle, REPEATS // 2, len(sets))


def by_events(function, repeats, calls):
    times = []
    for i in range(repeats + 5):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        function()
        stop.record()
        stop.synchronize()
        if i >= 5:
            times.append(start.elapsed_time(stop) * 1000 / calls)
    return quantiles(times)


def time_on_cpu(function, sets):
    """Microseconds per call by the clock."""
    times = []
    for i in range(5):
        start = time.perf_counter()
        function(*sets[i % len(sets)])
        if i >= 2:
            times.append((time.perf_counter() - start) * 1e6)
    return quantiles(times)


def timed(function, sets, device):
    """The quantiles of each kind of timing."""
    if device == "cpu":
        return {"interpreted" if function is triton else "eager": time_on_cpu(function, sets)}
    warm = [sets[0]] * len(sets)
    return {
        "graph, cold": in_graph(function, sets),
        "graph, warm": in_graph(function, warm),
        "eager, warm": eager(function, warm),
    }


def copy_bandwidth():
    """Bytes read and written per second by a copy of 1 GiB."""
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    microseconds = in_graph(lambda: target.copy_(source), [()])["median"]
    return 2 * source.nbytes / microseconds * 1e6


def bytes_moved(shape, dtype, launches):
    """Bytes that must move: each pass reads (x, c, u) and momentum; prediction and momentum are written once."""
    size = dtype.itemsize
    return torch.Size(shape).numel() * (launches * (3 * size + 4) + size + 4)


def launches_of(name, shape, device):
    """How many launches Triton takes at this size on this machine."""
    if name.endswith("two launches"):
        return 2
    chunks = -(-torch.Size(shape[1:]).numel() // launch.TILE)
    place = torch.device(device, 0) if device == "cuda" else torch.device(device)
    return 1 if launch.fits_one_launch(shape[0], chunks, place) else 2


def machine(device):
    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
    }
    if device == "cuda":
        import triton as triton_package

        properties = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "triton": triton_package.__version__,
        }
    return found


class Cell(NamedTuple):
    """What a row measures."""

    size: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    candidate: str

    @property
    def name(self) -> str:
        return f"{self.size} x{self.shape[0]} {str(self.dtype).removeprefix('torch.')}, {self.candidate}"


CANDIDATES = {"diffusers": of_diffusers, "reference": reference, "Triton": triton, "Triton, two launches": two_launches}


def cells(tiny: bool, device: str, half_only: bool = False) -> Iterator[Cell]:
    """All rows, or those for a quick check: half precision, batch 1."""
    sizes = TINY if tiny else SIZES
    dtypes = (DTYPES[0],) if tiny else DTYPES[1:2] if half_only else DTYPES
    for (size, shape), batch, dtype in itertools.product(sizes.items(), (1,) if tiny or half_only else (1, 8), dtypes):
        for candidate in CANDIDATES:
            yield Cell(size, (batch, *shape), dtype, candidate)
            if candidate == "reference" and device == "cuda":
                yield Cell(size, (batch, *shape), dtype, "compiled")


def measured(cell: Cell, device: str, bandwidth: float | None = None) -> dict[str, Any]:
    """A row. Raises AssertionError if the candidate is wrong."""
    torch.manual_seed(0)
    _, shape, dtype, name = cell
    if name == "compiled":
        torch.compiler.reset()
    function = torch.compile(reference, dynamic=False) if name == "compiled" else CANDIDATES[name]
    one_set = torch.Size(shape).numel() * (3 * dtype.itemsize + 4)
    count = min(64, max(2, ROTATED // one_set + 1)) if device == "cuda" else 2
    with torch.inference_mode():
        sets = [draw(shape, dtype, device) for _ in range(count)]
        error = check({name: function}, sets[0])[name]
        times = timed(function, sets, device)
    row = {"size": cell.size, "batch": shape[0], "dtype": str(dtype).removeprefix("torch."), "candidate": name}
    row |= {"microseconds": times, "relative_rms_error": error, "input_sets": count}
    if name.startswith("Triton"):
        row["launches"] = launches_of(name, shape, device)
        # One launch reads each number once.
        row["bytes"] = bytes_moved(shape, dtype, row["launches"])
        if bandwidth:
            row["share_of_copy_bandwidth"] = row["bytes"] / times["graph, cold"]["median"] * 1e6 / bandwidth
    return row


def table(rows):
    """The rows in Markdown, one line per size, batch, dtype and kind of timing."""
    names = list(dict.fromkeys(row["candidate"] for row in rows))
    head = "| latents | batch | dtype | timing | " + " | ".join(f"{name}, us" for name in names)
    lines = [head + " | of copy bandwidth |", "|---" * 4 + "|---:" * (len(names) + 1) + "|"]
    for key in dict.fromkeys((row["size"], row["batch"], row["dtype"]) for row in rows):
        found = {r["candidate"]: r for r in rows if (r["size"], r["batch"], r["dtype"]) == key}
        for kind in dict.fromkeys(kind for row in found.values() for kind in row["microseconds"]):
            times = {
                name: row["microseconds"][kind]["median"] for name, row in found.items() if kind in row["microseconds"]
            }
            cells_ = [f"{times[name]:.1f}" if name in times else "" for name in names]
            share = found.get("Triton", {}).get("share_of_copy_bandwidth") if kind == "graph, cold" else None
            lines.append(
                f"| {' | '.join(map(str, (*key, kind, *cells_)))} | {'' if share is None else f'{share:.0%}'} |"
            )
    return "\n".join(lines) + "\n"


def plot(rows, title, path):
    """Time by size at batch 1, one line per candidate; the first half-precision dtype measured, else float32."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    dtype = "float16" if any(row["dtype"] == "float16" for row in rows) else "float32"
    shown = [row for row in rows if row["batch"] == 1 and row["dtype"] == dtype]
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name in dict.fromkeys(row["candidate"] for row in shown):
        mine = [(row["size"], next(iter(row["microseconds"].values()))) for row in shown if row["candidate"] == name]
        low = [times["median"] - times["p20"] for _, times in mine]
        high = [times["p80"] - times["median"] for _, times in mine]
        medians = [times["median"] for _, times in mine]
        axes.errorbar([size for size, _ in mine], medians, [low, high], marker="o", capsize=3, label=name)
    axes.set(yscale="log", ylabel="microseconds a guidance step", title=f"{title}, {dtype}, batch 1")
    axes.legend()
    figure.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results"))
    out = parser.parse_args().out
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        print("No GPU: tiny sizes and interpreted kernels. This only shows that the benchmark works.")
    bandwidth = copy_bandwidth() if device == "cuda" else None
    result = {"machine": machine(device), "copy_bandwidth_bytes_per_second": bandwidth, "rows": []}
    rows, prefix = result["rows"], "kernels" if device == "cuda" else "kernels-tiny-cpu"
    for cell in cells(device == "cpu", device):
        rows.append(measured(cell, device, bandwidth))
        write(out / f"{prefix}.json", json.dumps(result, indent=1).encode() + b"\n")
        times = "  ".join(f"{kind} {found['median']:.1f}" for kind, found in rows[-1]["microseconds"].items())
        print(f"{cell.name:55} us: {times}", flush=True)
    (out / f"{prefix}.md").write_text(table(rows))
    plot(rows, result["machine"].get("gpu", "CPU"), out / f"{prefix}.png")
    print(f"\n{table(rows)}\nwritten to {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
