"""The policy search of Adaptive Guidance (arXiv 2312.12487, section 4): a schedule learned by gradient descent.

Every step holds a softmax over the options of the paper: the unconditional prediction alone, the conditional one
alone, or guidance at one of k strengths. Their mixture is one linear combination,

    g = c + kappa d        d = c - u        kappa = -p_uncond + sum over k of p_k (w_k - 1)

so the relaxed search is a guidance rule with its own kappa at each step. It runs in the unmodified pipeline with
gradients on, through formula, scheduler and network to the final latents.
"""

import json
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open
from safetensors.torch import save as serialize
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from diffusers_guidance import kernels
from diffusers_guidance.errors import CalibrationMismatch, UnsupportedPipeline
from diffusers_guidance.files import write
from diffusers_guidance.pipelines.attach.fingerprint import module_fingerprints, scheduler_fingerprint
from diffusers_guidance.pipelines.pictures.columns import Column
from diffusers_guidance.pipelines.pictures.make import Case, make
from diffusers_guidance.pipelines.pictures.texts import prompts_of
from diffusers_guidance.pipelines.support.progress import Progress, silent
from diffusers_guidance.policies import EveryStep, Schedule
from diffusers_guidance.rules import CFG, Coefficients, Gram, Rule
from diffusers_guidance.scales import Given, for_all
from diffusers_guidance.steps import Step

NETWORKS = ("unet", "transformer")


@dataclass(frozen=True)
class Mixture(Rule):
    """g = c + kappa d with its own kappa at every step."""

    kappas: Sequence[Tensor] | Tensor = ()

    def at(self, step: Step) -> Rule:
        return replace(self, guidance_scale=step.w, kappas=self.kappas[step.index : step.index + 1])

    def coefficients(self, gram: Gram, b: float) -> Coefficients:
        return Coefficients(0.0, 1.0, self.kappas[0], 0.0)


def search_nas(
    pipe: DiffusionPipeline,
    prompts: Sequence[str],
    nfe: int,
    *,
    num_inference_steps: int = 20,
    guidance_scale: Given = 5.0,
    strengths: Sequence[float] = (1.0,),
    iterations: int = 60,
    batch_size: int = 2,
    rate: float = 0.2,
    penalty: float = 1.0,
    seed: int = 0,
    path: str | Path | None = None,
    progress: Progress | None = None,
    **arguments: Any,
) -> Schedule:
    """Finds the schedule of full and conditional evaluations that replicates full guidance best, by gradient descent.

    The paper uses 10 000 pairs of noise and picture and 1.5 GPU days. Here pairs are made when needed, and the
    defaults use 120, which takes minutes on a bundled model on a CPU.

    Args:
        prompts: iteration i takes the next `batch_size` of them, with its own seed.
        nfe: the budget of network evaluations for one sample: from the number of steps plus one to twice the number of
            steps; each stage of a two-stage solver counts as a step.
        guidance_scale: the scale of the guidance to replicate; it may be a schedule (`scales`).
        strengths: the scales w to choose from at each step, as multiples of full guidance's. A `Schedule` has one
            scale: with several, steps that choose any of them become "both".
        iterations: steps of Adam on the logits, whose softmax hardens over time.
        batch_size: runs in one such step.
        rate: Adam's learning rate.
        penalty: weight of the expected NFEs beyond `nfe`, as a share of the steps, added to the loss. The loss is the
            squared error of the final latents, relative to that without guidance.
        path: safetensors file to write after every iteration; another call continues from it.
        arguments: more arguments of the pipeline.

    Returns:
        A `Schedule`: "both" where guidance was most probable, within the budget; "conditional" elsewhere.

    Raises:
        CalibrationMismatch: the file at `path` is of another search.
    """
    prompts, progress = prompts_of(prompts), progress or silent
    for_all(guidance_scale, "all runs of the search have one")
    call = dict(num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, **arguments)
    about = {
        "networks": module_fingerprints(pipe, NETWORKS), "scheduler": scheduler_fingerprint(pipe.scheduler),
        "prompts": prompts, "nfe": nfe, "call": repr(call), "strengths": list(strengths), "iterations": iterations,
        "batch_size": batch_size, "rate": rate, "penalty": penalty, "seed": seed,
    }  # fmt: skip
    state = None if path is None else State(Path(path), about)
    made_before, logits, optimizer = (0, None, None) if state is None else state.read(rate)
    with kernels.use_backend("torch"), checkpointed(pipe):
        for i in range(made_before, iterations):
            progress("policy search", i, iterations)
            texts = [prompts[(i * batch_size + j) % len(prompts)] for j in range(batch_size)]

            def run(rule: Rule, texts: list[str] = texts, i: int = i) -> tuple[Tensor, Tensor]:
                return _run(pipe, rule, texts, seed + i * batch_size, call)

            with torch.no_grad():
                target, scale = run(CFG())
                steps = len(scale)  # evaluations: a two-stage solver makes two a step
                if not steps < nfe <= 2 * steps:
                    raise ValueError(f"nfe={nfe!r}: from {steps + 1} to {2 * steps} for these {steps} evaluations")
                plain = run(Mixture(kappas=torch.zeros(steps)))[0]
            if logits is None:
                logits = torch.zeros(steps, 2 + len(strengths))  # unconditional, conditional, the strengths
                logits[:, 2:] += 1.0
                optimizer = torch.optim.Adam([logits.requires_grad_()], rate)
            assert optimizer is not None
            hardness = 1 + 3 * i / iterations
            shares = (hardness * logits).softmax(-1)
            kappas = -shares[:, 0] + (shares[:, 2:] * (scale[:, None] * torch.tensor(strengths) - 1)).sum(-1)
            with torch.enable_grad():
                made, _ = run(Mixture(kappas=kappas.to(target.device)))
                error = (made - target).square().mean() / (plain - target).square().mean().clamp(min=1e-12)
                spent = steps + shares[:, 2:].sum()
                loss = error + penalty * (spent - nfe).clamp(min=0).to(error) / steps
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if state is not None:
                state.write(i + 1, logits, optimizer)
    assert logits is not None
    guided = logits.detach().softmax(-1)[:, 2:].sum(-1)
    guided[0] = math.inf  # the first evaluation of a run is always full
    chosen = guided.topk(max(1, min(len(guided), nfe - len(guided)))).indices.tolist()
    return Schedule(["both" if t in chosen else "conditional" for t in range(len(guided))])


