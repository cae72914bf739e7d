"""The packed encoder: ESM-2's architecture and its cousins' over rows of concatenated sequences, without padding.

Pre-norm transformer with rotary positions that restart at every sequence, token dropout rescaled per
sequence, exact GELU, and an LM head tied to the token embedding (ESM-2: Lin et al. 2023, doi
10.1126/science.ade2574). By `ModelConfig` also learned positions and a norm of the embedding (ESM-1b: Rives et al.
2021, doi 10.1073/pnas.2016239118); SwiGLU, norms of queries and keys over the whole width, and divided branches (ESM
Cambrian, as transformers' `EsmcModel` has it); RMSNorm and no biases (AMPLIFY: Fournier et al. 2024, doi
10.1101/2024.09.23.614603). Not covered: post-norm, ALiBi, grouped queries, decoding.

Two parts are ours and absent from ESM-2. A second input gives what the homologs of each residue say: E = 21
numbers, the profile's log-odds of the 20 letters in the order of their token ids, and log(1 + weighted number of
homologs on the column). It is added to the embedding through one linear layer, and the log-odds are added to
the letters' logits, each residue's times a gate that is computed from its hidden state. Both are without bias,
so a residue without homologs (all 21 are 0) is predicted by the plain masked language model. And a depthwise
convolution before each attention mixes neighbours, within each sequence.

Legend: T tokens of the pack, N sequences, D model width, H heads, d head size, F inner width, V vocabulary,
E columns of the second input, S tokens of the pack with gaps between the sequences.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bioseq.backbones.packed.attention import attend
from bioseq.backbones.packed.config import EVIDENCE_WIDTH, FIRST_LETTER, N_LETTERS, ModelConfig
from bioseq.backbones.protocol import Backbone, places

_LETTERS = slice(FIRST_LETTER, FIRST_LETTER + N_LETTERS)
_TRAINING_MASK_SHARE = 0.15 * 0.8  # share of tokens that ESM-2's training replaced by <mask>


def positions(cu_seqlens: Tensor, n_tokens: int) -> Tensor:
    """Place of each token in its own sequence, int64 [T]."""
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).to(torch.int64)
    starts_T = torch.repeat_interleave(cu_seqlens[:-1].to(torch.int64), lengths, output_size=n_tokens)
    return torch.arange(n_tokens, device=cu_seqlens.device) - starts_T


def rotary_tables(positions_T: Tensor, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of one half of a head, each [T, 1, d/2] (Su et al. 2021, arXiv 2104.09864); the angles are
    computed in float32, the two halves of a head share them."""
    powers = torch.arange(0, head_dim, 2, dtype=torch.int64, device=positions_T.device).float() / head_dim
    angles_T1h = torch.outer(positions_T.float(), 1.0 / 10000.0**powers)[:, None, :]
    return angles_T1h.cos().to(dtype), angles_T1h.sin().to(dtype)


def pairs_apart(x_THd: Tensor) -> Tensor:
    """Numbers that are turned together from neighbouring places to half a head apart. The same order for queries and
    keys, so their products stay as they are."""
    return x_THd.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


def _norm(config: ModelConfig, *, bias: bool = True) -> nn.LayerNorm | nn.RMSNorm:
    if config.norm == "rms":
        return nn.RMSNorm(config.d_model, eps=config.layer_norm_eps)
    return nn.LayerNorm(config.d_model, eps=config.layer_norm_eps, bias=bias)


def rotate(x_THd: Tensor, cos_T1h: Tensor, sin_T1h: Tensor) -> Tensor:
    """Turn the halves (a, b) of every head to (a cos - b sin, b cos + a sin)."""
    a, b = x_THd.chunk(2, dim=-1)
    return torch.cat(
        (torch.addcmul(a * cos_T1h, b, sin_T1h, value=-1), torch.addcmul(b * cos_T1h, a, sin_T1h)), dim=-1
    )


