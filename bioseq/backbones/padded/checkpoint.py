"""Hugging Face folders of families that the packed encoder does not compute: BERT, T5 encoders, ESM with words of k letters.

ProtBert and ProtT5: Elnaggar et al. 2021, doi 10.1109/TPAMI.2021.3095381; Ankh: Elnaggar et al. 2023, arXiv 2301.06568;
ProstT5: Heinzinger et al. 2024, doi 10.1093/nargab/lqae150; the Nucleotide Transformer: Dalla-Torre et al. 2024, doi
10.1038/s41592-024-02523-z; DNABERT: Ji et al. 2021, doi 10.1093/bioinformatics/btab083. Only classes of transformers
itself are used; a repository that needs its own code is refused.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from bioseq.backbones.checkpoints.layout import Layout
from bioseq.backbones.checkpoints.reading import Reader, parse_json, read_text, read_vocabulary
from bioseq.backbones.checkpoints.tensors import read_tensors
from bioseq.backbones.packed.weights import hash_weights
from bioseq.backbones.padded.config import PaddedConfig
from bioseq.backbones.padded.encoder import PaddedEncoder
from bioseq.errors import ArtefactError, BioseqError, CheckpointError
from bioseq.sequences.alphabet import MASK_TEXT, Alphabet, by_name

FAMILIES = ("bert", "t5", "esm")
LONGEST = 1022  # residues, of a family without a limit of its own
_SPECIAL = {  # the alphabets' names -> what families call them
    "<cls>": ("[CLS]", "<cls>"),
    "<pad>": ("[PAD]", "<pad>"),
    "<eos>": ("[SEP]", "</s>", "<eos>"),
    "<unk>": ("[UNK]", "<unk>"),
    MASK_TEXT: ("[MASK]", "<mask>"),
}
_TO_AMINO_ACIDS = "<AA2fold>"  # ProstT5's token before a sequence of amino acids
# What a checkpoint may hold beside what an embedding or a masked residue needs; T5's decoder is not even kept.
_SPARE = re.compile(
    r"^((bert|esm)\.)?(pooler\.|embeddings\.position_ids|contact_head\.|encoder\..*rotary_embeddings)|^cls\.seq_relationship"
    r"|^lm_head\.|contact_head"
)
_LEFT_OUT = re.compile(r"^(decoder\.|lm_head\.)")


@dataclass(frozen=True)
class PaddedCheckpoint:
    """A folder read. `tensors` have the family's own names."""

    config: PaddedConfig
    alphabet: str
    tensors: dict[str, torch.Tensor]
    layout: Layout
    extras: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def lm_head(self) -> bool:
        return has_lm_head(self.config, self.tensors)

    @cached_property
    def encoder(self) -> PaddedEncoder:
        return build_padded(self.config, self.tensors)

    @cached_property
    def weights_hash(self) -> str:
        return hash_weights(self.config, self.tensors)


def claims(raw: dict[str, Any], tokens: list[str] | None) -> bool:
    """Whether this module reads a config.json with such a vocabulary."""
    kind = raw.get("model_type")
    return kind in ("bert", "t5") or (kind == "esm" and _words(tokens or []) is not None)


