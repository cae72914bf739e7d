"""A corpus with homologs, and a model trained to read them. Families are made up; the searches are real."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from training_helpers import FAMILIES, losses, plan, same, torchrun, weights

from bioseq.backbones.packed.config import CONFIGS, EVIDENCE_WIDTH
from bioseq.backbones.packed.encoder import PackedEncoder
from bioseq.backbones.storage import save_backbone
from bioseq.bundles.bundle import open_bundle
from bioseq.errors import InputError, SpecError
from bioseq.homologs.door import Homologs
from bioseq.homologs.mmseqs import find_mmseqs
from bioseq.homologs.reading import READING
from bioseq.inference.evidence import Found, Mixture, log_softmax, residue_probabilities
from bioseq.inference.fitting import with_mixture
from bioseq.inference.loading import load
from bioseq.sequences.alphabet import protein
from training.corpus import homologs
from training.corpus.corpus import Corpus, open_corpus
from training.corpus.draws import chosen
from training.corpus.homologs import ALL, SET_SEED, THINNED, pack_evidence, unpack_evidence
from training.corpus.prepare import prepare
from training.pretrain.batches import Batches
from training.pretrain.records import checkpoint as checkpoints
from training.pretrain.run import run
from training.release.mixture import held_out

pytestmark = pytest.mark.skipif(
    find_mmseqs() is None, reason="needs MMseqs2 (pip install 'bioseq[homologs]')"
)
WAYS = {"model": 1.0, "homologs": 1.0, "both": 1.0}


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BIOSEQ_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(scope="module")
def folder(family_corpus: Path) -> Path:
    return family_corpus


@pytest.fixture(scope="module")
def corpus(folder: Path) -> Corpus:
    return open_corpus(folder)


def test_what_is_stored(corpus: Corpus) -> None:
    found = corpus.evidence
    assert found is not None and found.manifest["name"] == "families"
    assert found.train.shape == (2, 2, int(corpus.offsets[-1]), EVIDENCE_WIDTH)
    assert 0.12 < found.hidden.mean() < 0.18
    assert (found.hidden[0] != found.hidden[1]).any()
    number = np.load(found.folder / "train.number.npy")
    # three others of the family, without the representative that their cluster is named after
    assert number[:, ALL].max() == 3 and number[:, ALL].mean() > 2.5
    assert (number[:, THINNED] <= number[:, ALL]).all() and (number[:, THINNED] < number[:, ALL]).any()
    assert np.load(found.folder / "held.number.npy").max() == 4  # in use the representative is there
    # the residue that was hidden is the likeliest one more often than any other
    hits = []
    for record in range(len(corpus)):
        places, rows = found.of(record, 0, ALL, 0, int(corpus.lengths[record]))
        hits.append(rows[places, :20].argmax(1) + 4 == corpus.residues(record)[places])
    assert np.concatenate(hits).mean() > 0.4


def test_the_same_sources_give_the_same_bytes_and_staged_searches_are_used(
    sources: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = json.loads((folder / "manifest.json").read_text())["hash"]
    monkeypatch.setattr(homologs, "_JOB", 20)
    done = []
    whole = homologs.do

    def interrupted(file: Path) -> None:
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(file)
        whole(file)

    monkeypatch.setattr("training.corpus.prepare.do", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(plan(sources), tmp_path / "corpus", progress=False)
    assert not (tmp_path / "corpus").exists()
    rest = []
    monkeypatch.setattr("training.corpus.prepare.do", lambda file: (rest.append(file), whole(file)))
    assert prepare(plan(sources), tmp_path / "corpus", progress=False)["hash"] == wanted
    assert rest and not set(rest) & set(done)


def test_hidden_residues_do_not_reach_the_search(sources: Path, tmp_path: Path) -> None:
    ids = np.tile(np.arange(4, 24, dtype=np.uint8), 3)
    hidden = np.zeros(len(ids), dtype=np.uint8)
    hidden[::7] = 1
    results = []
    for name, shift in (("a", 0), ("b", 5)):
        changed = np.where(hidden == 1, (ids - 4 + shift) % 20 + 4, ids).astype(np.uint8)
        file = tmp_path / f"{name}.npz"
        np.savez(
            file,
            ids=changed,
            hidden=hidden,
            lengths=[len(ids)],
            clusters=[-1],
            thin=[7],
            reference=str(sources / "reference"),
        )
        homologs.do(file)
        results.append(np.load(tmp_path / f"{name}.found.npz")["evidence"])
    assert np.array_equal(*results)


def test_a_sample_takes_one_record_of_each_cluster(sources: Path, tmp_path: Path) -> None:
    for number, kept in ((5, 5), (100, FAMILIES)):
        manifest = prepare(
            plan(sources, homologs="", proteins=number), tmp_path / str(number), progress=False
        )
        assert manifest["records"] == manifest["clusters"] == kept


def test_only_hidden_residues_are_asked_for_where_homologs_are_shown(reading, corpus: Corpus) -> None:
    always = reading(homologs__none=0.0, homologs__thinned=0.5)
    hidden, shown = 0, 0
    for step in range(3):
        batches = Batches(always, corpus)
        items = batches.sampler.batch(step)
        for micro in batches.step(step).micros:
            shown += int((micro.evidence != 0).any(1).sum())
            assert not micro.evidence[micro.cu_seqlens[:-1].long()].any()  # <cls> has none
            hidden += len(micro.targets)
        assert hidden > 0 and len(items) > 0
    assert shown > 1000
    never = Batches(reading(homologs__none=1.0, homologs__thinned=0.0), corpus)
    assert not any(m.evidence.any() for m in never.step(0).micros)
    assert sum(len(m.targets) for m in never.step(0).micros) > 0


def test_it_learns_to_read_them_and_its_bundle_says_so(reading) -> None:
    spec = reading(steps=80, optimiser__lr=0.01, checkpoint_every=50)
    summary = run(spec, progress=False)
    held = summary["best"]["held"]
    assert held["passes"] == 2
    assert held["perplexity"] < 0.8 * held["without_homologs"]["perplexity"]
    bundle = open_bundle(Path(spec.output) / "best")
    assert bundle.manifest.architecture["reads_homologs"] is True
    assert bundle.manifest.extra["homologs"]["name"] == "families"
    assert "held, without homologs" in (Path(spec.output) / "card.md").read_text()


def test_a_run_with_homologs_resumes_bit_equal(reading, tmp_path: Path) -> None:
    spec = reading(output=str(tmp_path / "whole"), steps=12)
    run(spec, progress=False)
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    shutil.rmtree(tmp_path / "part/checkpoints/step-00000012")
    run(spec.override({"output": str(tmp_path / "part"), "resume": True}), progress=False)
    whole, part = (checkpoints.last(tmp_path / name / "checkpoints") for name in ("whole", "part"))
    assert whole.step == part.step == 12
    for a, b in ((whole.model(), part.model()), (whole.optimizer(), part.optimizer())):
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


KILLED = """
import os, signal, sys
from functools import partial
from bioseq.specs.pretrain import PretrainSpec
from training.pretrain import run as room
def hook(step):
    if step == 8:
        os.kill(os.getpid(), signal.SIGKILL)
