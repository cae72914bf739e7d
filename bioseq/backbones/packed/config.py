"""What an encoder looks like, and the published sizes of ESM-2 (Lin et al. 2023, doi 10.1126/science.ade2574)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from bioseq.errors import CheckpointError
from bioseq.specs.reading import build

N_LETTERS = 20  # standard amino acids, whose token ids follow each other from FIRST_LETTER on
FIRST_LETTER = 4
EVIDENCE_WIDTH = N_LETTERS + 1  # columns of the second input: see `PackedEncoder`


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a packed encoder. `max_residues` is the longest sequence the model was made for.

    `reads_homologs`: there is a second input, what the homologs say of each residue; `convolution`: width of a
    depthwise convolution before each attention (0: none, else odd). ESM-2 has neither. `residual` false leaves out
    the log-odds added to the logits, `reads_letters` false hides all residues: for ablations.

    The rest is what ESM-2's cousins do otherwise; the defaults are ESM-2's. `d_ff` is the width between the two
    matrices of a feed-forward block, of each of the gate and the value with `swiglu` (Shazeer 2020, arXiv
    2002.05202). `branch_divisor`: what an attention's or feed-forward block's output is divided by before it is
    added. `rotary_pairs`: neighbouring numbers of a head are turned together, not those half a head apart.
    `learned` positions are a table of `max_residues` + 4 rows, of which the first two are never used.
    `tied`: the logits' matrix is the embedding; `dense_head`: there is a layer and a norm before it.
    """

    name: str
    n_layers: int
    d_model: int
    n_heads: int
    d_ff: int
    vocab_size: int = 33
    cls_id: int = 0
    pad_id: int = 1
    eos_id: int = 2
    mask_id: int = 32
    token_dropout: bool = True
    layer_norm_eps: float = 1e-5
    max_residues: int = 1022
    reads_homologs: bool = False
    convolution: int = 0
    residual: bool = True
    reads_letters: bool = True
    norm: Literal["layer", "rms"] = "layer"
    final_norm_bias: bool = True
    qk_norm: bool = False
    bias: bool = True
    activation: Literal["gelu", "swiglu"] = "gelu"
    branch_divisor: float = 1.0
    positions: Literal["rotary", "learned"] = "rotary"
    rotary_pairs: bool = False
    embed_norm: bool = False
    tied: bool = True
    dense_head: bool = True

    def __post_init__(self) -> None:
        if self.d_model % self.n_heads or self.head_dim % 2:
            raise CheckpointError(
                f"d_model {self.d_model} must be a multiple of n_heads {self.n_heads} with an even head size."
            )
        if (self.convolution and self.convolution % 2 == 0) or self.convolution < 0:
            raise CheckpointError(f"convolution is {self.convolution}; 0 or an odd width is needed.")

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_heads

    @property
    def family(self) -> str:
        """Whose layout of a checkpoint and whose names of modules it has: esm (1b and 2), esmc or amplify."""
        return "amplify" if self.norm == "rms" else "esmc" if self.qk_norm else "esm"

    @property
    def has_cls(self) -> bool:
        """Whether <cls> has a state of its own."""
        return True

    @property
    def read_as_x(self) -> str:
        """Letters that are given to the model as X."""
        return ""

    @property
    def up_width(self) -> int:
        """Outputs of a feed-forward block's first matrix."""
        return self.d_ff * (2 if self.activation == "swiglu" else 1)

    @property
    def n_parameters(self) -> int:
        """Parameters of encoder and LM head."""
        d, f, u, v = self.d_model, self.d_ff, self.up_width, self.vocab_size
        norm = d if self.norm == "rms" else 2 * d
        layer = 4 * d * d + d * u + f * d + (5 * d + u if self.bias else 0) + 2 * norm
        layer += 2 * d if self.qk_norm else 0
        layer += (self.convolution + 3) * d if self.convolution else 0
        second = EVIDENCE_WIDTH * d + (d + 1 if self.residual else 0) if self.reads_homologs else 0
        embed = v * d + (norm if self.embed_norm else 0)
        embed += (self.max_residues + 4) * d if self.positions == "learned" else 0
        head = v + (d * d + d + norm if self.dense_head else 0) + (0 if self.tied else v * d)
        last = norm if self.final_norm_bias else d
        return embed + self.n_layers * layer + last + head + second

    def flops_per_token(self, length: float, *, lm_head: bool = False) -> float:
        """Forward multiply-adds, counted as two operations, of one token in a sequence of `length` tokens:
        2 per weight of every matrix, and 4 * length * d_model a layer for the two attention products
        (Kaplan et al. 2020, arXiv 2001.08361, table 1)."""
        d, f = self.d_model, self.d_ff
        dense = self.n_layers * (4 * d * d + d * (f + self.up_width) + self.convolution * d)
        dense += EVIDENCE_WIDTH * d if self.reads_homologs else 0
        head = (d * d if self.dense_head else 0) + d * self.vocab_size if lm_head else 0
        return 2.0 * (dense + head) + 4.0 * self.n_layers * length * d

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ModelConfig:
        return build(cls, data, error=CheckpointError, where="architecture")


def _esm2(name: str, n_layers: int, d_model: int, n_heads: int) -> ModelConfig:
    return ModelConfig(name, n_layers, d_model, n_heads, d_ff=4 * d_model)


CONFIGS: dict[str, ModelConfig] = {
    c.name: c
    for c in (
        _esm2("tiny", 2, 64, 4),
        _esm2("8m", 6, 320, 20),
        _esm2("35m", 12, 480, 20),
        _esm2("150m", 30, 640, 20),
        _esm2("650m", 33, 1280, 20),
        _esm2("3b", 36, 2560, 40),
    )
}
