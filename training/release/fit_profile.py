"""Fits the strengths of the profile (`bioseq/homologs/parameters.json`) by masked likelihood.

    python -m training.release.fit_profile --data DIR --work DIR

Queries are the representatives of 1,000 development clusters with 15 % of the residues hidden, from the search too;
the reference set is the shipped one without them. So that near relatives are weighted well too, a quarter of the
queries is also searched in the whole training file, hits above 95 % identity left out. Half of the proteins fit, the
other half measure; then all of them fit what is written.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from bioseq.homologs.database import LETTERS, OTHER
from bioseq.homologs.hits import Hits, encode
from bioseq.homologs.matrix import BACKGROUND, spectrum
from bioseq.homologs.profile import ProfileParameters, binned_counts, composition
from bioseq.homologs.reference import ReferenceSet, build_reference, open_reference
from bioseq.homologs.search import search
from bioseq.homologs.settings import SearchSettings
from bioseq.sequences.fasta import read_fasta
from training.release.make_reference import TRAIN, development_clusters, representatives

EDGES = (0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.75)
SCALE = 12.0
PLACES = 30_000  # drawn for a fit; more change nothing in the third figure
SMOOTH = 2e-4  # penalty on the difference of neighbouring classes


def hide(sequence: str, name: str, share: float = 0.15) -> str:
    """The sequence with this share of its known residues as X, the same ones at every call."""
    draw = random.Random("mask" + name)
    known = [i for i, letter in enumerate(sequence) if letter in LETTERS]
    text = list(sequence)
    for i in draw.sample(known, min(max(1, round(share * len(sequence))), len(known))):
        text[i] = "X"
    return "".join(text)


@dataclass(slots=True)
class Observations:
    """Hidden places P: binned counts [P, B, 20], compositions [P, 20], the residue [P], Neff [P], half [P]."""

    counts: torch.Tensor
    whole: torch.Tensor
    local: torch.Tensor
    truth: torch.Tensor
    neff: torch.Tensor
    half: torch.Tensor


def observe(hits: list[Hits], sequences: list[str], names: list[str]) -> Observations:
    parts: list[list[np.ndarray]] = [[] for _ in range(6)]
    for one, sequence, name in zip(hits, sequences, names, strict=True):
        truth = encode(sequence)
        at = np.flatnonzero((encode(one.query) == OTHER) & (truth < OTHER))
        counts, neff = binned_counts(one, EDGES)
        whole, local = composition(one.query, SCALE)
        half = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 2
        for part, value in zip(
            parts,
            (counts[at], whole[at], local[at], truth[at], np.full(len(at), neff), np.full(len(at), half)),
            strict=True,
        ):
            part.append(value)
    tensors = [torch.tensor(np.concatenate(p), dtype=torch.float32) for p in parts]
    tensors[3] = tensors[3].long()
    return Observations(*tensors)


class Model(torch.nn.Module):
    """`bioseq.homologs.profile` with its strengths as parameters; `export` gives them."""

    def __init__(self) -> None:
        super().__init__()
        classes = len(EDGES) + 1

        def vector(value: float) -> torch.nn.Parameter:
            return torch.nn.Parameter(torch.full((classes,), value))

        self.count_weight, self.count_time = vector(0.0), vector(-0.5)
        self.star_weight, self.star_time = vector(0.0), vector(-0.3)
        self.scalars = torch.nn.Parameter(torch.tensor([5.0, -0.5, 0.5, 2.5, -1.0, 0.5]))
        self.mix = torch.nn.Parameter(torch.tensor([-1.0, 1.0, -0.5]))
        values, vectors = spectrum()
        self.background = torch.tensor(BACKGROUND, dtype=torch.float32)
        self.values = torch.tensor(values, dtype=torch.float32)
        self.vectors = torch.tensor(vectors, dtype=torch.float32)

    def evolved(self, time: torch.Tensor) -> torch.Tensor:
        root = self.background.sqrt()
        power = self.values[None] ** time.exp()[:, None]
        symmetric = torch.einsum("ij,bj,kj->bik", self.vectors, power, self.vectors)
        return (symmetric * (root[None] / root[:, None])[None]).clamp(min=1e-6)

    def forward(self, o: Observations) -> torch.Tensor:
        glob, query, local, beta, strength = self.scalars[:5].exp()
        background = glob * self.background + query * o.whole + local * o.local
        background = background / background.sum(1, keepdim=True)
        depth = o.counts.sum((1, 2)).unsqueeze(1)
        weighted = o.counts * self.count_weight.exp()[None, :, None]
        total = weighted.sum((1, 2)).unsqueeze(1)
        expected = torch.einsum("pbx,bxa->pa", weighted, self.evolved(self.count_time)) / total.clamp(
            min=1e-9
        )
        counted = (weighted.sum(1) + beta * expected + strength * background) / (
            total + beta * (total > 0) + strength
        )
        ratio = (self.evolved(self.star_time) / self.background).log()
        pull = torch.einsum("pbx,b,bxa->pa", o.counts, self.star_weight.exp(), ratio)
        damping = torch.sigmoid(self.scalars[5])
        star = torch.softmax(background.log() + pull * (1 + depth) ** -damping, 1)
        a, b, c = self.mix
        share = torch.sigmoid(a + b * torch.log1p(depth) + c * torch.log1p(o.neff).unsqueeze(1))
        return share * counted + (1 - share) * star

    def rough(self) -> torch.Tensor:
        vectors = (self.count_weight, self.count_time, self.star_weight, self.star_time)
        return sum((v.diff() ** 2).sum() for v in vectors)  # type: ignore[return-value]

    def export(self) -> ProfileParameters:
        def numbers(x: torch.Tensor) -> tuple[float, ...]:
            return tuple(round(float(v), 6) for v in x.detach())

        glob, query, local, beta, strength = numbers(self.scalars[:5].exp())
        return ProfileParameters(
            EDGES,
            glob,
            query,
            local,
            SCALE,
            numbers(self.count_weight.exp()),
            numbers(self.count_time.exp()),
            beta,
            strength,
            numbers(self.star_weight.exp()),
            numbers(self.star_time.exp()),
            numbers(torch.sigmoid(self.scalars[5:]))[0],
            numbers(self.mix),  # type: ignore[arg-type]
        )


def loss(model: Model, o: Observations, which: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood of the hidden residues."""
    probs = model(o)[torch.arange(len(o.truth)), o.truth]
    return -probs.log()[which].mean()


