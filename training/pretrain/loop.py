"""The training loop. Plain torch: no Ray here, no files but through `Sink`.

One step: the global batch's micro-batches of this worker, the sum of masked cross-entropies divided by the
global number of masked residues (sums and counts reduced apart, divided last), one optimiser update. So one
worker and several do the same up to rounding, and gradient accumulation changes nothing but memory.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from bioseq.backbones.packed.encoder import PackedEncoder
from bioseq.errors import BioseqError
from bioseq.specs.pretrain import PretrainSpec
from training.corpus.corpus import Corpus
from training.pretrain.batches import Batches, prefetch
from training.pretrain.distributed.parallel import Trainee
from training.pretrain.distributed.team import Team
from training.pretrain.evaluate import perplexity
from training.pretrain.flops import peak_flops
from training.pretrain.initial import initialise
from training.pretrain.records.checkpoint import Checkpoint
from training.pretrain.schedule import factor
from training.pretrain.setup import check_resume, model_config


class DivergedError(BioseqError):
    """The loss or the gradient is not a finite number."""

    code = "training.diverged"


class Sink(Protocol):
    """Where a run's results go. Called on every worker; only the main one has tensors to write."""

    def metrics(self, row: dict[str, Any]) -> None: ...

    def checkpoint(self, state: dict[str, Any], trainee: Trainee) -> None: ...

    def best(self, state: dict[str, Any], trainee: Trainee) -> None: ...

    def last_good(self) -> str: ...


@dataclass
class Outcome:
    """What a run ended with. `evals` are the last step's perplexities by set."""

    step: int
    tokens: int
    evals: dict[str, Any] = field(default_factory=dict)
    best: dict[str, Any] = field(default_factory=dict)


def train(
    spec: PretrainSpec,
    corpus: Corpus,
    team: Team,
    sink: Sink,
    *,
    start: Checkpoint | None = None,
    init: PackedEncoder | None = None,
    stop_after: int | None = None,
    hook: Callable[[int], None] = lambda step: None,
) -> Outcome:
    """Train from `start` (or from `init`, or from scratch) to the last step. `stop_after` ends early, as a
    kill would, but cleanly; `hook` is called after every step (tests break things there).

    Raises `DivergedError`, `CheckpointError`, `SpecError`.
    """
    encoder = init or PackedEncoder(model_config(spec))
    if init is None and start is None:
        initialise(
            encoder,
            kind=spec.model.init,
            std=spec.model.init_std,
            seed=spec.seed,
            frequencies=corpus.frequencies(),
        )
    trainee = Trainee(encoder, spec, team)
    first, tokens = 0, 0
    best: dict[str, Any] = {"loss": math.inf}
    if start is not None:
        check_resume(spec, corpus.hash, start.state)
        trainee.load(start.model(), start.optimizer())
        first, tokens = start.step, int(start.state["tokens"])
        best = dict(start.state["best"])
        if best.get("loss") is None:
            best["loss"] = math.inf
    batches = Batches(spec, corpus)
    sets = corpus.sets()
    peak = (spec.peak_tflops * 1e12 or peak_flops(team.device, spec.precision)) * team.world
    evals: dict[str, Any] = {}

    def state(done: int) -> dict[str, Any]:
        shown = {**best, "loss": None if math.isinf(best["loss"]) else best["loss"]}
        return {
            "step": done,
            "tokens": tokens,
            "best": shown,
            "spec": spec.to_dict(),
            "corpus": corpus.hash,
            "architecture": encoder.config.to_dict(),
            "hardware": team.hardware,
            "torch": torch.__version__,
        }

    def evaluate(done: int, proteins: int, passes: int) -> dict[str, Any]:
        # Compiled layers would be compiled again for this; as they are they take seconds.
        with torch.compiler.set_stance("force_eager") if spec.compile else contextlib.nullcontext():
            return {
                name: perplexity(
                    encoder,
                    members,
                    seed=spec.eval.seed,
                    proteins=proteins,
                    passes=passes,
                    alphabet=batches.alphabet,
                    budget=min(spec.micro_tokens, 16384),
                    precision=spec.precision,
                    team=team,
                    evidence=corpus.evidence.of_set(name)
                    if corpus.evidence and spec.model.reads_homologs
                    else None,
                )
                for name, members in sets.items()
                if members
            }

    window = _Window()
    saved_at, last_saved = time.monotonic(), first
    end = spec.steps if stop_after is None else min(spec.steps, stop_after)
    source = prefetch(
        lambda s: batches.step(s, team.rank, team.world),
        first,
        end,
        workers=min(4, len(os.sched_getaffinity(0)) - 1) if team.device.type == "cuda" else 0,
    )
    for part in source:
        step = part.step
        began = time.monotonic()
        count = team.sum(float(sum(len(m.targets) for m in part.micros)))[0]
        sums = [
            trainee.backward(micro, 1.0 / max(count, 1.0), last=i == len(part.micros) - 1)
            for i, micro in enumerate(part.micros)
        ]
        loss = team.sum(sum(map(float, sums)))[0] / max(count, 1.0)
        lr = spec.optimiser.lr * factor(step, spec.steps, spec.schedule)
        norm = trainee.step(lr) if math.isfinite(loss) else math.nan
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise _diverged(step, loss, norm, part.records, sink.last_good())
        tokens += part.tokens
        done = step + 1
        window.add(loss, norm, part.tokens, time.monotonic() - began, part.mean_length)
        hook(step)
        if done % spec.log_every == 0 or done == end:
            sink.metrics(
                {"kind": "train", "step": done, "lr": lr, "tokens": tokens, **window.row(encoder, peak, spec)}
            )
            window = _Window()
        if spec.eval.every and done % spec.eval.every == 0 and done < spec.steps:
            evals = evaluate(done, spec.eval.proteins, spec.eval.passes)
            if evals:
                sink.metrics({"kind": "eval", "step": done, "tokens": tokens, "sets": evals})
                mean = float(np.mean([e["loss"] for e in evals.values()]))
                if mean < best["loss"]:
                    best = {"step": done, "loss": mean, "sets": evals}
                    sink.best(state(done), trainee)
        due = spec.checkpoint_minutes and time.monotonic() - saved_at > 60 * spec.checkpoint_minutes
        if spec.checkpoint_minutes and team.world > 1:
            due = (
                team.sum(float(bool(due)) if team.is_main else 0.0)[0] > 0
            )  # the main process's clock counts
        # The last step's checkpoint follows the last evaluation, so that it knows the best step.
        if done < spec.steps and (due or done % spec.checkpoint_every == 0):
            sink.checkpoint(state(done), trainee)
            saved_at, last_saved = time.monotonic(), done
    if end == spec.steps and first <= end:
        evals = evaluate(end, spec.eval.proteins, spec.eval.passes)
        mean = float(np.mean([e["loss"] for e in evals.values()])) if evals else -math.inf
        if mean < best["loss"] or not evals:
            best = {"step": end, "loss": mean if evals else math.inf, "sets": evals}
            sink.best(state(end), trainee)
        if evals:
            sink.metrics({"kind": "eval", "step": end, "tokens": tokens, "sets": evals})
        sink.checkpoint(state(end), trainee)
    elif last_saved < end:
        sink.checkpoint(state(end), trainee)
    return Outcome(end, tokens, evals, best)


