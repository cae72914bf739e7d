"""BERT, T5 encoders and models of words behind the backbone's contract, against transformers' own classes and
tokenizers, one sequence at a time."""

import json

import family_folders
import numpy as np
import pytest
import torch
from family_folders import NUCLEOTIDES, PROT_BERT

import bioseq
from bioseq.backbones.importing import export_checkpoint, import_checkpoint
from bioseq.bundles.bundle import open_bundle
from bioseq.errors import (
    BioseqError,
    BundleError,
    CheckpointError,
    EmptySequenceError,
    IllegalResidueError,
    SequenceTooLongError,
    SpecError,
)

transformers = pytest.importorskip("transformers")
spm = pytest.importorskip("sentencepiece")

PROTEINS = ["MKTAYIAKQRQISFVKSHFSRQ", "MKV", "ACDEFGHIKLMNPQRSTVWYXLLLL", "W" * 60 + "A"]
BASES = ["ACGTACGTACGTAGGCATTACGACGGTACCATG", "ACGTANGTACCNNTGATCA", "TTTTTT", "ACG" * 20 + "A"]
FAMILIES = ("prot_bert", "prot_t5", "ankh", "nucleotides", "dnabert")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    found = {}
    for family in FAMILIES:
        found[family] = tmp_path_factory.mktemp(family)
        getattr(family_folders, family)(found[family])
    return found


def own_tokens(family, folder, text):
    """(ids with special ones, for each residue the tokens that cover it) by transformers' and sentencepiece's own."""
    n = len(text)
    if family == "prot_bert":
        said = transformers.BertTokenizer(str(folder / "vocab.txt"), do_lower_case=False)(" ".join(text))[
            "input_ids"
        ]
        return said, [[i + 1] for i in range(n)]
    if family == "prot_t5":
        said = spm.SentencePieceProcessor(model_file=str(folder / "spiece.model")).encode(" ".join(text))
        return [*said, 1], [[i] for i in range(n)]
    if family == "ankh":
        return [["<pad>", "</s>", "<unk>", *"ALGVSREDTIPKFQNYMHWCXBOUZ"].index(a) for a in text] + [1], [
            [i] for i in range(n)
        ]
    if family == "dnabert":
        spaced = " ".join(text[i : i + 3] for i in range(n - 2))
        said = transformers.BertTokenizer(str(folder / "vocab.txt"), do_lower_case=False)(spaced)["input_ids"]
        return said, [[1 + j for j in range(max(0, i - 2), min(i, n - 3) + 1)] for i in range(n)]
    said = transformers.EsmTokenizer(str(folder / "vocab.txt"), eos_token=None)(text)["input_ids"]
    cover = [[i + 1] * len(NUCLEOTIDES[t]) for i, t in enumerate(said[1:])]
    return said, [[t] for part in cover for t in part]


def reference(family, folder, text):
    """(states of each residue by layer, logits of each token)."""
    ids, cover = own_tokens(family, folder, text)
    kinds = {"prot_bert": "BertForMaskedLM", "dnabert": "BertForMaskedLM", "nucleotides": "EsmForMaskedLM"}
    kind = getattr(transformers, kinds.get(family, "T5EncoderModel"))
    row = torch.tensor([ids])
    with torch.no_grad():
        out = kind.from_pretrained(folder).eval()(
            row, attention_mask=torch.ones_like(row), output_hidden_states=True
        )
    states = [torch.stack([h[0][t].mean(0) for t in cover]).numpy() for h in out.hidden_states]
    return states, out.logits[0].numpy() if "logits" in out else None


def worst(a, b):
    return float(np.linalg.norm(np.asarray(a) - np.asarray(b)) / np.linalg.norm(np.asarray(b)))


def sequences(family):
    return BASES if family in ("nucleotides", "dnabert") else PROTEINS


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_equals_transformers_residue_by_residue(folders, family):
    model = bioseq.load(folders[family], threads=1)
    texts = sequences(family)
    got = model.embed(texts, layers=range(4), per_residue=True)
    for text, states in zip(texts, got, strict=True):
        want, _ = reference(family, folders[family], text)
        assert states.shape == (4, len(text), 32)
        for layer in range(4):
            assert worst(states[layer], want[layer]) <= 1e-5, (layer, text)
    assert worst(model.embed(texts), [s[-1].mean(0) for s in got]) <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_a_result_does_not_depend_on_batch_mates(folders, family):
    for dtype, limit in (("float32", 1e-5), ("bfloat16", 2e-2)):
        model = bioseq.load(folders[family], threads=1, dtype=dtype)
        for text, row in zip(sequences(family), model.embed(sequences(family))):
            assert worst(row, model.embed([text])[0]) <= limit


