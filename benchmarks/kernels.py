"""Times the guidance arithmetic: diffusers' `normalized_guidance`, our reference, the same compiled, Triton.

    python benchmarks/kernels.py [--out benchmarks/results]

Checks every candidate against float64, then times one guidance step (APG with momentum) by CUDA graphs of calls
on rotating inputs, more than the cache holds. Writes kernels.json (machine, versions, every number),
kernels.md (the table for the docs) and kernels.png. Without a GPU it says so and measures only the CPU path.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import diffusers
import matplotlib
import torch
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance

from diffusers_guidance import kernels
from diffusers_guidance.rules import APG

SIZES = {
    "SD 4x64x64": (4, 64, 64),
    "SDXL 4x128x128": (4, 128, 128),
    "SD3/Flux 16x128x128": (16, 128, 128),
    "Wan 16x21x90x160": (16, 21, 90, 160),
}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
RULE = APG(7.5)
A, B = 1.0, -0.7
ROTATED = 256 * 2**20  # bytes of inputs to rotate among: more than a GPU's last-level cache
REPEATS = 50


def of_diffusers(x, c, u, m):
    """The formula of diffusers' guider; on the raw predictions, so it does not read the sample."""
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
    from diffusers_guidance.kernels import launch

    numel, launch.GUIDE_NUMEL = launch.GUIDE_NUMEL, 0
    try:
        return triton(x, c, u, m)
    finally:
        launch.GUIDE_NUMEL = numel


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
            raise SystemExit(f"{name} is wrong: relative RMS error {errors[name]:.2e}, allowed {limit:.0e}")
    return errors


def quantiles(times):
    """20 %, 50 % and 80 % of the times, in microseconds."""
    cuts = statistics.quantiles(times, n=10, method="inclusive")
    return {"p20": cuts[1], "median": statistics.median(times), "p80": cuts[7]}


