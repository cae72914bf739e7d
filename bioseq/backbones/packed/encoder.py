"""The packed encoder: ESM-2's architecture over rows of concatenated sequences, without padding.

Pre-layer-norm transformer with rotary positions that restart at every sequence, token dropout rescaled per
sequence, exact GELU, and an LM head tied to the token embedding (Lin et al. 2023, doi
10.1126/science.ade2574). Not covered: absolute positions, embedding layer norm, decoding.

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
        self.neighbours = Neighbours(config) if config.convolution else None
        self.attn_norm = nn.LayerNorm(d, eps=config.layer_norm_eps)
        self.qkv = nn.Linear(d, 3 * d)
        self.out = nn.Linear(d, d)
        self.ffn_norm = nn.LayerNorm(d, eps=config.layer_norm_eps)
        self.up = nn.Linear(d, config.d_ff)
        self.down = nn.Linear(config.d_ff, d)

    def forward(
        self,
        x_TD: Tensor,
        cos_T1h: Tensor,
        sin_T1h: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        place_T: Tensor | None = None,
        rows_K: Tensor | None = None,
    ) -> Tensor:
        """The next hidden states [T, D], or those of the tokens `rows_K` alone, [K, D]."""
        if self.neighbours is not None:
            assert place_T is not None
            x_TD = x_TD + self.neighbours(x_TD, place_T)
        qkv = self.qkv(self.attn_norm(x_TD)).view(-1, 3, self.n_heads, self.head_dim)
        # Back to the projection's type: under autocast the float32 tables would lift q and k to float32.
        q_THd = rotate(qkv[:, 0], cos_T1h, sin_T1h).to(qkv.dtype)
        k_THd = rotate(qkv[:, 1], cos_T1h, sin_T1h).to(qkv.dtype)
        mixed_TD = attend(q_THd, k_THd, qkv[:, 2], cu_seqlens, max_seqlen).reshape(x_TD.shape)
        if rows_K is not None:
            x_TD, mixed_TD = x_TD[rows_K], mixed_TD[rows_K]
        x_TD = x_TD + self.out(mixed_TD)
        return x_TD + self.down(F.gelu(self.up(self.ffn_norm(x_TD))))


class LMHead(nn.Module):
    """dense, GELU, layer norm, then the token embedding transposed plus a bias."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.dense = nn.Linear(config.d_model, config.d_model)
        self.norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden_TD: Tensor, embedding_VD: Tensor) -> Tensor:
        return F.linear(self.norm(F.gelu(self.dense(hidden_TD))), embedding_VD, self.bias)


class PackedEncoder(nn.Module):
    """tokens of several sequences in one row -> hidden states [T, D].

    `checkpointing` recomputes each layer in the backward pass (training only).
    """

    def __init__(self, config: ModelConfig, *, lm_head: bool = True):
        super().__init__()
        self.config = config
        self.checkpointing = False
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.n_layers))
        self.final_norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps)
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
            elif isinstance(module, nn.LayerNorm):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
        if self.lm_head is not None:
            nn.init.zeros_(self.lm_head.bias)
        if self.gate is not None:  # the gate begins at 1 everywhere
            nn.init.zeros_(self.gate.weight)
            nn.init.constant_(self.gate.bias, math.log(math.e - 1.0))

    def embed(self, tokens_T: Tensor, cu_seqlens: Tensor, evidence_TE: Tensor | None = None) -> Tensor:
        """Embeddings [T, D] of tokens and evidence."""
        x_TD = self._embed_tokens(tokens_T, cu_seqlens)
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
        wanted = []
        for layer in layers:
            place = layer + depth + 1 if layer < 0 else layer
            if not 0 <= place <= depth:
                raise IndexError(f"layer {layer} is not there; this model has 0 to {depth}")
            wanted.append(place)
        x_TD = self.embed(tokens_T, cu_seqlens, evidence_TE)
        cos_T1h, sin_T1h = rotary_tables(
            positions(cu_seqlens, len(tokens_T)), self.config.head_dim, x_TD.dtype
        )
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