def read_config(path: Path, raw: dict[str, Any]) -> tuple[PaddedConfig, str]:
    """(shape without the number of weights, alphabet's name). Raises `CheckpointError`."""
    family = str(raw["model_type"])
    read = Reader(raw, family)
    if raw.get("auto_map"):
        raise read.refuse(
            "auto_map",
            raw["auto_map"],
            "the model needs program code from its repository, and bioseq runs no such code",
        )
    read.only(is_decoder=False, add_cross_attention=False)
    tokens, where = read_vocabulary(path, raw)
    if tokens is None:
        raise CheckpointError(
            f"{path} has no vocabulary.",
            hint="Put vocab.txt, tokenizer.json or spiece.model beside config.json.",
        )
    if len(tokens) > read.get("vocab_size", len(tokens), int):
        raise read.refuse("vocab_size", raw["vocab_size"], f"{where} has {len(tokens)} tokens")
    words = _words(tokens)
    alphabet, ids, marked = _letters(tokens, where, words)
    special = {
        name: next((tokens.index(t) for t in known if t in tokens), -1) for name, known in _SPECIAL.items()
    }
    ids = tuple(special.get(token, i) for token, i in zip(alphabet.tokens, ids))
    if special["<pad>"] < 0 or special["<unk>"] < 0:
        raise CheckpointError(f"{where} has no token for padding, or for unknown letters.")
    has_cls = family != "t5" and special["<cls>"] >= 0
    prefix = (
        special["<cls>"] if has_cls else tokens.index(_TO_AMINO_ACIDS) if _TO_AMINO_ACIDS in tokens else -1
    )
    suffix = -1 if family == "esm" else special["<eos>"]  # the Nucleotide Transformer ends without a token
    k = words.k if words else 1
    limit, longest = 0, LONGEST
    if family != "t5":
        # RoBERTa's positions, as ESM has them, begin after the padding's
        limit = read.get("max_position_embeddings", 512, int) - (
            raw.get("pad_token_id", 1) + 1 if family == "esm" else 0
        )
        limit -= (prefix >= 0) + (suffix >= 0)
        longest = limit + k - 1 if words and words.overlapping else limit * k
        longest = min(longest, LONGEST) if k == 1 else longest
    names = {"t5": ("num_layers", "d_model", "num_heads", "d_ff")}.get(
        family, ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
    )
    sizes = [read.get(name, None, int) for name in names]
    left_out = ("architectures", "transformers_version", "torch_dtype", "dtype", "_name_or_path")
    return PaddedConfig(
        name=f"{family}-{sizes[0]}x{sizes[1]}",
        family=family,  # type: ignore[arg-type]
        settings=json.dumps({k: v for k, v in raw.items() if k not in left_out}, sort_keys=True),
        ids=ids,
        n_layers=sizes[0],
        d_model=sizes[1],
        n_heads=sizes[2],
        d_ff=sizes[3],
        vocab_size=len(alphabet.tokens),
        max_residues=longest,
        n_weights=0,
        pad=special["<pad>"],
        prefix=prefix,
        suffix=suffix,
        has_cls=has_cls,
        max_tokens=limit,
        k=k,
        overlapping=words.overlapping if words else False,
        word_letters=words.letters if words else "",
        first_word=words.first if words else 0,
        # as the authors of ProtBert and ProtT5 give sequences to their models
        read_as_x="BOUZ" if alphabet.name == "protein" and (family == "bert" or marked) else "",
    ), alphabet.name


@dataclass(frozen=True)
class _Words:
    k: int
    letters: str
    first: int
    overlapping: bool


def _words(tokens: list[str]) -> _Words | None:
    """The words of k letters that a vocabulary consists of; None for one of letters. They overlap where it has no
    tokens for single letters (DNABERT), else they follow each other (Nucleotide Transformer)."""
    found = [(i, t) for i, t in enumerate(tokens) if len(t) > 1 and set(t) <= set("ACGTU")]
    if not found:
        return None
    k, first = len(found[0][1]), found[0][0]
    letters = "".join(dict.fromkeys("".join(t for _, t in found)))
    wanted = ["".join(word) for word in itertools.product(letters, repeat=k)]
    if len(letters) != 4 or tokens[first : first + len(wanted)] != wanted or len(found) != len(wanted):
        raise CheckpointError(
            f"the vocabulary has words of letters that are not all words of {k} in order.",
            hint="bioseq reads single letters and complete words of k letters, no byte pair encoding.",
        )
    return _Words(k, letters, first, not set(letters) & set(tokens))