def spread(cu_seqlens: Tensor, n_tokens: int, gap: int) -> Tensor:
    """Place of each token, int64 [T], in the row of S tokens that has `gap` empty places after every sequence."""
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).to(torch.int64)
    number_T = torch.repeat_interleave(
        torch.arange(len(lengths), device=cu_seqlens.device), lengths, output_size=n_tokens
    )
    return torch.arange(n_tokens, device=cu_seqlens.device) + gap * number_T


class Neighbours(nn.Module):
    """A depthwise convolution over each sequence, zero beyond its ends."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.width = config.convolution
        self.norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps)
        self.weight = nn.Parameter(torch.zeros(config.d_model, self.width))
        self.bias = nn.Parameter(torch.zeros(config.d_model))

    def forward(self, x_TD: Tensor, place_T: Tensor) -> Tensor:
        normed_TD = self.norm(x_TD)
        row_SD = normed_TD.new_zeros(int(place_T[-1]) + 1, normed_TD.shape[1])
        row_SD = row_SD.index_copy(0, place_T, normed_TD)
        mixed_SD = F.conv1d(
            row_SD.t()[None],
            self.weight.to(row_SD.dtype)[:, None],
            self.bias.to(row_SD.dtype),
            padding=self.width // 2,
            groups=len(self.weight),
        )[0].t()
        return mixed_SD[place_T]


class EncoderLayer(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        d = config.d_model
        self.n_heads, self.head_dim = config.n_heads, config.head_dim
        self.gated, self.pairs = config.activation == "swiglu", config.rotary_pairs
        self.share = 1.0 / config.branch_divisor
        self.neighbours = Neighbours(config) if config.convolution else None
        self.attn_norm = _norm(config)
        self.qkv = nn.Linear(d, 3 * d, bias=config.bias)
        self.q_norm = _norm(config, bias=False) if config.qk_norm else None
        self.k_norm = _norm(config, bias=False) if config.qk_norm else None
        self.out = nn.Linear(d, d, bias=config.bias)
        self.ffn_norm = _norm(config)
        self.up = nn.Linear(d, config.up_width, bias=config.bias)
        self.down = nn.Linear(config.d_ff, d, bias=config.bias)

    def attention_inputs(
        self, x_TD: Tensor, cos_T1h: Tensor | None, sin_T1h: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each [T, H, d], positions included."""
        q_TD, k_TD, v_TD = self.qkv(self.attn_norm(x_TD)).view(-1, 3, x_TD.shape[1]).unbind(1)
        if self.q_norm is not None and self.k_norm is not None:
            q_TD, k_TD = self.q_norm(q_TD), self.k_norm(k_TD)
        q_THd, k_THd, v_THd = (x.unflatten(-1, (self.n_heads, self.head_dim)) for x in (q_TD, k_TD, v_TD))
        if self.pairs:
            q_THd, k_THd = pairs_apart(q_THd), pairs_apart(k_THd)
        if cos_T1h is not None and sin_T1h is not None:
            # Back to the projection's type: under autocast the float32 tables would lift q and k to float32.
            q_THd = rotate(q_THd, cos_T1h, sin_T1h).to(v_THd.dtype)
            k_THd = rotate(k_THd, cos_T1h, sin_T1h).to(v_THd.dtype)
        return q_THd.to(v_THd.dtype), k_THd.to(v_THd.dtype), v_THd

    def forward(
        self,
        x_TD: Tensor,
        cos_T1h: Tensor | None,
        sin_T1h: Tensor | None,
        cu_seqlens: Tensor,
        max_seqlen: int,
        place_T: Tensor | None = None,
        rows_K: Tensor | None = None,
    ) -> Tensor:
        """The next hidden states [T, D], or those of the tokens `rows_K` alone, [K, D]."""
        if self.neighbours is not None:
            assert place_T is not None
            x_TD = x_TD + self.neighbours(x_TD, place_T)
        q_THd, k_THd, v_THd = self.attention_inputs(x_TD, cos_T1h, sin_T1h)
        mixed_TD = attend(q_THd, k_THd, v_THd, cu_seqlens, max_seqlen).reshape(x_TD.shape)
        if rows_K is not None:
            x_TD, mixed_TD = x_TD[rows_K], mixed_TD[rows_K]
        x_TD = torch.add(x_TD, self.out(mixed_TD), alpha=self.share)
        inner_TF = self.up(self.ffn_norm(x_TD))
        if self.gated:
            gate_TF, value_TF = inner_TF.chunk(2, dim=-1)
            inner_TF = F.silu(gate_TF) * value_TF
        else:
            inner_TF = F.gelu(inner_TF)
        return torch.add(x_TD, self.down(inner_TF), alpha=self.share)


