"""The inference path: batch invariance, order, windows, policies, notes."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

import bioseq
from bioseq.backbones.packed.config import CONFIGS, ModelConfig
from bioseq.backbones.packed.encoder import PackedEncoder
from bioseq.backbones.pooling import EmbedOptions
from bioseq.errors import IllegalResidueError, ResourceError, SequenceTooLongError, SpecError
from bioseq.inference.predictor import Predictor
from bioseq.sequences.fasta import Record


def make(config: ModelConfig = CONFIGS["tiny"], **options: object) -> Predictor:
    encoder = PackedEncoder(config)
    encoder.init_weights(torch.Generator().manual_seed(0), std=0.1)
    return Predictor(encoder, name="tiny", content_hash="sha256:0", device="cpu", **options)  # type: ignore[arg-type]


def worst(a: np.ndarray, b: np.ndarray) -> float:
    return max(float(np.linalg.norm(x - y) / np.linalg.norm(y)) for x, y in zip(a, b, strict=True))


@pytest.fixture(scope="module")
def mixed(data: Path) -> list[str]:
    sequences = [r.sequence for r in bioseq.read_fasta(data / "proteins_30_1000.fasta")]
    assert len(sequences) == 64 and max(map(len, sequences)) > 3 * min(map(len, sequences))
    return sequences


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_a_result_does_not_depend_on_its_batch_mates(mixed: list[str], dtype: str, bound: float) -> None:
    config = CONFIGS["8m"] if dtype == "float32" else CONFIGS["tiny"]
    model = make(config, dtype=dtype, budget=4096)
    sequences = mixed if dtype == "bfloat16" else sorted(mixed, key=len)[:24] + [max(mixed, key=len)]
    together = model.embed(sequences)
    alone = np.concatenate([model.embed([s]) for s in sequences[::5]])
    assert worst(together[::5], alone) <= bound
    order = list(range(len(sequences)))
    random.Random(1).shuffle(order)
    shuffled = model.embed([sequences[i] for i in order])
    assert worst(shuffled, together[order]) <= bound


def test_bytes_do_not_depend_on_the_number_of_threads(mixed: list[str]) -> None:
    one, three = make(threads=1), make(threads=3)
    assert one.embed(mixed[:16]).tobytes() == three.embed(mixed[:16]).tobytes()


def test_thread_setting_of_the_process_is_left_alone(mixed: list[str]) -> None:
    before = torch.get_num_threads()
    make(threads=2).embed(mixed[:3])
    assert torch.get_num_threads() == before


def test_any_budget_gives_the_same_numbers_in_input_order(mixed: list[str]) -> None:
    small, large = make(budget=1024), make(budget=100_000)
    assert worst(small.embed(mixed), large.embed(mixed)) <= 1e-5


def test_iterators_records_and_strings_are_alike(mixed: list[str]) -> None:
    model = make()
    texts = mixed[:3]
    records = (Record(id=str(i), sequence=s) for i, s in enumerate(texts))
    np.testing.assert_array_equal(model.embed(records), model.embed(texts))
    assert model.embed([]).shape == (0, 64)
    with pytest.raises(SpecError, match="not one string"):
        model.embed("MKT")


def test_lower_case_stop_and_j(mixed: list[str]) -> None:
    model = make()
    plain, changed = model.embed([mixed[0], mixed[0].lower() + "*"])
    assert worst([changed], [plain]) <= 1e-6
    query = model.prepare("MKJ*", embed=EmbedOptions())
    assert query.notes == ("stop codon '*' at the end dropped", "1 J read as X")


def test_too_long_is_refused_and_says_the_limit() -> None:
    model = make()
    with pytest.raises(
        SequenceTooLongError, match=r"record 'long': 1023 residues; the limit is 1022"
    ) as caught:
        model.embed([Record("ok", "MK"), Record("long", "A" * 1023)])
    assert caught.value.index == 1 and "AAAA" not in str(caught.value)
    assert model.embed(["A" * 1022]).shape == (1, 64)


def test_truncate_is_the_prefix_and_is_reported() -> None:
    model = make()
    long = "".join(random.Random(0).choices("ACDEFGHIKLMNPQRSTVWY", k=1500))
    assert worst(model.embed([long], long_sequences="truncate"), model.embed([long[:1022]])) <= 1e-6
    assert "truncated from 1500 to 1022" in model.prepare(long, long_sequences="truncate").notes[0]


def test_windows_by_the_reference_formula() -> None:
    """Residues averaged over windows with the taper, computed here by hand from single windows."""
    config = ModelConfig("t", 2, 32, 4, 64, max_residues=40)
    model = make(config)
    long = "".join(random.Random(0).choices("ACDEFGHIKLMNPQRSTVWY", k=95))
    merged = model.embed([long], per_residue=True, long_sequences="window")[0]
    overlap = 10
    starts = [0, 30, 55]  # the last window ends at the end
    total, weight = np.zeros((95, 32)), np.zeros((95, 1))
    for start in starts:
        rows = model.embed([long[start : start + 40]], per_residue=True)[0]
        w = np.ones((40, 1))
        ramp = np.arange(1, overlap + 1)[:, None] / (overlap + 1)
        if start > 0:
            w[:overlap] = ramp
        if start + 40 < 95:
            w[-overlap:] = np.minimum(w[-overlap:], ramp[::-1])
        total[start : start + 40] += w * rows
        weight[start : start + 40] += w
    assert worst([merged], [total / weight]) <= 1e-5
    pooled = model.embed([long], long_sequences="window")[0]
    assert worst([pooled], [merged.mean(0)]) <= 1e-5
    logits = model.logits([long], long_sequences="window")[0]
    assert logits.shape == (95, 33)
    assert worst([logits[:20]], [model.logits([long[:40]])[0][:20]]) <= 1e-5


def test_logits_at_places_are_rows_of_all_logits(mixed: list[str]) -> None:
    model = make()
    everything = model.logits([mixed[0]])[0]
    places = np.array([5, 0, 17])
    queries = [model.prepare(mixed[1], embed=EmbedOptions()), model.prepare(mixed[0], logits=places)]
    results = model.run(queries)
    assert results[0].logits is None and results[1].embedding is None
    assert worst([results[1].logits], [everything[places]]) <= 1e-5


def test_errors_name_the_place_not_the_sequence() -> None:
    model = make()
    with pytest.raises(IllegalResidueError) as caught:
        model.embed(["MK", "MKWVTFISLL1LF"])
    assert (caught.value.index, caught.value.position) == (1, 11)
    assert "WVTF" not in str(caught.value) and "position 11" in str(caught.value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.embed(["MK"], layers=(7,)), "layer 7 is not there"),
        (lambda m: m.embed(["MK"], pooling="median"), "not one of mean, max, cls"),
        (lambda m: m.embed(["M" * 2000], long_sequences="chop"), "not one of error, window, truncate"),
        (lambda m: make(dtype="float16"), "not one of float32, bfloat16"),
        (lambda m: make(threads=0), "below 1"),
    ],
)
def test_wrong_settings_are_refused(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(SpecError, match=message):
        call(make())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there() -> None:
    encoder = PackedEncoder(CONFIGS["tiny"])
    with pytest.raises(ResourceError, match="no CUDA device"):
        Predictor(encoder, device="cuda")


def test_out_of_memory_is_tried_again_smaller(mixed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch that does not fit is halved until it does; the results stay the same, every one once."""
    model = make(budget=8192, threads=1)
    expected = model.embed(mixed[:20])
    forward, sizes = PackedEncoder.forward, []

    def small_device(self, tokens, cu_seqlens, *rest, **more):  # type: ignore[no-untyped-def]
        sizes.append(len(cu_seqlens) - 1)
        if len(cu_seqlens) - 1 > 3:
            raise torch.OutOfMemoryError("no")
        return forward(self, tokens, cu_seqlens, *rest, **more)

    monkeypatch.setattr(PackedEncoder, "forward", small_device)
    assert worst(model.embed(mixed[:20]), expected) <= 1e-5
    assert max(sizes) > 3 and sum(s for s in sizes if s <= 3) == 20


def test_a_sequence_that_never_fits_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()

    def no_room(self, *args, **more):  # type: ignore[no-untyped-def]
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(PackedEncoder, "forward", no_room)
    with pytest.raises(ResourceError, match="one sequence of 2 residues does not fit"):
        model.embed(["MK"])