def _letters(tokens: list[str], where: str, words: _Words | None) -> tuple[Alphabet, tuple[int, ...], bool]:
    """(alphabet, its letters' ids or -1, whether letters are spelt with sentencepiece's mark of a word's begin)."""
    marked = "▁A" in tokens
    place = {t.removeprefix("▁"): i for i, t in enumerate(tokens) if not marked or t.startswith("▁")}
    have = set(words.letters) if words else {t for t in place if len(t) == 1}
    name = next((n for n in ("protein", "dna", "rna") if set(by_name(n).standard) <= have), None)
    if name is None or (words and name == "protein"):
        raise CheckpointError(f"{where} has the letters of neither proteins, DNA nor RNA.")
    alphabet = by_name(name)
    ids = tuple(place.get(t, -1) for t in alphabet.tokens)
    return alphabet, ids, marked


def load_padded(path: Path) -> PaddedCheckpoint:
    """Read a folder; tensors in their stored dtype. Raises `CheckpointError`."""
    text = read_text(path / "config.json")
    config, alphabet = read_config(path, parse_json(text, path / "config.json"))
    found = read_tensors(path)
    if config.family == "t5":
        found = {k: v for k, v in found.items() if not _LEFT_OUT.match(k)}
    extras = {k: found.pop(k) for k in list(found) if _spare(config, k)}
    checkpoint = PaddedCheckpoint(config, alphabet, found, Layout(text, ""), extras)
    encoder = checkpoint.encoder  # refuses tensors that do not fit
    encoder.config = replace(config, n_weights=sum(p.numel() for p in encoder.parameters()))
    counted = replace(checkpoint, config=encoder.config)
    counted.__dict__["encoder"] = encoder  # built once
    return counted


def _spare(config: PaddedConfig, name: str) -> bool:
    if config.k > 1 and name.startswith(("lm_head.", "cls.")):
        return True  # words have no logits of letters
    return _SPARE.match(name) is not None


def has_lm_head(config: PaddedConfig, tensors: Mapping[str, torch.Tensor]) -> bool:
    """A T5 encoder has none, and words have logits of words, not of letters."""
    return config.family == "bert" and config.k == 1 and "cls.predictions.transform.dense.weight" in tensors


def build_padded(
    config: PaddedConfig,
    tensors: Mapping[str, torch.Tensor],
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    error: type[ArtefactError] = CheckpointError,
) -> PaddedEncoder:
    """An encoder in evaluation mode with these tensors. Raises `error` naming the tensor that is missing, unknown or of
    another shape, `BioseqError` without transformers."""
    try:
        import transformers as hf
    except ImportError:
        raise BioseqError(
            f"{config.name} runs through the package transformers, which is not installed.",
            hint="pip install 'bioseq[families]'",
        ) from None
    lm_head = has_lm_head(config, tensors)
    kinds: dict[str, tuple[Any, Any]] = {
        "bert": (hf.BertConfig, hf.BertForMaskedLM if lm_head else hf.BertModel),
        "t5": (hf.T5Config, hf.T5EncoderModel),
        "esm": (hf.EsmConfig, hf.EsmModel),
    }
    make, kind = kinds[config.family]
    # What the shape needs and nothing else: a config.json may also ask for attention kernels or quantisation, whose code
    # transformers would fetch.
    known = {k for k in make().to_dict() if not k.startswith("_") and k != "quantization_config"}
    settings = {k: v for k, v in json.loads(config.settings).items() if k in known}
    how = {} if lm_head or config.family == "t5" else {"add_pooling_layer": False}
    with _quiet(hf):
        model, told = kind.from_pretrained(
            None,
            config=make(**settings),
            state_dict=dict(tensors),
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            attn_implementation="sdpa",
            **how,
        )
    shapes = [name for name, *_ in told["mismatched_keys"]]
    for what, names in (
        ("missing", told["missing_keys"]),
        ("unknown", told["unexpected_keys"]),
        ("misshapen", shapes),
    ):
        names = [n for n in names if not _SPARE.match(n)]
        if names:
            raise error(f"{what} tensor: {min(names)} ({len(names)} in all).")
    head = model.cls if lm_head else None
    encoder = PaddedEncoder(config, model.bert if lm_head else model, head)
    return encoder.to(device).requires_grad_(True).eval()


@contextmanager
def _quiet(hf: Any) -> Iterator[None]:
    """Without transformers' bars and reports: what is wrong is said as an error."""
    log = hf.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()
