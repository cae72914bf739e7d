"""The searches of one head, apart from its network: a service makes them in another process than the one that holds
the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bioseq.heads.homology import TrainingRows
from bioseq.heads.profiles import check_reference, find_profiles, pooled_profile
from bioseq.heads.relatives import FOLDER, Relatives
from bioseq.homologs.profile import Profile

if TYPE_CHECKING:
    from bioseq.bundles.bundle import Bundle


@dataclass(frozen=True)
class HeadSearch:
    """What a head searches: its training `rows`, unless they were kept out of the bundle, and, where it reads
    profiles, the shipped reference set, which must have the hash `reference`."""

    name: str
    per_residue: bool
    profile: bool
    reference: str
    rows: TrainingRows | None

    @classmethod
    def read(cls, bundle: Bundle) -> HeadSearch:
        """That of a head's bundle; none of its weights are read."""
        manifest, settings = bundle.manifest, bundle.manifest.extra["head"]
        return cls(
            manifest.name,
            manifest.task == "per_residue",
            "profile" in settings["blocks"],
            settings.get("reference") or "",
            TrainingRows.read(bundle, bundle.read_tensors(f"{FOLDER}.")),
        )

    def find(
        self,
        texts: Sequence[str],
        profiles: Sequence[Profile] | None = None,
        *,
        threads: int | None = None,
    ) -> Relatives:
        """What homologs say of cleaned sequences, searched now unless the `profiles` are given."""
        out = Relatives()
        if self.rows is not None and self.per_residue:
            out.links, out.labels = self.rows.residue_links(texts, threads=threads)
        elif self.rows is not None:
            out.links = self.rows.links(texts, threads=threads)
        if self.profile:
            check_reference(self.name, self.reference)
            found = find_profiles(texts, threads=threads) if profiles is None else profiles
            out.profiles = [p.columns() if self.per_residue else pooled_profile(p) for p in found]
        return out
