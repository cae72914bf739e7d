"""Fit a backbone's mixture with homologs, measure it on held-out proteins, and write both into its card:

    python -m training.release.mixture BUNDLE --corpus CORPUS -o OUT

CORPUS was prepared with `bioseq pretrain prepare --homologs default --valid NAME=FILE`, which searches each held-out
set with the hidden residues hidden from the search too, in the passes of the perplexity protocol
(`training.pretrain.evaluate`). Nothing is searched here but the 250 proteins of the fit. The homologs lie there as
one byte a number (`pack_evidence`), so a log-odds is known within 0.024; where no homolog has a residue, the profile
is the background of the query's composition, which is computed anew. Hits above 95 % identity are left out.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bioseq.backbones.packed.config import N_LETTERS
from bioseq.bundles.bundle import open_bundle
from bioseq.errors import InputError
from bioseq.homologs.door import Homologs
from bioseq.homologs.hits import no_hits
from bioseq.homologs.matrix import BACKGROUND
from bioseq.homologs.profile import Profile, profile
from bioseq.homologs.reading import READING
from bioseq.inference.evidence import Evidence, Found, Mixture, log_softmax
from bioseq.inference.fitting import card_section, fit_mixture, with_mixture
from bioseq.inference.loading import load
from bioseq.inference.predictor import Predictor
from bioseq.progress import Progress
from bioseq.sequences.alphabet import protein
from training.corpus.corpus import Corpus, open_corpus
from training.corpus.draws import chosen
from training.corpus.homologs import SET_SEED, unpack_evidence
from training.pretrain.evaluate import subset


def stored_profile(query: str, rows: np.ndarray, number: int) -> Profile:
    """The profile of a query, with X at hidden residues, from its evidence float32 [L, 21]; without its counts."""
    depth = np.expm1(rows[:, N_LETTERS])
    logs = profile(no_hits(query)).log_probs.astype(np.float64)
    there = rows.any(axis=1)
    own = np.empty_like(logs)
    own[:, np.argsort(protein().standard_ids)] = rows[:, :N_LETTERS]
    own += np.log(BACKGROUND)
    own -= np.log(np.exp(own).sum(axis=1, keepdims=True))
    logs[there] = own[there]
    return Profile(
        query, logs.astype(np.float32), np.zeros(logs.shape, np.float32), depth, number, float("nan")
    )


def held_out(
    model: Predictor, corpus: Corpus, name: str, mixture: Mixture, passes: int, proteins: int = 0
) -> dict[str, Any]:
    """Perplexity of the hidden residues of a set (of `proteins` at equal steps; 0: all) under the model, the homologs,
    and both."""
    assert corpus.evidence is not None
    letters, members = model.alphabet, corpus.sets()[name]
    codes = corpus.evidence.of_set(name)
    number = np.load(corpus.evidence.folder / f"{name}.number.npy")
    starts = np.cumsum([0, *map(len, members)])
    tasks = []
    for p in range(min(passes, len(codes))):
        for i in subset(len(members), proteins).tolist():
            ids = members[i]
            places = chosen(ids, SET_SEED)[p]
            places = places[np.isin(ids[places], letters.standard_ids)]
            if len(places):
                tasks.append((p, i, places))
    texts = []
    for _, i, places in tasks:
        masked = members[i].copy()
        masked[places] = letters.mask_id
        texts.append(letters.decode(masked))
    queries = [
        model.prepare(text, logits=places, long_sequences="window")
        for text, (_, _, places) in zip(texts, tasks, strict=True)
    ]
    with Progress(len(queries), name, unit="proteins") as bar:
        results = model.run(queries, progress=bar)
    found: dict[str, list[np.ndarray]] = {"model": [], "homologs": [], "both": []}
    column = {int(token): n for n, token in enumerate(letters.standard_ids)}
    for (p, i, places), text, result in zip(tasks, texts, results, strict=True):
        rows = unpack_evidence(codes[p, starts[i] : starts[i + 1]])
        said = stored_profile(text.replace("<mask>", "X"), rows, int(number[p, i]))
        assert result.logits is not None
        logs, truth = log_softmax(result.logits), members[i][places]
        each = np.arange(len(places))
        found["model"].append(logs[each, truth])
        found["homologs"].append(said.log_probs[places, [column[int(t)] for t in truth]])
        beside = Evidence.of(
            Found(said, corpus.evidence.manifest["name"]), mixture, len(text.replace("<mask>", "X"))
        )
        found["both"].append(beside.mix(logs, places, letters)[each, truth])
    return {
        "proteins": len({i for _, i, _ in tasks}),
        "residues": sum(len(places) for *_, places in tasks),
        "perplexity": {way: float(np.exp(-np.concatenate(x).mean())) for way, x in found.items()},
    }


def checked(path: Path, sets: list[str]) -> Corpus:
    """The corpus, if it holds these sets' homologs as they are used. Raises `InputError`."""
    corpus = open_corpus(path, verify=False)
    hint = "Prepare it with: bioseq pretrain prepare ... --homologs default --valid NAME=FILE"
    if corpus.evidence is None:
        raise InputError(f"{path} was prepared without homologs.", hint=hint)
    if corpus.evidence.manifest["settings"] != READING.to_json():
        raise InputError(f"{path} was searched with other settings than those of use.", hint=hint)
    missing = [s for s in sets if s not in corpus.manifest["sets"]]
    if missing:
        raise InputError(f"{path} has no set {', '.join(missing)}.", hint=hint)
    return corpus


def main(argv: list[str] | None = None) -> int:
    """Fit a backbone's mixture with homologs, measure it on held-out proteins, and write both into its card."""
    parser = argparse.ArgumentParser(prog="python -m training.release.mixture", description=main.__doc__)
    parser.add_argument("bundle", type=Path, help="a backbone's folder")
    parser.add_argument("--corpus", type=Path, required=True, help="a corpus prepared with --homologs")
    parser.add_argument("--sets", default="remote,orphan", help="its held-out sets, separated by commas")
    parser.add_argument("--proteins", type=int, default=0, help="of each set, at equal steps (0: all)")
    parser.add_argument("--passes", type=int, default=1, help="of the protocol, as many as were searched")
    parser.add_argument("-o", "--output", type=Path, required=True, help="where the bundle is written again")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--force", action="store_true", help="replace the output")
    args = parser.parse_args(argv)
    sets = args.sets.split(",")
    corpus = checked(args.corpus, sets)
    assert corpus.evidence is not None
    bundle = open_bundle(args.bundle)
    model = load(args.bundle, device=args.device)
    print("fitting", file=sys.stderr, flush=True)
    mixture = fit_mixture(model, Homologs("default", settings=READING).profiles, progress=True)
    told = {name: held_out(model, corpus, name, mixture, args.passes, args.proteins) for name in sets}
    assert mixture.fitted is not None
    mixture = replace(
        mixture,
        fitted=mixture.fitted
        | {"held_out": {"reference": corpus.evidence.manifest["name"], "passes": args.passes, "sets": told}},
    )
    made = with_mixture(bundle, mixture, args.output, force=args.force)
    print(card_section(mixture).strip())
    print(f"wrote {made.path}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
