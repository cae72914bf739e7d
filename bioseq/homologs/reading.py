"""What a backbone that reads homologs is given: one recipe, for training and for use.

A hit of more than 95 % identity is left out of the search's every round: it would be the query itself or nearly,
and hand over the residues that the model is asked for.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from bioseq.backbones.packed.config import N_LETTERS
from bioseq.bundles.manifest import Extra
from bioseq.errors import ReferenceSetError
from bioseq.homologs.profile import Profile
from bioseq.homologs.reference import ReferenceSet, open_reference
from bioseq.homologs.settings import SearchSettings
from bioseq.sequences.alphabet import protein


def own_set(extra: Extra, homologs: str | Path | ReferenceSet = "auto") -> ReferenceSet:
    """The set that the backbone was trained with whose manifest has this `extra`: the shipped one, or that of the folder
    given. Raises `ReferenceSetError` for another set, and what `open_reference` raises."""
    wanted = extra["homologs"]
    reference = open_reference("default" if homologs == "auto" else homologs)
    if reference.hash != wanted["reference"]:
        raise ReferenceSetError(
            f"the backbone reads homologs from {wanted.get('name', '')!r} ({wanted['reference'][:19]}...); "
            f"{reference.name!r} is another set ({reference.hash[:19]}...).",
            code="homologs.wrong_hash",
            hint="Name the folder of that set as homologs, or 'none' to use the backbone without homologs.",
        )
    return reference


READING = SearchSettings(exclude_above_identity=0.95)
# columns of a profile in the order of the letters' token ids, the depth last
_BY_TOKEN = np.append(np.argsort(protein().standard_ids), N_LETTERS)


def evidence(profile: Profile) -> np.ndarray:
    """The second input of `PackedEncoder`, float32 [L, E]: `Profile.columns` by token id."""
    return np.take(profile.columns(), _BY_TOKEN, axis=1)
