"""What a backbone that reads homologs is given: one recipe, for training and for use.

A hit of more than 95 % identity is left out of the search's every round: it would be the query itself or nearly,
and hand over the residues that the model is asked for.
"""

from __future__ import annotations

import numpy as np

from bioseq.backbones.packed.config import EVIDENCE_WIDTH, N_LETTERS
from bioseq.homologs.matrix import BACKGROUND
from bioseq.homologs.profile import Profile
from bioseq.homologs.settings import SearchSettings
from bioseq.sequences.alphabet import protein

READING = SearchSettings(exclude_above_identity=0.95)
_BY_TOKEN = np.argsort(protein().standard_ids)  # columns of a profile in the order of the letters' token ids


def evidence(profile: Profile) -> np.ndarray:
    """The second input of `PackedEncoder`, float32 [L, E]: log-odds of the letters against the background, and
    log(1 + weighted number of homologs on the column). Zero where no homolog has a residue."""
    out = np.zeros((len(profile), EVIDENCE_WIDTH), dtype=np.float32)
    out[:, :N_LETTERS] = (profile.log_probs - np.log(BACKGROUND))[:, _BY_TOKEN]
    out[:, N_LETTERS] = np.log1p(profile.depth)
    out[profile.depth <= 0] = 0.0
    return out