class _Window:
    """Sums over the steps between two log lines."""

    def __init__(self) -> None:
        self.steps = self.tokens = 0
        self.loss = self.norm = self.seconds = self.length = 0.0

    def add(self, loss: float, norm: float, tokens: int, seconds: float, length: float) -> None:
        self.steps += 1
        self.tokens += tokens
        self.loss += loss
        self.norm += norm
        self.seconds += seconds
        self.length += length * tokens

    def row(self, encoder: PackedEncoder, peak: float, spec: PretrainSpec) -> dict[str, Any]:
        c = encoder.config
        # Forward once, backward twice; the end of the last layer and the LM head at the chosen residues only.
        spared = 2.0 * (c.d_model**2 + 2 * c.d_model * c.d_ff) * (1 - spec.masking.rate)
        dense = c.flops_per_token(self.length / max(self.tokens, 1)) - spared
        head = c.flops_per_token(0, lm_head=True) - c.flops_per_token(0)
        rate = self.tokens / max(self.seconds, 1e-9)
        return {
            "loss": self.loss / self.steps,
            "perplexity": math.exp(min(self.loss / self.steps, 50.0)),
            "grad_norm": self.norm / self.steps,
            "tokens_per_s": rate,
            "mfu": 3 * (dense + head * spec.masking.rate) * rate / peak if peak else None,
            "seconds": self.seconds,
        }


def _diverged(step: int, loss: float, norm: float, records: np.ndarray, last_good: str) -> DivergedError:
    shown = ", ".join(map(str, records[:20].tolist()))
    more = f" and {len(records) - 20} more" if len(records) > 20 else ""
    return DivergedError(
        f"step {step}: the loss is {loss} and the gradient's norm {norm}. "
        f"The batch's records in the corpus: {shown}{more}. Last good checkpoint: {last_good}.",
        hint="Resume from it with a lower optimiser.lr in a new run (--init), or look at these records.",
    )
