"""Homologs: perplexity of hidden residues under the profile, and what a search costs.

    python benchmarks/homologs.py --data DIR --work DIR [--remote 500] [--orphan 400] [--development 200] [--whole 150]
        [--batch 2000]

15 % of the residues of each protein are hidden, from the search too. `remote` and `orphan` are read once a run, with
the settings and strengths as they are shipped; the table of sensitivities is measured on development clusters against
the shipped set without them. `batches` are timed searches of thousands of proteins of about 200 residues against the shipped
set, which hold the claim of 0.1 s a protein on two cores (goal 0.03). Each timed search also says the perplexity that it gives. Seconds of a busy machine say
little, so the processor time stands beside them.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
from _common import host, versions, write_result

from bioseq.homologs.database import OTHER, open_database
from bioseq.homologs.hits import encode
from bioseq.homologs.mmseqs import mmseqs_version, need_mmseqs
from bioseq.homologs.profile import default_parameters, profile
from bioseq.homologs.reference import ReferenceSet, open_reference
from bioseq.homologs.search import search
from bioseq.homologs.settings import SearchSettings
from bioseq.sequences.fasta import Record, read_fasta
from training.release.fit_profile import hide, prepared
from training.release.make_reference import TRAIN, development_clusters, representatives

CLASSES = (0.0, 0.5, 2.0, 5.0, 20.0, float("inf"))  # of the effective number of homologs


def processor_seconds() -> float:
    own, below = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + below.ru_utime + below.ru_stime


def measure(records: list[Record], reference: ReferenceSet, settings: SearchSettings) -> dict[str, Any]:
    """Perplexity of the hidden residues, by effective number too, and the search's cost."""
    hidden = [hide(r.sequence, r.id) for r in records]
    open_database(reference)
    start, cpu = time.perf_counter(), processor_seconds()
    hits = search(hidden, reference, settings, threads=2)
    wall, cpu_search = time.perf_counter() - start, processor_seconds() - cpu
    cpu = processor_seconds()
    profiles = [profile(h) for h in hits]
    cpu_profile = processor_seconds() - cpu
    losses, neffs, protein = [], [], []
    for record, query, found in zip(records, hidden, profiles, strict=True):
        truth = encode(record.sequence)
        at = np.flatnonzero((encode(query) == OTHER) & (truth < OTHER))
        losses.append(-found.log_probs[at, truth[at]])
        neffs.append(np.full(len(at), found.neff))
        protein.append(losses[-1].mean())
    loss, neff = np.concatenate(losses), np.concatenate(neffs)
    by_neff = {}
    for low, high in zip(CLASSES, CLASSES[1:], strict=False):
        inside = (neff >= low) & (neff < high)
        if inside.any():
            by_neff[f"{low:g} to {high:g}"] = {
                "residues": int(inside.sum()),
                "perplexity": round(float(np.exp(loss[inside].mean())), 3),
            }
    spread = np.std(protein) / np.sqrt(len(protein))
    return {
        "proteins": len(records),
        "mean_length": round(statistics.mean(len(r.sequence) for r in records), 1),
        "hidden_residues": len(loss),
        "perplexity": round(float(np.exp(loss.mean())), 3),
        "standard_error_of_the_mean_log_loss": round(float(spread), 4),
        "perplexity_by_effective_number": by_neff,
        "without_hits": sum(not len(h) for h in hits),
        "median_hits": statistics.median(len(h) for h in hits),
        "seconds_a_protein": round(wall / len(records), 4),
        "processor_seconds_a_protein": round(cpu_search / len(records), 4),
        "processor_milliseconds_a_profile": round(1e3 * cpu_profile / len(records), 2),
    }


def latency(records: list[Record], reference: ReferenceSet) -> dict[str, Any]:
    """One protein a call, the kept index being warm; the answers equal those of one batch."""
    together = search(records, reference, threads=2)
    times, cpus = [], []
    for record, expected in zip(records, together, strict=True):
        start, cpu = time.perf_counter(), processor_seconds()
        (alone,) = search([record], reference, threads=2)
        times.append(time.perf_counter() - start)
        cpus.append(processor_seconds() - cpu)
        assert alone.ids == expected.ids and np.array_equal(alone.aligned, expected.aligned)
    return {
        "proteins": len(records),
        "mean_length": round(statistics.mean(len(r.sequence) for r in records), 1),
        "median_seconds": round(statistics.median(times), 3),
        "worst_seconds": round(max(times), 3),
        "median_processor_seconds": round(statistics.median(cpus), 3),
    }


def by_http(url: str, records: list[Record]) -> dict[str, Any]:
    """One protein a request to a warm service that never saw it: logits with and without homologs of the shipped set."""
    import bioseq

    client = bioseq.connect(url)
    texts = [r.sequence[:1000] for r in records]
    client.logits(texts[:1], homologs="default")
    out: dict[str, Any] = {"proteins": len(texts) - 1, "required_seconds": 0.6}
    for homologs in ("none", "default"):
        times = []
        for text in texts[1:]:
            start = time.perf_counter()
            client.logits([text], homologs=homologs)
            times.append(time.perf_counter() - start)
        out[homologs] = {
            "median_seconds": round(statistics.median(times), 3), "worst_seconds": round(max(times), 3)
        }  # fmt: skip
    return out