class State:
    """How far a search is, in a file: what is searched, and what Adam keeps of it.

    Args:
        file: its path.
        about: what the search depends on, by name.
    """

    MOMENTS = ("step", "exp_avg", "exp_avg_sq")

    def __init__(self, file: Path, about: dict[str, Any]):
        self.file, self.about = file, json.dumps(about, sort_keys=True)

    def read(self, rate: float) -> tuple[int, Tensor | None, torch.optim.Adam | None]:
        """Iterations made, the logits, and their optimizer; 0 and nothing if there is no file."""
        if not self.file.is_file():
            return 0, None, None
        with safe_open(self.file, "pt") as content:
            said = content.metadata() or {}
            if said.get("search") != self.about:
                raise CalibrationMismatch(f"{self.file} is of another search: choose another file, or delete it")
            logits = content.get_tensor("logits").requires_grad_()
            optimizer = torch.optim.Adam([logits], rate)
            optimizer.state[logits] = {name: content.get_tensor(name) for name in self.MOMENTS}
        return int(said["iterations"]), logits, optimizer

    def write(self, iterations: int, logits: Tensor, optimizer: torch.optim.Adam) -> None:
        tensors = {"logits": logits.detach(), **{name: optimizer.state[logits][name] for name in self.MOMENTS}}
        write(self.file, serialize(tensors, {"search": self.about, "iterations": str(iterations)}))


def _run(pipe: Any, rule: Rule, texts: list[str], seed: int, call: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """(final latents, w of each step): of a run that records operations wherever gradients are on."""
    cases, call = [Case(text, seed + j, "") for j, text in enumerate(texts)], dict(call)
    steps = call.pop("num_inference_steps")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Converting a tensor with requires_grad=True")
        made = make(
            pipe, cases, Column("", rule, EveryStep()), steps=steps, gradients=True, output_type="latent", **call
        )
    (report,) = made.reports
    if not report.is_guided:
        raise UnsupportedPipeline(f"{type(pipe).__name__} used no guidance at guidance_scale={call['guidance_scale']}")
    # If a pipeline counts its scale from 0, w is not the call's value; 1 means no guidance.
    return torch.stack(made.pictures), torch.tensor([step.guidance_scale or 1.0 for step in report.steps])


@contextmanager
def checkpointed(pipe: Any) -> Iterator[None]:
    """Frees the activations of the denoisers' forward passes, and recomputes them when gradients need them."""
    modules = [getattr(pipe, name) for name in NETWORKS if getattr(pipe, name, None) is not None]
    if not modules:
        raise UnsupportedPipeline(f"{type(pipe).__name__} has neither unet nor transformer to search policies for")
    frozen = [p for part in pipe.components.values() if isinstance(part, torch.nn.Module) for p in part.parameters()]
    frozen = [p for p in frozen if p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    replaced = []
    for module in modules:
        had, forward = "forward" in vars(module), module.forward
        replaced.append((module, had, forward))

        def again(*args: Any, forward: Callable = forward, **kwargs: Any) -> Any:
            return checkpoint(forward, *args, use_reentrant=False, **kwargs)

        vars(module)["forward"] = again
    try:
        yield
    finally:
        for module, had, forward in replaced:
            if had:
                vars(module)["forward"] = forward
            else:
                del vars(module)["forward"]
        for parameter in frozen:
            parameter.requires_grad_(True)
