"""The training loop that autoencoder and UNet share: Muon, averaged weights, a schedule over time, checkpoints.

Weights are float32; gradients come from a copy in the compute type. Several one-thread processes (`workers`) share the
gradients over gloo. On shared cores they only slow down, while one process with several threads stalls.
"""

import copy
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from safetensors.torch import save as serialize
from torch import Tensor, nn
from tqdm import tqdm

from diffusers_guidance.files import write

Loss = Callable[[nn.Module, torch.Generator, float], dict[str, Tensor]]
"""loss(model, generator, progress from 0 to 1): named terms, whose sum is minimised; means over a worker's share."""


@dataclass(frozen=True)
class Plan:
    """How long to train, and how fast: one schedule for the whole run, if its length can be foreseen.

    To continue after its end, the rate has to rise again. A rise to the full rate made an earlier model worse; a rise
    to half of it (`flat` 0 and twice the `minutes`) made the model that ships better.

    Args:
        minutes: Wall-clock time of the run (all its parts, if it was interrupted); None if `steps` decides.
        steps: Number of steps instead of a time.
        muon: Peak learning rate of matrices and convolutions, relative to the spectral norm.
        adam: Peak learning rate of everything else.
        warmup: Steps until the peak.
        flat: Share of the run at the peak; after it the rate falls linearly to `end`. With 1, `branch` ends the run
        later.
        end: Share of the peak at the end.
        average: Decay of the exponential average of the weights, a step.
        save_every: Seconds between checkpoints.
    """

    minutes: float | None = None
    steps: int | None = None
    muon: float = 0.02
    adam: float = 1e-3
    warmup: int = 40
    flat: float = 0.35
    end: float = 0.02
    average: float = 0.998
    save_every: float = 120.0

    def progress(self, step: int, seconds: float) -> float:
        """The share of the run that is done, 0 to 1."""
        return min(1.0, step / self.steps if self.steps else seconds / (60 * (self.minutes or 1)))

    def factor(self, step: int, progress: float) -> float:
        """The factor of the peak learning rates."""
        decay = 1 - (1 - self.end) * max(0.0, progress - self.flat) / max(1 - self.flat, 1e-9)
        return min(1.0, (step + 1) / self.warmup) * decay