def taken(o: Observations, which: torch.Tensor) -> Observations:
    return Observations(*(getattr(o, f)[which] for f in Observations.__slots__))


def fit(o: Observations, which: torch.Tensor, steps: int = 40) -> Model:
    torch.manual_seed(0)
    model = Model()
    places = which.nonzero()[:, 0]
    o = taken(o, places[torch.randperm(len(places))[:PLACES]])
    which = torch.ones(len(o.truth), dtype=torch.bool)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=steps, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        value = loss(model, o, which) + SMOOTH * model.rough()
        value.backward()
        return value

    optimizer.step(closure)
    return model


def joined(parts: list[Observations]) -> Observations:
    return Observations(*(torch.cat([getattr(p, f) for p in parts]) for f in Observations.__slots__))


def fit_and_measure(sets: list[Observations]) -> tuple[ProfileParameters, dict[str, list[float]]]:
    """Parameters fitted to all, and each set's perplexity on the half that did not fit."""
    o = joined(sets)
    every = torch.ones(len(o.truth), dtype=torch.bool)
    found = []
    for half in (0.0, 1.0):
        model = fit(o, o.half == half)
        with torch.no_grad():
            found.append([float(loss(model, s, s.half != half).exp()) for s in sets])
    return fit(o, every).export(), {
        "perplexity_on_other_half": [sum(f) / 2 for f in zip(*found, strict=True)]
    }


def prepared(work: Path, name: str, records: object) -> ReferenceSet:
    folder = work / name
    return open_reference(folder) if folder.exists() else build_reference(records, folder)  # type: ignore[arg-type]


def main() -> int:
    parser = argparse.ArgumentParser(description="Fit the strengths of the profile of homologs.")
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--work", required=True, type=Path, help="folder for the two reference sets")
    parser.add_argument("--out", type=Path, default=Path("bioseq/homologs/parameters.json"))
    args = parser.parse_args()
    found, sizes = representatives(args.data / TRAIN)
    names = development_clusters(found, sizes)
    queries = [r for r in found if r.id in names]
    rest = prepared(args.work, "without-development", (r for r in found if r.id not in names))
    whole = prepared(args.work, "whole", read_fasta(args.data / TRAIN))
    sets = []
    for reference, some, settings in (
        (rest, queries, SearchSettings()),
        (whole, queries[::4], SearchSettings(exclude_above_identity=0.95)),
    ):
        hits = search([hide(r.sequence, r.id) for r in some], reference, settings)
        sets.append(observe(hits, [r.sequence for r in some], [r.id for r in some]))
    parameters, measured = fit_and_measure(sets)
    args.out.write_text(parameters.to_json() + "\n")
    print(json.dumps(measured))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
