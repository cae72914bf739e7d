"""A design run: what it is made of, the folder from which it goes on after a kill, and its table."""

from __future__ import annotations

import contextlib
import csv
import fcntl
import hashlib
import io
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bioseq.campaigns.campaign import Campaign
from bioseq.design.constraints import Constraints, read_constraints
from bioseq.design.evolve import Scored, diverse, evolve, weights
from bioseq.design.scoring import Heads, Scorer, Scores, Source, Surrogates, ZeroShot, check_sites
from bioseq.errors import InputError, OutputError, SpecError
from bioseq.homologs.database import LETTERS
from bioseq.output import atomic_file
from bioseq.progress import Progress
from bioseq.sequences.mutations import letters_of
from bioseq.specs.design import DesignSpec

if TYPE_CHECKING:
    from bioseq.inference.predictor import Predictor
    from bioseq.inference.variants import WildType


@dataclass
class Made:
    """What a run works with, checked whole before anything is searched."""

    spec: DesignSpec
    constraints: Constraints
    scorer: Scorer
    table: np.ndarray  # float [L, 20], zero-shot scores
    model: Predictor | None
    wild: WildType | None  # for gibbs
    known: np.ndarray  # uint8 [K, L], measured variants: parents of the first generation, and no designs


def prepare(spec: DesignSpec) -> Made:
    """Raises `InputError` and its subclasses for whatever is wrong with it."""
    wild = letters_of(spec.wild_type)
    surrogates, sites, campaign = None, None, None
    if spec.campaign is not None:
        campaign = Campaign(spec.campaign)
        check_sites(campaign.wild_type, wild)
        sites = campaign.space.sites
    constraints = read_constraints(wild, spec.constraints, sites)
    if campaign is not None:
        surrogates = Surrogates(campaign.folder, constraints)
    model: Predictor | None = None
    if spec.method == "gibbs" or spec.heads or campaign is None or not campaign.prior.any():
        from bioseq.inference.loading import load

        model = load(spec.model, dtype=spec.dtype, device=spec.device, threads=spec.threads)
        if model.alphabet.name != "protein":
            raise SpecError("design needs a model of proteins.", field="model")
    sources: list[Source] = []
    if spec.heads:
        assert model is not None
        for head in spec.heads:
            model.load_head(head)
        sources.append(Heads(model, spec.heads, constraints))
    if surrogates is not None:
        sources.append(surrogates)
    # The expression is checked before the scan, which takes longest.
    blank = ZeroShot(np.zeros((len(wild), 20)), constraints.wild)
    sources.append(blank)
    scorer = Scorer(sources, spec.objective, spec.where, spec.heads, spec.caution, constraints.wild)
    if model is None:
        assert campaign is not None
        table, template = campaign.prior, None
    else:
        table, template = _scan(model, wild, spec)
    blank.table = table
    known = np.empty((0, len(wild)), np.uint8)
    if campaign is not None:
        known = _measured(campaign, constraints)
    return Made(spec, constraints, scorer, table, model, template, known)


def _measured(campaign: Campaign, constraints: Constraints) -> np.ndarray:
    state, space = campaign.state(), campaign.space
    names = sorted({v for i in range(len(campaign.objectives)) for v in state.measured(i)} - {"WT"})
    known = np.tile(constraints.wild, (len(names), 1))
    known[:, space.sites] = space.encode([space.read(v) for v in names])
    return known


def _scan(model: Predictor, wild: str, spec: DesignSpec) -> tuple[np.ndarray, WildType]:
    from bioseq.inference.homologs import find_one
    from bioseq.inference.scoring import scan_sites
    from bioseq.inference.variants import WildType

    found = find_one(model, wild, spec.homologs, spec.alignment)
    homologs: Any = spec.homologs if found is None else found
    scored = scan_sites(model, wild, long_sequences="window", homologs=homologs, progress=True)
    order = [model.alphabet.standard.index(x) for x in LETTERS]
    template = WildType.prepare(model, wild, "masked-marginals", "window")
    template.query.reads = spec.homologs != "none"
    return np.asarray(scored.values, float)[:, order], template.with_homologs(found)


def identity(made: Made) -> str:
    """A hash of all that decides the result, files by what they hold."""
    spec = made.spec
    told: dict[str, Any] = spec.to_dict() | {"table": hashlib.sha256(made.table.tobytes()).hexdigest()}
    for name in ("threads", "device"):
        told.pop(name)
    c = made.constraints
    told["constraints"] = hashlib.sha256(
        repr((c.allowed.tobytes(), c.fewest, c.most, c.keep, c.avoid, c.near)).encode()
        + (b"" if c.training is None else c.training.tobytes())
    ).hexdigest()
    if spec.campaign is not None:
        told["campaign"] = [_sha(Path(spec.campaign) / n) for n in ("campaign.toml", "ledger.csv")]
    if made.model is not None:
        told["model"] = made.model.weights_hash or made.model.content_hash
        told["heads"] = [
            (h, made.model.heads[h].version, made.model.heads[h].base_weights_hash) for h in spec.heads
        ]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