def orthogonalised(update: Tensor, steps: int = 5) -> Tensor:
    """Roughly the nearest matrices with orthonormal rows or columns, for a batch (B, M, N) with M <= N.

    Newton-Schulz iteration of Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/).
    """
    x = update / (update.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


class Muon:
    """Muon for weights of two dimensions and more (convolutions as (out, in x height x width)), AdamW for the rest.

    Every worker holds all weights and momenta; the expensive Newton-Schulz steps of each shape are divided among them.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], plan: Plan, adam_only: Sequence[nn.Parameter] = ()):
        few = {id(p) for p in adam_only}
        self.plan = plan
        self.matrices = [p for p in parameters if p.ndim > 1 and id(p) not in few]
        self.rest = [p for p in parameters if p.ndim < 2 or id(p) in few]
        self.momentum = [torch.zeros_like(p) for p in self.matrices]
        self.adam = torch.optim.AdamW(self.rest, lr=plan.adam, betas=(0.9, 0.97), weight_decay=0.0)
        world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
        shapes = [tuple(sorted(p.flatten(1).shape)) for p in self.matrices]
        load = [0] * world
        self.mine: dict[tuple[int, ...], list[int]] = {}
        for i in sorted(range(len(shapes)), key=lambda i: shapes[i], reverse=True):
            short, long = shapes[i]
            worker = load.index(min(load))
            load[worker] += short**2 * (2 * long + short)  # of one Newton-Schulz step
            if worker == rank:
                self.mine.setdefault(shapes[i], []).append(i)
        self.type = torch.bfloat16 if _bfloat16_pays() else torch.float32

    @torch.no_grad()
    def step(self, factor: float) -> None:
        for group in self.adam.param_groups:
            group["lr"] = self.plan.adam * factor
        self.adam.step()
        updates = [torch.zeros(p.shape, dtype=self.type, device=p.device) for p in self.matrices]
        for p, momentum in zip(self.matrices, self.momentum, strict=True):
            assert p.grad is not None
            momentum.lerp_(p.grad, 0.05)
            p.grad.lerp_(momentum, 0.95)  # Nesterov
        for members in self.mine.values():
            flats = [self.matrices[i].grad.flatten(1).to(self.type) for i in members]  # type: ignore[union-attr]
            wide = [f.shape[0] <= f.shape[1] for f in flats]
            batch = orthogonalised(torch.stack([f if w else f.mT for f, w in zip(flats, wide, strict=True)]))
            for i, x, w in zip(members, batch, wide, strict=True):
                updates[i].copy_((x if w else x.mT).reshape(updates[i].shape))
        if dist.is_initialized():
            _sum_over_workers(updates)
        for p, update in zip(self.matrices, updates, strict=True):
            rows, columns = p.flatten(1).shape
            p.add_(update, alpha=-self.plan.muon * factor * math.sqrt(max(1.0, rows / columns)))

    def state(self) -> dict[str, Tensor]:
        states = self.adam.state
        found = {f"momentum.{i}": m for i, m in enumerate(self.momentum)}
        for i, p in enumerate(self.rest):
            found |= {f"adam.{i}.{k}": v for k, v in states[p].items()}
        return found

    def load(self, state: dict[str, Tensor]) -> None:
        if not state:  # only weights, see `save_weights`
            return
        for i, m in enumerate(self.momentum):
            m.copy_(state[f"momentum.{i}"])
        for i, p in enumerate(self.rest):
            prefix = f"adam.{i}."
            found = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            self.adam.state[p] = {k: v if k == "step" else v.to(p.device) for k, v in found.items()}


def _sum_over_workers(tensors: Sequence[Tensor]) -> None:
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat)
    for t, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        t.copy_(part.view(t.shape))


def _bfloat16_pays() -> bool:
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    return "avx512_bf16" in (Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else "")


_BAR = "{desc} {percentage:3.0f}% |{bar:20}| {elapsed} {postfix}"


class Trainer:
    """One run in one folder: `state.safetensors`, `state.json` and `log.jsonl`; continues where it was interrupted.

    Args:
        model: Float32 weights; parts without gradients stay as they are.
        loss: What to minimise; it is called with the copy of the model in the compute type.
        plan: How long and how fast.
        folder: Where checkpoints go.
        adam_only: Weights of two dimensions that Muon should leave alone (embeddings, first and last layers).
        seed: Every step draws from a generator of its own, so a continued run draws what an uninterrupted one does.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        plan: Plan,
        folder: Path,
        adam_only: Sequence[nn.Parameter] = (),
        seed: int = 0,
    ):
        self.model = model.to("cuda" if torch.cuda.is_available() else "cpu")
        self.loss, self.plan, self.folder, self.seed = loss, plan, folder, seed
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = Muon(self.parameters, plan, adam_only)
        self.average = copy.deepcopy(model).requires_grad_(False)
        self.copy = copy.deepcopy(model).to(torch.bfloat16 if _bfloat16_pays() else torch.float32)
        self.step, self.seconds = 0, 0.0
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        if (folder / "state.json").exists():
            self._load()

    def run(self, until: int | None = None) -> nn.Module:
        """Trains to the end of the plan (or to step `until`); returns the averaged model."""
        self.folder.mkdir(parents=True, exist_ok=True)
        last = saved = time.monotonic()
        sums: dict[str, float] = {}
        counted = 0
        bar = tqdm(total=100, unit="%", desc=self.folder.name, disable=self.rank > 0, bar_format=_BAR)
        while (progress := self._shared(self.plan.progress(self.step, self.seconds))) < 1 and self.step != until:
            self._update_copy()
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.step) * 64 + self.rank)
            parts = self.loss(self.copy, generator, progress)
            torch.stack([part.float() for part in parts.values()]).sum().backward()
            self._take_gradients()
            factor = self.plan.factor(self.step, progress)
            self.optimizer.step(factor)
            self._update_average()
            self.step += 1
            for name, part in parts.items():
                sums[name] = sums.get(name, 0.0) + float(part.detach())
            counted += 1
            now = time.monotonic()
            self.seconds, last = self.seconds + now - last, now
            if self.step % 25 == 0 and self.rank == 0:
                line = {"step": self.step, "seconds": round(self.seconds), "rate": round(factor, 4)}
                line |= {name: round(value / counted, 5) for name, value in sums.items()}
                bar.set_postfix(line)
                bar.update(100 * progress - bar.n)
                with (self.folder / "log.jsonl").open("a") as log:
                    log.write(json.dumps(line) + "\n")
                sums, counted = {}, 0
            if self.rank == 0 and now - saved > self.plan.save_every:
                self.save()
                saved = now
        bar.close()
        if self.rank == 0:
            self.save()
        if self.world > 1:
            dist.barrier()
        return self.average

    def save(self) -> None:
        """Writes the checkpoint; if it is interrupted, the checkpoint before it stays."""
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"average.{k}": v for k, v in self.average.state_dict().items()}
        tensors |= {f"optimizer.{k}": v for k, v in self.optimizer.state().items()}
        _write(tensors, self.folder, self.step, self.seconds)

    def _load(self) -> None:
        tensors = load_file(self.folder / "state.safetensors")
        for module, name in ((self.model, "model."), (self.average, "average.")):
            module.load_state_dict({k.removeprefix(name): v for k, v in tensors.items() if k.startswith(name)})
        name = "optimizer."
        self.optimizer.load({k.removeprefix(name): v for k, v in tensors.items() if k.startswith(name)})
        about = json.loads((self.folder / "state.json").read_text())
        self.step, self.seconds = about["step"], about["seconds"]

    def _shared(self, progress: float) -> float:
        if self.world == 1:
            return progress
        shared = torch.tensor([progress], dtype=torch.float64)
        dist.broadcast(shared, 0)
        return float(shared)

    @torch.no_grad()
    def _update_copy(self) -> None:
        for p, q in zip(self.model.parameters(), self.copy.parameters(), strict=True):
            q.copy_(p)

    @torch.no_grad()
    def _take_gradients(self) -> None:
        pairs = zip(self.model.parameters(), self.copy.parameters(), strict=True)
        pairs_ = [(p, q) for p, q in pairs if p.requires_grad]
        gradients = [torch.zeros_like(p) if q.grad is None else q.grad.float() for p, q in pairs_]
        if self.world > 1:
            _sum_over_workers(gradients)
        for (p, q), gradient in zip(pairs_, gradients, strict=True):
            p.grad, q.grad = gradient.div_(self.world), None
        nn.utils.clip_grad_norm_(self.parameters, 1.0)

    @torch.no_grad()
    def _update_average(self) -> None:
        decay = min(self.plan.average, (1 + self.step) / (10 + self.step))
        for p, a in zip(self.model.parameters(), self.average.parameters(), strict=True):
            a.lerp_(p, 1 - decay)


