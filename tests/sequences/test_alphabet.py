"""Vocabularies: ESM-2's ids, what is folded, reported and refused, and at which position."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bioseq.errors import EmptySequenceError, IllegalResidueError
from bioseq.sequences.alphabet import Alphabet, by_name, dna, protein, rna

# As published with the ESM-2 checkpoints (vocab.txt), written out so that a change of order is seen.
ESM2 = ["<cls>", "<pad>", "<eos>", "<unk>", *"LAGVSERTIDPKQNFYMHWCXBUZO", ".", "-", "<null_1>", "<mask>"]


def test_protein_ids_are_those_of_esm2():
    assert list(protein().tokens) == ESM2 and len(protein()) == 33
    assert protein().encode("LAGVX").ids.tolist() == [4, 5, 6, 7, 24]
    assert (protein().cls_id, protein().pad_id, protein().eos_id, protein().mask_id) == (0, 1, 2, 32)


def test_protein_ids_equal_the_tokenizer_of_transformers(tmp_path):
    from transformers import EsmTokenizer

    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join(ESM2))
    tokenizer = EsmTokenizer(str(vocabulary))
    text = "MKTAYIAKQRQISFVKSHFSRQBZXUO"
    assert tokenizer(text)["input_ids"][1:-1] == protein().encode(text).ids.tolist()
    assert tokenizer("MK<mask>L")["input_ids"][1:-1] == protein().encode("MK<mask>L", masks=True).ids.tolist()


@pytest.mark.parametrize("alphabet", [protein(), dna(), rna()], ids=lambda a: a.name)
def test_special_tokens_and_standard_letters(alphabet: Alphabet):
    for id_, token in (
        (alphabet.cls_id, "<cls>"),
        (alphabet.pad_id, "<pad>"),
        (alphabet.eos_id, "<eos>"),
        (alphabet.mask_id, "<mask>"),
    ):
        assert alphabet.tokens[id_] == token == alphabet.decode(np.array([id_]))
    assert alphabet.decode(alphabet.standard_ids) == alphabet.standard
    assert by_name(alphabet.name) is alphabet
    assert set(alphabet.standard) <= set(alphabet.letters)


@pytest.mark.parametrize("alphabet", [protein(), dna(), rna()], ids=lambda a: a.name)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_what_is_encoded_comes_back_in_either_case(alphabet: Alphabet, data):
    text = data.draw(st.text(alphabet.letters, min_size=1, max_size=50))
    encoded = alphabet.encode(text)
    assert encoded.ids.dtype == np.uint8 and len(encoded) == len(text)
    assert alphabet.decode(encoded.ids) == text
    assert encoded.notes == ()
    assert alphabet.encode(text.lower()).ids.tolist() == encoded.ids.tolist()


def test_a_stop_at_the_end_is_dropped_and_reported():
    encoded = protein().encode("MKL*")
    assert protein().decode(encoded.ids) == "MKL"
    assert any("stop" in n for n in encoded.notes)


def test_j_becomes_x_and_is_reported_with_its_count():
    encoded = protein().encode("MJKj")
    assert protein().decode(encoded.ids) == "MXKX"
    assert encoded.notes == ("2 J read as X",)


def test_ambiguous_letters_are_understood():
    assert protein().decode(protein().encode("BZXUO").ids) == "BZXUO"
    assert dna().decode(dna().encode("ACGTN").ids) == "ACGTN"


@pytest.mark.parametrize("text", ["", "*"])
def test_nothing_to_encode(text):
    with pytest.raises(EmptySequenceError):
        protein().encode(text)


@pytest.mark.parametrize(
    ("text", "position", "words"),
    [
        ("MK1L", 3, "'1'"),
        ("M*KL", 2, "a stop '\\*' inside"),
        ("MKL**", 4, "a stop"),
        ("MK-L", 3, "gap '-'"),
        (".MKL", 1, "gap '.'"),
        ("MK L", 3, "' '"),
        ("MKé", 3, "this character"),
        ("MK中", 3, "this character"),
        ("\x00MK", 1, "this character"),
        ("MK?", 3, "'\\?'"),
        ("MK<mask>", 3, "'<'"),
    ],
)
def test_anything_else_is_refused_at_its_position(text, position, words):
    with pytest.raises(IllegalResidueError, match=words) as caught:
        protein().encode(text)
    assert caught.value.position == position
    assert f"position {position}" in str(caught.value)


@settings(max_examples=200, deadline=None)
@given(st.text("MKLAG", max_size=10), st.characters(), st.text("MKLAG", min_size=1, max_size=10))
def test_every_character_is_known_or_refused_never_guessed(before, character, after):
    known = set(protein().letters + protein().letters.lower() + "Jj")
    text = before + character + after
    if character in known:
        assert len(protein().encode(text)) == len(text)
    else:
        with pytest.raises(IllegalResidueError) as caught:
            protein().encode(text)
        assert caught.value.position == len(before) + 1
        assert before + character + after not in str(caught.value)


def test_gaps_are_tokens_when_asked_for():
    assert protein().encode("M-K.", gaps=True).ids.tolist() == [20, 30, 15, 29]


def test_letters_of_one_alphabet_are_no_letters_of_another():
    with pytest.raises(IllegalResidueError, match="The dna alphabet has"):
        dna().encode("ACGU")
    with pytest.raises(IllegalResidueError):
        rna().encode("ACGT")


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(["M", "K", "a", "<mask>"]), min_size=1, max_size=12))
def test_mask_tokens_count_as_one_residue_each(tokens):
    ids = protein().encode("".join(tokens), masks=True).ids
    assert ids.tolist() == [protein().id(t.upper() if t != "<mask>" else t) for t in tokens]


@pytest.mark.parametrize(
    ("text", "position"),
    [
        ("MK<mask>1L", 4),
        ("1<mask>", 1),
        ("*<mask>K", 1),
        ("M*<mask>", 2),
        ("<mask>-", 2),
        ("M\x1aK<mask>", 2),
    ],
)
def test_faults_beside_masks_are_found_at_their_position(text, position):
    with pytest.raises(IllegalResidueError) as caught:
        protein().encode(text, masks=True)
    assert caught.value.position == position


def test_notes_beside_masks():
    encoded = protein().encode("J<mask>JK*", masks=True)
    assert protein().decode(encoded.ids) == "X<mask>XK"
    assert encoded.notes == ("stop codon '*' at the end dropped", "2 J read as X")


def test_alphabets_do_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        protein().standard = "A"
    with pytest.raises(ValueError, match="read-only"):
        protein()._table[0] = 1
    with pytest.raises(ValueError, match="unique"):
        Alphabet("bad", ("A", "A"), standard="A", letters="A", gaps="")


def test_the_other_strand():
    a = dna()
    turn = lambda s, alphabet=a: alphabet.decode(alphabet.reverse_complement(alphabet.encode(s).ids))  # noqa: E731
    assert turn("AACGTTN") == "NAACGTT"
    assert turn("RYSWKMBDHVN") == "NBDHVKMWSRY"
    assert turn("GAUC", rna()) == "GAUC" and turn("AAU", rna()) == "AUU"
    masked = a.encode("A<mask>C", masks=True).ids
    assert a.decode(a.reverse_complement(masked)) == "G<mask>T"
    assert turn(turn("ACGTRYKMSWBDHVN")) == "ACGTRYKMSWBDHVN"
    with pytest.raises(ValueError, match="protein alphabet has no complement"):
        protein().reverse_complement(protein().encode("MK").ids)


@pytest.mark.parametrize("letters", ["ACGT", "ACGU", "acgt", "ACGTN"])
def test_nucleotides_are_no_protein(letters):
    sequence = letters * 10
    with pytest.raises(
        IllegalResidueError, match="all of them nucleotides; this model reads proteins"
    ) as fault:
        protein().check_kind(sequence)
    assert "Translate them" in str(fault.value) and sequence not in str(fault.value)
    protein().check_kind(sequence + "S")  # one other letter makes it a protein
    dna().check_kind(sequence)


@pytest.mark.parametrize(
    "sequence", ["A" * 40, "ACG" * 20, "GATTACA", "ACGT" * 7, "TANATANA" * 10], ids=range(5)
)
def test_peptides_of_few_letters_are_proteins(sequence):
    protein().check_kind(sequence)


@pytest.mark.parametrize("alphabet", [dna(), rna()], ids=lambda a: a.name)
def test_a_protein_is_no_nucleic_acid(alphabet):
    with pytest.raises(IllegalResidueError, match=r"position 3: 'E'.*looks like a protein") as fault:
        alphabet.encode("MKELLP")  # M and K are ambiguity codes
    assert f"{alphabet.name.upper()} is needed" in str(fault.value)
    wrong, right = ("U", "T") if alphabet.name == "dna" else ("T", "U")
    with pytest.raises(IllegalResidueError, match=f"Write {wrong} as {right}"):
        alphabet.encode("AC" + wrong.lower())
