"""Small checkpoint folders with random weights of every family, as transformers' own classes write them."""

import itertools
import json

import amplify_reference
import pytest
import torch

from bioseq.backbones.packed.config import CONFIGS

transformers = pytest.importorskip("transformers")
spm = pytest.importorskip("sentencepiece")

SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
PROT_BERT = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"LAGVESIKRDTPNQFYMHCWXUBZO"]


def words(letters="ATCG", k=3):
    return ["".join(w) for w in itertools.product(letters, repeat=k)]


def randomise(model):
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def t5(folder, gated):
    how = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False} if gated else {}
    config = transformers.T5Config(
        vocab_size=40, d_model=32, num_layers=3, num_heads=4, d_kv=8, d_ff=48, decoder_start_token_id=0, **how
    )
    randomise(transformers.T5ForConditionalGeneration(config)).save_pretrained(folder)


def prot_bert(folder):
    randomise(
        transformers.BertForPreTraining(transformers.BertConfig(vocab_size=30, **SMALL))
    ).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(PROT_BERT))


def prot_t5(folder):
    t5(folder, False)
    rows = [" ".join("ACDEFGHIKLMNPQRSTVWYXBOUZ" * 2)] * 20
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(rows), model_prefix=str(folder / "spiece"), model_type="word", vocab_size=28, pad_id=0,
        eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip


def ankh(folder):
    t5(folder, True)
    pairs = [[t, 0.0] for t in ("<pad>", "</s>", "<unk>", *"ALGVSREDTIPKFQNYMHWCXBOUZ")]
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"type": "Unigram", "vocab": pairs}}))


NUCLEOTIDES = ["<unk>", "<pad>", "<mask>", "<cls>", *words(), *"ATCGN", "<eos>", "<bos>"]


def nucleotides(folder):
    config = transformers.EsmConfig(
        vocab_size=len(NUCLEOTIDES), pad_token_id=1, mask_token_id=2, token_dropout=True, emb_layer_norm_before=False,
        position_embedding_type="absolute", max_position_embeddings=40, layer_norm_eps=1e-12, **SMALL,
    )  # fmt: skip
    randomise(transformers.EsmForMaskedLM(config)).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(NUCLEOTIDES))


DNABERT = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words()]


def dnabert(folder):
    config = transformers.BertConfig(vocab_size=len(DNABERT), max_position_embeddings=64, **SMALL)
    randomise(transformers.BertForMaskedLM(config)).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(DNABERT))


PACKED = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}


def esm1b_model(lm=True):
    config = transformers.EsmConfig(
        **PACKED, intermediate_size=96, vocab_size=33, pad_token_id=1, mask_token_id=32, token_dropout=True,
        position_embedding_type="absolute", emb_layer_norm_before=True, max_position_embeddings=80, layer_norm_eps=1e-5,
    )  # fmt: skip
    torch.manual_seed(0)
    return randomise((transformers.EsmForMaskedLM if lm else transformers.EsmModel)(config))


def esmc_model(lm=True):
    config = transformers.EsmcConfig(**PACKED, vocab_size=64, intermediate_size=64)
    torch.manual_seed(0)
    return randomise((transformers.EsmcForMaskedLM if lm else transformers.EsmcModel)(config))


def esm1b(folder):
    esm1b_model().save_pretrained(folder, save_original_format=False)


def esmc(folder):
    esmc_model().save_pretrained(folder, save_original_format=False)


def amplify(folder):
    amplify_reference.save(folder)


def esm2(folder):
    c = CONFIGS["tiny"]
    config = transformers.EsmConfig(
        vocab_size=33, mask_token_id=32, pad_token_id=1, hidden_size=c.d_model, num_hidden_layers=c.n_layers,
        num_attention_heads=c.n_heads, intermediate_size=c.d_ff, position_embedding_type="rotary", token_dropout=True,
        layer_norm_eps=1e-5, emb_layer_norm_before=False, max_position_embeddings=1026,
    )  # fmt: skip
    randomise(transformers.EsmForMaskedLM(config)).save_pretrained(folder, save_original_format=False)


MAKERS = {
    "ESM-2": esm2, "ESM-1b": esm1b, "ESM-C": esmc, "AMPLIFY": amplify, "ProtBert": prot_bert, "ProtT5": prot_t5,
    "Ankh": ankh, "Nucleotide Transformer": nucleotides, "DNABERT": dnabert,
}  # fmt: skip