class LMHead(nn.Module):
    """dense, GELU and norm where there are such, then a matrix (the token embedding transposed where tied), plus a
    bias."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.dense = nn.Linear(config.d_model, config.d_model) if config.dense_head else None
        self.norm = _norm(config) if config.dense_head else None
        self.decoder = None if config.tied else nn.Parameter(torch.zeros(config.vocab_size, config.d_model))
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden_TD: Tensor, embedding_VD: Tensor) -> Tensor:
        if self.dense is not None and self.norm is not None:
            hidden_TD = self.norm(F.gelu(self.dense(hidden_TD)))
        return F.linear(hidden_TD, embedding_VD if self.decoder is None else self.decoder, self.bias)


class PackedEncoder(Backbone):
    """tokens of several sequences in one row -> hidden states [T, D].

    `checkpointing` recomputes each layer in the backward pass (training only).
    """

    config: ModelConfig
    lm_head: LMHead | None

    def __init__(self, config: ModelConfig, *, lm_head: bool = True):
        super().__init__()
        self.config = config
        self.checkpointing = False
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model)
        learned = config.positions == "learned"
        self.embed_positions = nn.Embedding(config.max_residues + 4, config.d_model) if learned else None
        self.embed_norm = _norm(config) if config.embed_norm else None
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.n_layers))
        self.final_norm = _norm(config, bias=config.final_norm_bias)
        self.lm_head = LMHead(config) if lm_head else None
        reads = config.reads_homologs
        self.evidence = nn.Linear(EVIDENCE_WIDTH, config.d_model, bias=False) if reads else None
        self.gate = nn.Linear(config.d_model, 1) if reads and lm_head and config.residual else None

    def init_weights(self, generator: torch.Generator | None = None, *, std: float = 0.02) -> None:
        """Normal weights (ESM-2's standard deviation of 0.02), zero biases, unit layer norms."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=std, generator=generator)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, Neighbours):
                nn.init.normal_(module.weight, std=std, generator=generator)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
                nn.init.ones_(module.weight)
                if isinstance(module, nn.LayerNorm) and module.bias is not None:
                    nn.init.zeros_(module.bias)
        if self.lm_head is not None:
            nn.init.zeros_(self.lm_head.bias)
            if self.lm_head.decoder is not None:
                nn.init.normal_(self.lm_head.decoder, std=std, generator=generator)
        if self.gate is not None:  # the gate begins at 1 everywhere
            nn.init.zeros_(self.gate.weight)
            nn.init.constant_(self.gate.bias, math.log(math.e - 1.0))

    def embed(self, tokens_T: Tensor, cu_seqlens: Tensor, evidence_TE: Tensor | None = None) -> Tensor:
        """Embeddings [T, D] of tokens and evidence."""
        x_TD = self._embed_tokens(tokens_T, cu_seqlens)
        if self.embed_positions is not None:
            # The table's first rows are the padding's and those before it, as in RoBERTa.
            x_TD = x_TD + self.embed_positions(positions(cu_seqlens, len(tokens_T)) + self.config.pad_id + 1)
        if self.embed_norm is not None:
            x_TD = self.embed_norm(x_TD)
        if evidence_TE is None:
            return x_TD
        if self.evidence is None:
            raise RuntimeError("this backbone does not read homologs")
        return x_TD + self.evidence(evidence_TE.to(self.evidence.weight.dtype)).to(x_TD.dtype)

    def _embed_tokens(self, tokens_T: Tensor, cu_seqlens: Tensor) -> Tensor:
        """With token dropout, masked tokens embed to zero and each sequence is scaled
        by 0.88 / (1 - its own share of masked tokens), as ESM-2 does."""
        x_TD = self.embed_tokens(tokens_T)
        if not self.config.reads_letters:
            return x_TD * (tokens_T < FIRST_LETTER).to(x_TD.dtype)[:, None]
        if not self.config.token_dropout:
            return x_TD
        masked_T = tokens_T == self.config.mask_id
        lengths_N = (cu_seqlens[1:] - cu_seqlens[:-1]).to(torch.int64)
        before = F.pad(masked_T.cumsum(0), (1, 0))[cu_seqlens.to(torch.int64)]
        share_N = (before[1:] - before[:-1]).float() / lengths_N.float()
        scale_N = (1.0 - _TRAINING_MASK_SHARE) / (1.0 - share_N)
        scale_T = torch.repeat_interleave(scale_N, lengths_N, output_size=len(tokens_T))
        return x_TD * (scale_T * ~masked_T).to(x_TD.dtype)[:, None]

    def rotation(
        self, cu_seqlens: Tensor, n_tokens: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Tables of the rotary positions; none where positions are learned."""
        if self.embed_positions is not None:
            return None, None
        return rotary_tables(positions(cu_seqlens, n_tokens), self.config.head_dim, dtype)

    def forward(
        self,
        tokens_T: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        *,
        layers: tuple[int, ...] = (-1,),
        evidence_TE: Tensor | None = None,
        rows_K: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, ...]:
        """Hidden states [T, D] of one layer, or a tuple of them in the order of `layers`.

        `tokens_T` int64 [T]; `cu_seqlens` int32 [N+1]; `evidence_TE` float [T, E], None where no token has
        homologs; layer 0 is the embedding, -1 (or n_layers) the last layer after the final layer norm. Raises
        IndexError for a layer that is not there. `rows_K` int64 [K]: the last layer's states of these tokens
        alone, [K, D], which spares that layer most of its work.
        """
        depth = len(self.layers)
        wanted = places(layers, depth)
        x_TD = self.embed(tokens_T, cu_seqlens, evidence_TE)
        cos_T1h, sin_T1h = self.rotation(cu_seqlens, len(tokens_T), x_TD.dtype)
        gap = self.config.convolution // 2
        place_T = spread(cu_seqlens, len(tokens_T), gap) if gap else None
        kept = {0: x_TD} if 0 in wanted else {}
        for i, layer_module in enumerate(self.layers, start=1):
            if i > max(wanted):
                break
            given = (x_TD, cos_T1h, sin_T1h, cu_seqlens, max_seqlen, place_T, rows_K if i == depth else None)
            if self.checkpointing and self.training:
                x_TD = checkpoint(layer_module, *given, use_reentrant=False)
            else:
                x_TD = layer_module(*given)
            if i in wanted:
                kept[i] = x_TD
        if depth in wanted:
            kept[depth] = self.final_norm(kept[depth])
        return kept[wanted[0]] if len(wanted) == 1 else tuple(kept[w] for w in wanted)

    def logits(self, hidden_TD: Tensor, evidence_TE: Tensor | None = None) -> Tensor:
        """LM logits [T, V] of last-layer hidden states, and of the same rows of evidence. Raises RuntimeError for
        a model without LM head."""
        if self.lm_head is None:
            raise RuntimeError("this backbone has no language-model head: it can embed only")
        logits_TV = self.lm_head(hidden_TD, self.embed_tokens.weight)
        if evidence_TE is None:
            return logits_TV
        if self.evidence is None:
            raise RuntimeError("this backbone does not read homologs")
        if self.gate is None:
            return logits_TV
        gate_T1 = F.softplus(self.gate(hidden_TD).float())
        added_TV = F.pad(
            gate_T1 * evidence_TE[:, :N_LETTERS].float(),
            (_LETTERS.start, logits_TV.shape[1] - _LETTERS.stop),
        )
        return logits_TV + added_TV.to(logits_TV.dtype)