def batches(data: Path, count: int, reference: ReferenceSet) -> dict[str, Any]:
    """Seconds a protein in one batch of `count` proteins of 190 to 210 residues, spread over the training file."""
    some = every([r for r in read_fasta(data / TRAIN) if 190 <= len(r.sequence) <= 210], count)
    search(some[:20], reference, threads=2)  # the index is in memory from here on
    out: dict[str, Any] = {
        "proteins": len(some),
        "mean_length": round(statistics.mean(len(r.sequence) for r in some), 1),
        "required_seconds_a_protein": 0.1,
        "goal_seconds_a_protein": 0.03,
    }
    ways = {f"sensitivity {s}, two rounds": SearchSettings(sensitivity=s) for s in (4.0, 5.7, 7.5)}
    ways["sensitivity 7.5, one round"] = SearchSettings(iterations=1)
    for name, settings in ways.items():
        load = os.getloadavg()[0]
        start, cpu = time.perf_counter(), processor_seconds()
        hits = search(some, reference, settings, threads=2)
        wall, cpu = time.perf_counter() - start, processor_seconds() - cpu
        start = time.perf_counter()
        for one in hits:
            profile(one)
        out[name] = {
            "seconds_a_protein": round(wall / len(some), 4),
            "processor_seconds_a_protein": round(cpu / len(some), 4),
            "profile_seconds_a_protein": round((time.perf_counter() - start) / len(some), 4),
            "mean_hits": round(statistics.mean(len(h) for h in hits), 1),
            "load_before": round(load, 2),
        }
        print(name, out[name], flush=True)
        for alone, together in zip(search(some[::100], reference, settings, threads=1), hits[::100]):
            assert alone.ids == together.ids and np.array_equal(alone.aligned, together.aligned)
    return out


def every(records: list[Record], count: int) -> list[Record]:
    """`count` of them at equal steps."""
    return [records[i] for i in np.linspace(0, len(records) - 1, min(count, len(records))).astype(int)]


def shown(args: argparse.Namespace) -> list[str]:
    """The options given, without the places of this machine."""
    return [f"--{k} {'DIR' if isinstance(v, Path) else v}" for k, v in vars(args).items() if k != "out"]


def main() -> int:
    parser = argparse.ArgumentParser(description="Perplexity and cost of homologs.")
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--work", required=True, type=Path, help="folder of the reference sets that are made")
    parser.add_argument("--remote", type=int, default=500)
    parser.add_argument("--orphan", type=int, default=400)
    parser.add_argument("--development", type=int, default=200)
    parser.add_argument(
        "--whole", type=int, default=0, help="remote proteins searched in the whole training file"
    )
    parser.add_argument("--batch", type=int, default=2000, help="proteins of a timed batch")
    parser.add_argument("--server", help="only time single requests to the service at this URL")
    parser.add_argument("--reading", default="first", help="which reading of the held-out sets this is")
    parser.add_argument("--out")
    args = parser.parse_args()
    if args.server:
        proteins = every(list(read_fasta(args.data / "swissprot_valid_remote.fasta.gz")), 41)
        found = {"http": by_http(args.server, proteins), "host": host(), "versions": versions()}
        print(write_result("homologs-http", found, args.out))
        return 0
    default = open_reference("default")
    remote = list(read_fasta(args.data / "swissprot_valid_remote.fasta.gz"))
    orphan = list(read_fasta(args.data / "swissprot_valid_orphan.fasta.gz"))
    result: dict[str, Any] = {
        "command": "python benchmarks/homologs.py " + " ".join(shown(args)),
        "reading_of_remote_and_orphan": args.reading,
        "reference": {"name": default.name, "hash": default.hash, "sequences": len(default)},
        "settings": SearchSettings().to_json(),
        "strengths": default_parameters().to_json(),
        "mmseqs": mmseqs_version(need_mmseqs()),
        "required": {"remote": 10.2, "orphan": 17.0, "remote_whole_training_file": 9.7},
    }

    def save() -> None:
        result["host"], result["versions"] = host(), versions()
        if args.out:
            write_result("homologs", result, args.out)

    if args.batch:
        result["batches"] = batches(args.data, args.batch, default)
        save()
    for name, records, count in (("remote", remote, args.remote), ("orphan", orphan, args.orphan)):
        if count:
            result[name] = measure(every(records, count), default, SearchSettings())
            print(name, result[name], flush=True)
            save()
    if args.development:
        found, sizes = representatives(args.data / TRAIN)
        names = development_clusters(found, sizes)
        rest = prepared(args.work, "without-development", (r for r in found if r.id not in names))
        some = every([r for r in found if r.id in names], args.development)
        result["sensitivities_on_development"] = {
            str(s): measure(some, rest, SearchSettings(sensitivity=s)) for s in (4.0, 5.7, 7.5)
        }
        result["one_round_on_development"] = measure(some, rest, SearchSettings(iterations=1))
        save()
    result["one_at_a_time"] = latency(every(remote, 12), default)
    save()
    if args.whole:
        whole = prepared(args.work, "whole", read_fasta(args.data / TRAIN))
        result["remote_whole_training_file"] = measure(every(remote, args.whole), whole, SearchSettings())
    result["host"], result["versions"] = host(), versions()
    print(write_result("homologs", result, args.out))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
