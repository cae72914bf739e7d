"""What a backbone that reads homologs is given: one recipe, for training and for use.

A hit of more than 95 % identity is left out of the search's every round: it would be the query itself or nearly,
and hand over the residues that the model is asked for.
"""

from __future__ import annotations

import numpy as np

from bioseq.backbones.packed.config import N_LETTERS
from bioseq.homologs.profile import Profile
from bioseq.homologs.settings import SearchSettings
from bioseq.sequences.alphabet import protein

READING = SearchSettings(exclude_above_identity=0.95)
# columns of a profile in the order of the letters' token ids, the depth last
_BY_TOKEN = np.append(np.argsort(protein().standard_ids), N_LETTERS)


def evidence(profile: Profile) -> np.ndarray:
    """The second input of `PackedEncoder`, float32 [L, E]: `Profile.columns` by token id."""
    return np.take(profile.columns(), _BY_TOKEN, axis=1)