room.train = partial(room.train, hook=hook)
room.run(PretrainSpec.load(sys.argv[1]), progress=False)
"""


def test_a_run_with_homologs_killed_between_checkpoints_resumes_bit_equal(reading, tmp_path: Path) -> None:
    spec = reading(output=str(tmp_path / "whole"), steps=12)
    run(spec, progress=False)
    killed = spec.override({"output": str(tmp_path / "killed")})
    (tmp_path / "spec.json").write_text(killed.to_json())
    child = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "spec.json")], capture_output=True)
    assert child.returncode == -signal.SIGKILL, child.stderr[-2000:]
    assert checkpoints.last(tmp_path / "killed/checkpoints").step == 5
    run(killed.override({"resume": True}), progress=False)
    assert same(weights(tmp_path / "killed"), weights(tmp_path / "whole"))
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")


def test_the_batches_of_all_workers_have_the_homologs_of_one(reading, corpus: Corpus) -> None:
    batches = Batches(reading(), corpus)

    def rows(*workers) -> list[tuple[bytes, bytes]]:
        found = []
        for worker in workers:
            for micro in batches.step(3, *worker).micros:
                cu = micro.cu_seqlens.tolist() if len(micro.targets) else [0]
                found += [
                    (micro.tokens[a:b].numpy().tobytes(), micro.evidence[a:b].numpy().tobytes())
                    for a, b in zip(cu, cu[1:])
                ]
        return sorted(found)

    whole = rows(())
    assert sum(any(evidence) for _, evidence in whole) > 2
    assert rows((0, 2), (1, 2)) == rows((0, 3), (1, 3), (2, 3)) == whole


@pytest.mark.long
@pytest.mark.timeout(600)
def test_two_workers_with_homologs_equal_one_by_ddp_and_fsdp2(reading, tmp_path: Path) -> None:
    one = reading(output=str(tmp_path / "one"), steps=10, eval__every=5, eval__passes=1)
    run(one, progress=False)
    two = one.override({"output": str(tmp_path / "two"), "workers.count": 2})
    torchrun(tmp_path, two, two.override({"output": str(tmp_path / "sharded"), "workers.parallel": "fsdp"}))
    want = losses(tmp_path / "one")
    for name in ("two", "sharded"):
        found = losses(tmp_path / name)
        assert found.keys() == want.keys()
        assert max(abs(found[s] - want[s]) for s in want) < 1e-4, name


def test_begun_with_a_plain_model_it_equals_it_without_homologs(reading, tmp_path: Path) -> None:
    plain = reading(output=str(tmp_path / "plain"), model__reads_homologs=False, model__convolution=0)
    before = run(plain, progress=False)["last"]["held"]
    # one step of a learning rate of nearly nothing
    spec = reading(
        init=str(tmp_path / "plain/last"),
        steps=1,
        optimiser__lr=1e-12,
        schedule__warmup=0,
        schedule__decay=0,
        output=str(tmp_path / "run"),
    )
    after = run(spec, progress=False)["last"]["held"]
    assert after["without_homologs"]["loss"] == pytest.approx(before["loss"], abs=1e-5)
    assert after["loss"] < before["loss"]


def test_a_frozen_backbone_learns_to_read_and_stays_what_it_was_without_homologs(
    reading, tmp_path: Path
) -> None:
    plain = reading(output=str(tmp_path / "plain"), model__reads_homologs=False, model__convolution=0)
    before = run(plain, progress=False)["last"]["held"]
    spec = reading(
        init=str(tmp_path / "plain/last"), frozen=True, model__convolution=0, steps=40, optimiser__lr=0.01
    )
    after = run(spec, progress=False)["last"]["held"]
    assert after["without_homologs"]["loss"] == before["loss"]
    assert after["loss"] < before["loss"] - 0.1
    ours = checkpoints.last(tmp_path / "run/checkpoints").model()
    theirs = checkpoints.last(tmp_path / "plain/checkpoints").model()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    with pytest.raises(SpecError, match="frozen needs a backbone to begin with"):
        reading(frozen=True, model__convolution=0)


def test_what_is_refused(reading, sources: Path, corpus_path: Path, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="prepared without homologs"):
        run(reading(corpus=str(corpus_path)), progress=False)
    with pytest.raises(SpecError, match=r"eval\.seed: 3"):
        run(reading(eval__seed=3), progress=False)
    with pytest.raises(InputError, match="a corpus of dna has no homologs"):
        prepare(plan(sources, alphabet="dna"), tmp_path / "c", progress=False)
    with pytest.raises(SpecError, match="is over 1"):
        reading(homologs__none=0.8, homologs__thinned=0.5)


def test_codes_of_evidence_are_near() -> None:
    values = np.random.default_rng(0).normal(0, 2, (500, EVIDENCE_WIDTH)).astype(np.float32)
    values[:, -1] = np.abs(values[:, -1])
    again = unpack_evidence(pack_evidence(values))
    inside = np.abs(values) < 6
    assert np.abs(again - values)[:, :20][inside[:, :20]].max() <= 0.5 / 21 + 1e-5
    assert np.abs(again - values)[:, 20].max() <= 0.5 / 16 + 1e-5
    assert not unpack_evidence(pack_evidence(np.zeros((1, EVIDENCE_WIDTH)))).any()


def test_the_mixture_is_measured_on_a_set_searched_before(sources, corpus, tmp_path):
    """The stored homologs give the figures of a search made now, and they go into card and evidence."""
    bundle = tmp_path / "backbone"
    encoder = PackedEncoder(CONFIGS["tiny"])
    encoder.init_weights(torch.Generator().manual_seed(1))
    save_backbone(bundle, encoder, name="tiny", card="A test model", evidence={})
    model = load(bundle, threads=1)
    given = Mixture(
        0.6, 0.5, 0.7, {"proteins": 1, "residues": 1, "without_homologs": 0.0, "perplexity": WAYS}
    )
    told = held_out(model, corpus, "held", given, 2)
    members = corpus.sets()["held"]
    losses = {"model": [], "homologs": [], "both": []}
    room = Homologs(sources / "reference", settings=READING, quiet=True)
    for p in range(2):
        for ids in members:
            places = chosen(ids, SET_SEED)[p]
            masked = ids.copy()
            masked[places] = protein().mask_id
            text = protein().decode(masked)
            (logits,), found = model.logits([text]), room.profile(text)
            rows, truth = np.arange(len(places)), ids[places]
            losses["model"].append(log_softmax(logits[places])[rows, truth])
            order = {int(t): n for n, t in enumerate(protein().standard_ids)}
            losses["homologs"].append(found.log_probs[places, [order[int(t)] for t in truth]])
            mixed = residue_probabilities(logits, Found(found, "x"), given, protein())
            losses["both"].append(mixed[places, truth])
    want = {way: float(np.exp(-np.concatenate(parts).mean())) for way, parts in losses.items()}
    assert told["perplexity"] == pytest.approx(want, rel=5e-3)
    assert told["perplexity"]["homologs"] < told["perplexity"]["model"]
    assert told["residues"] == sum(len(chosen(ids, SET_SEED)[p]) for ids in members for p in range(2))
    given.fitted["held_out"] = {"reference": "families", "passes": 2, "sets": {"held": told}}
    made = with_mixture(open_bundle(bundle), given, tmp_path / "out")
    assert f"| **{told['perplexity']['both']:.2f}** |" in made.card()
    assert Mixture.of(made) == given