class Work:
    """The folder of a run that is under way: each part is written whole or not at all."""

    def __init__(self, folder: Path, identity: str):
        self.folder = folder
        stated = folder / "identity"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not stated.is_file():
                with atomic_file(stated) as path:
                    path.write_text(identity)
        except OSError as error:
            raise OutputError(
                f"cannot use {folder}: {error.strerror}.", hint="Choose another output."
            ) from None
        if stated.read_text() != identity:
            raise InputError(
                f"{folder} belongs to another run.",
                code="design.other_run",
                hint="Give the same wild type, model, data and options to go on, or delete the folder.",
            )

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        with open(self.folder / ".lock", "w") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(
                    f"{self.folder}: another run is writing.", code="design.busy", hint="Wait for it to end."
                ) from None
            yield

    def keep(self, name: str, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """The arrays of a part: as they were kept, or made and kept now."""
        path = self.folder / f"{name}.npz"
        if not path.is_file():
            data = io.BytesIO()
            np.savez(data, **make())  # type: ignore[arg-type]
            with atomic_file(path) as temporary:
                temporary.write_bytes(data.getvalue())
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)


def _arrays(part: Scored) -> dict[str, np.ndarray]:
    s = part.scores
    plain = {"codes": part.codes, "violations": part.violations, "mean": s.mean, "sd": s.sd, "bound": s.bound}
    return plain | {f"column {k}": v for k, v in s.columns.items()}


def _part(a: dict[str, np.ndarray]) -> Scored:
    columns = {k.removeprefix("column "): v for k, v in a.items() if k.startswith("column ")}
    return Scored(a["codes"], a["violations"], Scores(a["mean"], a["sd"], a["bound"], columns))


def _evolved(made: Made, work: Work) -> Scored | None:
    spec, weight = made.spec, weights(made.table, made.constraints, made.spec.temperature)
    first = Scored.of(made.known, made.constraints, made.scorer) if len(made.known) else None
    with Progress(spec.generations, "designing", unit="generations") as bar:

        def keep(number: int, make: Callable[[], Scored]) -> Scored:
            part = _part(work.keep(f"generation-{number:04d}", lambda: _arrays(make())))
            bar.add()
            return part

        return evolve(
            spec.generations, spec.batch, spec.seed, weight, made.constraints, made.scorer, keep, first
        )


def _sampled(made: Made, work: Work) -> Scored | None:
    """Chains until there are enough different designs, at most four times as many as designs."""
    from bioseq.design.gibbs import CHAINS, sample

    spec, c = made.spec, made.constraints
    model, wild = made.model, made.wild
    assert model is not None and wild is not None
    steps = spec.steps or len(c.free)
    parts: list[Scored] = []
    seen = {c.wild.tobytes()}
    with Progress(spec.number * steps, "sampling", unit="steps") as bar:
        for first in range(0, 4 * spec.number, CHAINS):
            chains = range(first, min(first + CHAINS, 4 * spec.number))
            kept = work.keep(f"chains-{first:06d}", lambda chains=chains: {
                "codes": sample(model, wild, c, chains, steps=steps, temperature=spec.temperature, seed=spec.seed, bar=bar)
            })  # type: ignore[misc]  # fmt: skip
            codes = [row for row in kept["codes"] if not (row.tobytes() in seen or seen.add(row.tobytes()))]  # type: ignore[func-returns-value]
            if codes:
                parts.append(Scored.of(np.array(codes), c, made.scorer))
            done = Scored.join(parts) if parts else None
            if done is not None and len(diverse(done, spec.number, spec.distance, made.known)) == spec.number:
                break
    return Scored.join(parts) if parts else None


def run(spec: DesignSpec, output: str | Path | None = None, *, force: bool = False) -> list[dict[str, Any]]:
    """The designs, best first; with `output` as a CSV file too, and a killed run goes on from the folder beside it.
    Raises what is wrong with the input, before anything is written."""
    made = prepare(spec)
    with contextlib.ExitStack() as stack:
        if output is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        else:
            output = Path(output)
            if output.exists() and not force:
                raise OutputError(
                    f"{output} exists already.", hint="Choose another name, or pass --force to replace it."
                )
            folder = output.with_name(output.name + ".work")
        work = Work(folder / "run" if output is None else folder, identity(made))
        stack.enter_context(work.locked())
        found = (_evolved if spec.method == "evolve" else _sampled)(made, work)
        chosen = [] if found is None else diverse(found, spec.number, spec.distance, made.known)
        if not chosen:
            raise InputError(
                f"none of {0 if found is None else len(found.codes)} variants satisfies the constraints and --where.",
                code="design.none", hint="Loosen them, or search longer with --generations.",
            )  # fmt: skip
        assert found is not None
        rows = _rows(made, found, chosen)
        if output is not None:
            with atomic_file(output, force=force) as path, open(path, "w", newline="") as handle:
                out = csv.DictWriter(handle, list(rows[0]), lineterminator="\n")
                out.writeheader()
                out.writerows(rows)
            shutil.rmtree(folder, ignore_errors=True)
    return rows


def _rows(made: Made, found: Scored, chosen: list[int]) -> list[dict[str, Any]]:
    c, s = made.constraints, found.scores
    codes = found.codes[chosen]
    texts, far = c.text(codes), c.distance(codes)
    out = []
    for rank, i in enumerate(chosen):
        gaps = (codes[:rank] != codes[rank]).sum(1)
        row: dict[str, Any] = {
            "rank": rank + 1, "variant": c.variant(codes[rank]), "sequence": texts[rank],
            "bound": float(f"{s.bound[i]:.6g}"), "objective": float(f"{s.mean[i]:.6g}"), "sd": float(f"{s.sd[i]:.6g}"),
            "nearest_better": int(gaps.min()) if rank else "",
        }  # fmt: skip
        if c.training is not None:
            row["from_training"] = int(far[rank])
        row |= {k: float(f"{v[i]:.6g}") for k, v in sorted(s.columns.items())}
        row["mutations"] = int(row["mutations"])
        out.append(row)
    return out
