"""A model of `transformers` behind the contract of a backbone.

Sequences of a row are sorted by length and run in padded batches of like length, so that little of a batch is padding;
an attention mask hides it. States are scattered back to the row.

Legend: T tokens of the row, B sequences of a batch, P tokens of the longest of them, n tokens of one, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bioseq.backbones.padded.config import PaddedConfig
from bioseq.backbones.padded.tokens import check, to_residues, tokenise
from bioseq.backbones.protocol import Backbone, places

ABSENT = -1e4  # the logit of a letter that the family does not have: no softmax sees it, every dtype holds it
_FULL = 0.8  # the shortest sequence of a batch, over the longest


class PaddedEncoder(Backbone):
    """`model` gives hidden states, `head` (if any) logits of them over the family's own vocabulary."""

    config: PaddedConfig

    def __init__(self, config: PaddedConfig, model: nn.Module, head: nn.Module | None):
        super().__init__()
        self.config, self.model, self.lm_head = config, model, head
        self.ends = (int(config.prefix >= 0), int(config.suffix >= 0))

    def check(self, ids: np.ndarray) -> None:
        check(self.config, ids)

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
        if evidence_TE is not None:
            raise RuntimeError("this backbone does not read homologs")
        wanted = places(layers, self.config.n_layers)
        bounds, row = cu_seqlens.tolist(), tokens_T.cpu().numpy()
        spans = list(zip(bounds, bounds[1:]))
        texts = [tokenise(self.config, row[a + 1 : b - 1]) for a, b in spans]
        dtype = next(self.model.parameters()).dtype
        out = {
            w: torch.zeros(len(row), self.config.d_model, dtype=dtype, device=tokens_T.device) for w in wanted
        }
        before, after = self.ends
        for group in _alike([len(tokens) for tokens, _ in texts]):
            states = self._states([texts[i][0] for i in group], wanted, tokens_T.device)
            for place, i in enumerate(group):
                (a, b), (tokens, sizes) = spans[i], texts[i]
                for w, kept in out.items():
                    own = states[w][place]
                    kept[a + 1 : b - 1] = to_residues(
                        self.config, own[before : before + len(tokens)], sizes, b - a - 2
                    )
                    if before:
                        kept[a] = own[0]
                    if after:
                        kept[b - 1] = own[before + len(tokens)]
        found = [out[w] if rows_K is None else out[w][rows_K] for w in wanted]
        return found[0] if len(found) == 1 else tuple(found)

    def _states(self, texts: list[np.ndarray], wanted: list[int], device: torch.device) -> dict[int, Tensor]:
        """States [B, P, D] of the layers."""
        c = self.config
        around = [np.asarray([i] if i >= 0 else [], dtype=np.int64) for i in (c.prefix, c.suffix)]
        whole = [np.concatenate((around[0], tokens, around[1])) for tokens in texts]
        ids_BP = np.full((len(whole), max(map(len, whole))), c.pad, dtype=np.int64)
        mask_BP = np.zeros_like(ids_BP)
        for at, tokens in enumerate(whole):
            ids_BP[at, : len(tokens)], mask_BP[at, : len(tokens)] = tokens, 1
        more = any(w != c.n_layers for w in wanted)
        found: Any = self.model(
            torch.from_numpy(ids_BP).to(device),
            attention_mask=torch.from_numpy(mask_BP).to(device),
            output_hidden_states=more,
        )
        states = {w: found.hidden_states[w] for w in wanted if w != c.n_layers} if more else {}
        return states | {c.n_layers: found.last_hidden_state}

    def logits(self, hidden_TD: Tensor, evidence_TE: Tensor | None = None) -> Tensor:
        if self.lm_head is None:
            raise RuntimeError("this backbone has no language-model head: it can embed only")
        said = self.lm_head(hidden_TD)
        ids = torch.as_tensor(self.config.ids, device=said.device)
        return torch.where(ids >= 0, said[:, ids.clamp_min(0)], said.new_tensor(ABSENT))


def _alike(lengths: list[int]) -> Iterator[list[int]]:
    """Places of sequences of like length, longest first."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    group: list[int] = []
    for i in order:
        if group and lengths[i] < _FULL * lengths[group[0]]:
            yield group
            group = []
        group.append(i)
    if group:
        yield group