def test_a_berts_logits_are_those_of_the_alphabets_letters(folders):
    model = bioseq.load(folders["prot_bert"], threads=1)
    tokens = model.alphabet.tokens
    for text, said in zip(PROTEINS, model.logits(PROTEINS), strict=True):
        want = reference("prot_bert", folders["prot_bert"], text)[1][1:-1]
        letters = [t for t in tokens if t in PROT_BERT]
        ours, theirs = ([v.index(t) for t in letters] for v in (list(tokens), PROT_BERT))
        assert worst(said[:, ours], want[:, theirs]) <= 1e-5
        assert (said[:, tokens.index("<null_1>")] == np.float32(-1e4)).all()
    scores = model.score("MKTAYIAKQR", ["K2A", "T3G:A4V"], homologs="none")
    assert np.isfinite(scores).all()
    masked = model.logits(["MK<mask>AY"])[0]
    ids = transformers.BertTokenizer(str(folders["prot_bert"] / "vocab.txt"), do_lower_case=False)(
        "M K [MASK] A Y"
    )
    with torch.no_grad():
        hf = transformers.BertForMaskedLM.from_pretrained(folders["prot_bert"]).eval()
        want = hf(torch.tensor([ids["input_ids"]])).logits[0, 3].numpy()
    assert worst(masked[2, model.alphabet.id("L")], want[5]) <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_imported_served_by_name_and_exported(folders, family, tmp_path):
    bundle = import_checkpoint(folders[family], tmp_path / "bundle", name="m")
    again, direct = bioseq.load(tmp_path / "bundle", threads=1), bioseq.load(folders[family], threads=1)
    assert again.weights_hash == direct.weights_hash
    assert np.array_equal(again.embed(sequences(family)), direct.embed(sequences(family)))
    assert again.config.n_parameters == sum(p.numel() for p in again.encoder.parameters())
    export_checkpoint(open_bundle(bundle.path), tmp_path / "out")
    if family in ("prot_t5", "ankh"):  # exported as the encoder that it is
        transformers.T5EncoderModel.from_pretrained(tmp_path / "out")
    back = bioseq.load(tmp_path / "out", threads=1)
    assert back.weights_hash == again.weights_hash


def test_long_sequences_are_windowed(folders):
    model = bioseq.load(folders["nucleotides"], threads=1)
    assert model.max_residues == 3 * (40 - 2 - 1)
    long = "ACGTTGCA" * 40
    with pytest.raises(SequenceTooLongError, match="320 residues; the limit is 111"):
        model.embed([long])
    rows = model.embed([long], long_sequences="window", per_residue=True)[0]
    assert rows.shape == (320, 32) and np.isfinite(rows).all()
    with pytest.raises(SequenceTooLongError, match="tokens; the limit is 37"):
        model.embed(["ACGN" * 25])


def test_what_a_family_cannot_do_is_refused_by_name(folders, tmp_path):
    t5_model, words_model = (bioseq.load(folders[f], threads=1) for f in ("prot_t5", "nucleotides"))
    with pytest.raises(SpecError, match="no token before the sequence"):
        t5_model.embed(["MKV"], pooling="cls")
    assert words_model.embed(["ACGT"], pooling="cls").shape == (1, 32)
    for model in (t5_model, words_model):
        assert not model.has_lm_head
        with pytest.raises(BioseqError, match="no language-model head"):
            model.logits(["ACG"])
        with pytest.raises(BioseqError, match="no language-model head"):
            model.score("ACG", ["A1C"])
    with pytest.raises(IllegalResidueError, match="This looks like a protein, and DNA is needed"):
        words_model.embed(["MKTAYIAKQRQ"])
    with pytest.raises(EmptySequenceError, match="reads words of 3"):
        bioseq.load(folders["dnabert"]).embed(["AC"])
    with pytest.raises(SpecError, match="without int8"):
        bioseq.load(folders["prot_t5"], dtype="int8")
    from bioseq.backbones.storage import load_packed

    bundle = import_checkpoint(folders["prot_t5"], tmp_path / "bundle", name="m")
    with pytest.raises(BundleError, match="runs through transformers"):
        load_packed(bundle)


def test_letters_that_the_authors_read_as_x_are_told(folders):
    model = bioseq.load(folders["prot_t5"], threads=1)
    query = model.prepare("MKUOBZ", embed=None)
    assert query.notes == ("1 B read as X", "1 O read as X", "1 U read as X", "1 Z read as X")
    assert np.array_equal(model.embed(["MKU"]), model.embed(["MKX"]))
    own = bioseq.load(folders["ankh"], threads=1)
    assert not np.array_equal(own.embed(["MKU"]), own.embed(["MKX"]))


def changed(folder, to, **keys):
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    raw = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(raw | keys))
    return to


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"auto_map": {"AutoModel": "bert_layers.BertModel"}}, "bioseq runs no such code"),
        ({"model_type": "mamba"}, "model_type 'mamba'; bioseq reads AMPLIFY, bert, esm, esmc, t5"),
        ({"vocab_size": 12}, "vocab.txt has 30 tokens"),
        ({"num_hidden_layers": 2}, "unknown tensor: "),
        ({"hidden_size": 64, "num_attention_heads": 4}, "tensor: "),
        ({"is_decoder": True}, "is_decoder True"),
    ],
)
def test_bad_folders_are_refused(folders, tmp_path, keys, said):
    with pytest.raises(CheckpointError, match=said):
        bioseq.load(changed(folders["prot_bert"], tmp_path / "bad", **keys))


def test_a_vocabulary_that_does_not_match_is_refused(folders, tmp_path):
    bad = changed(folders["prot_bert"], tmp_path / "bad")
    (bad / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "the", "cat", "##s"]))
    with pytest.raises(CheckpointError, match="neither proteins, DNA nor RNA"):
        bioseq.load(bad)
    (bad / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "AC", "ACGT", "ACGTT"]))
    with pytest.raises(CheckpointError, match="not all words"):
        bioseq.load(bad)
    (bad / "vocab.txt").unlink()
    with pytest.raises(CheckpointError, match="has no vocabulary"):
        bioseq.load(bad)


def test_a_config_cannot_ask_for_code_from_elsewhere(folders, tmp_path, monkeypatch):
    asked = {
        "attn_implementation": "evil/kernel", "_attn_implementation": "evil/kernel", "_attn_implementation_internal": "evil/kernel",
        "quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}, "use_kernels": True,
    }  # fmt: skip
    plain = bioseq.load(folders["prot_bert"], threads=1)
    folder = changed(folders["prot_bert"], tmp_path / "evil", **asked)
    model = bioseq.load(folder, threads=1)
    assert model.encoder.model.config._attn_implementation == "sdpa"
    assert np.array_equal(model.embed(PROTEINS), plain.embed(PROTEINS))