def save_weights(model: nn.Module, folder: Path) -> None:
    """Writes a checkpoint, so that a run begins with the weights of `model`."""
    folder.mkdir(parents=True, exist_ok=True)
    state = model.state_dict()
    both = {f"{kind}.{k}": v.clone() for kind in ("model", "average") for k, v in state.items()}
    _write(both, folder, step=0, seconds=0.0)


def branch(folder: Path, to: Path) -> None:
    """Begins a run in `to` that continues from the checkpoint in `folder` with its own plan. It does so only once.

    Its steps count on, so it draws what the first run would have drawn; its time begins at 0.
    """
    if (to / "state.json").exists():
        return
    to.mkdir(parents=True, exist_ok=True)
    _write(load_file(folder / "state.safetensors"), to, json.loads((folder / "state.json").read_text())["step"], 0.0)


def _write(tensors: dict[str, Tensor], folder: Path, step: int, seconds: float) -> None:
    about = json.dumps({"step": step, "seconds": seconds})
    tensors = {k: v.contiguous() for k, v in tensors.items()}
    write(folder / "state.safetensors", serialize(tensors, {"about": about}))
    write(folder / "state.json", about.encode())


def start(train: Callable[..., Any], workers: int, *arguments: Any) -> None:
    """Calls `train(*arguments)` in `workers` processes of one thread that share gradients; if 1, in this process."""
    if workers == 1:
        train(*arguments)
        return
    import tempfile

    with tempfile.TemporaryDirectory() as meeting:
        torch.multiprocessing.spawn(_work, (train, workers, f"file://{meeting}/store", arguments), nprocs=workers)


def _work(rank: int, train: Callable[..., Any], workers: int, meeting: str, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=workers)
    train(*arguments)
    dist.destroy_process_group()