def time_on_gpu(function, sets):
    """Microseconds a call, from replays of one CUDA graph that cycles through all input sets."""
    for _ in range(3):
        function(*sets[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for inputs in sets:
            function(*inputs)
    times = []
    for i in range(REPEATS + 5):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        if i >= 5:
            times.append(start.elapsed_time(stop) * 1000 / len(sets))
    return quantiles(times)


def time_on_cpu(function, sets):
    """Microseconds a call, by the clock."""
    times = []
    for i in range(12):
        start = time.perf_counter()
        function(*sets[i % len(sets)])
        if i >= 2:
            times.append((time.perf_counter() - start) * 1e6)
    return quantiles(times)


def copy_bandwidth():
    """Bytes read and written per second by a copy of 1 GiB."""
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    microseconds = time_on_gpu(lambda: target.copy_(source), [()])["median"]
    return 2 * source.nbytes / microseconds * 1e6


def bytes_moved(shape, dtype, launches):
    """Bytes that must move: (x, c, u) and momentum in for each pass; prediction and momentum out once."""
    size = dtype.itemsize
    return torch.Size(shape).numel() * (launches * (3 * size + 4) + size + 4)


def launches_of(name, shape):
    """How many launches Triton takes at this size on this machine."""
    from diffusers_guidance.kernels import launch

    if name.endswith("two launches"):
        return 2
    numel = torch.Size(shape[1:]).numel()
    return 1 if numel <= launch.GUIDE_NUMEL * launch.ctas_of(numel, torch.device("cuda", 0)) else 2


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


def measure(device):
    """One row per size, batch, dtype and candidate."""
    on_gpu = device == "cuda"
    bandwidth = copy_bandwidth() if on_gpu else None
    if bandwidth:
        print(f"copy bandwidth {bandwidth / 1e9:.0f} GB/s", flush=True)
    rows = []
    for size, shape in SIZES.items():
        if not on_gpu and len(shape) > 3:
            continue  # video belongs on a GPU
        for batch in (1, 8) if on_gpu else (1,):
            for dtype in DTYPES if on_gpu else DTYPES[:1]:
                rows += measure_one(size, (batch, *shape), dtype, device, bandwidth)
    return bandwidth, rows


def measure_one(size, shape, dtype, device, bandwidth):
    on_gpu = device == "cuda"
    candidates = {"diffusers": of_diffusers, "reference": reference}
    if on_gpu:
        torch.compiler.reset()
        candidates["compiled"] = torch.compile(reference, dynamic=False)
        candidates["Triton"] = triton
        if len(shape) == 4:
            candidates["Triton, two launches"] = two_launches
    one_set = torch.Size(shape).numel() * (3 * dtype.itemsize + 4)
    count = min(64, max(2, ROTATED // one_set + 1)) if on_gpu else 2
    sets = [draw(shape, dtype, device) for _ in range(count)]
    errors = check(candidates, sets[0])
    rows = []
    for name, function in candidates.items():
        times = (time_on_gpu if on_gpu else time_on_cpu)(function, sets)
        row = {"size": size, "batch": shape[0], "dtype": str(dtype).removeprefix("torch."), "candidate": name}
        row |= {"microseconds": times, "relative_rms_error": errors[name], "input_sets": count}
        if name.startswith("Triton"):
            row["launches"] = launches_of(name, shape)
            row["bytes"] = bytes_moved(shape, dtype, row["launches"])
            row["share_of_copy_bandwidth"] = row["bytes"] / times["median"] * 1e6 / bandwidth
        rows.append(row)
        print(f"{size:20} x{shape[0]} {row['dtype']:9} {name:22} {times['median']:10.1f} us", flush=True)
    return rows


def table(rows):
    """The rows in Markdown, one line per size, batch and dtype."""
    names = list(dict.fromkeys(row["candidate"] for row in rows))
    lines = ["| latents | batch | dtype | " + " | ".join(f"{name}, us" for name in names) + " | of copy bandwidth |"]
    lines.append("|---" * 3 + "|---:" * (len(names) + 1) + "|")
    for key in dict.fromkeys((row["size"], row["batch"], row["dtype"]) for row in rows):
        found = {r["candidate"]: r for r in rows if (r["size"], r["batch"], r["dtype"]) == key}
        cells = [f"{found[n]['microseconds']['median']:.1f}" if n in found else "" for n in names]
        share = found.get("Triton", {}).get("share_of_copy_bandwidth")
        lines.append(f"| {' | '.join(map(str, (*key, *cells)))} | {'' if share is None else f'{share:.0%}'} |")
    return "\n".join(lines) + "\n"


def plot(rows, title, path):
    """Time by size at batch 1, one line per candidate; the first half-precision dtype measured, else float32."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    dtype = "float16" if any(row["dtype"] == "float16" for row in rows) else "float32"
    shown = [row for row in rows if row["batch"] == 1 and row["dtype"] == dtype]
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name in dict.fromkeys(row["candidate"] for row in shown):
        mine = [row for row in shown if row["candidate"] == name]
        medians = [row["microseconds"]["median"] for row in mine]
        low = [row["microseconds"]["median"] - row["microseconds"]["p20"] for row in mine]
        high = [row["microseconds"]["p80"] - row["microseconds"]["median"] for row in mine]
        axes.errorbar([row["size"] for row in mine], medians, [low, high], marker="o", capsize=3, label=name)
    axes.set(yscale="log", ylabel="microseconds a guidance step", title=f"{title}, {dtype}, batch 1")
    axes.legend()
    figure.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results"))
    out = parser.parse_args().out
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        print("No GPU: this measures only the CPU path and says nothing about the kernels' speed.")
    torch.manual_seed(0)
    with torch.inference_mode():
        bandwidth, rows = measure(device)
    out.mkdir(parents=True, exist_ok=True)
    here = machine(device)
    result = {"machine": here, "copy_bandwidth_bytes_per_second": bandwidth, "rows": rows}
    (out / "kernels.json").write_text(json.dumps(result, indent=1) + "\n")
    (out / "kernels.md").write_text(table(rows))
    plot(rows, here.get("gpu", "CPU"), out / "kernels.png")
    print(f"\n{table(rows)}\nwritten to {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
