"""The spec of a campaign's next round (`bioseq campaign propose --spec FILE`, and the job kind `propose`)."""

from __future__ import annotations

import dataclasses

from bioseq.errors import SpecError
from bioseq.specs.base import Spec


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProposeSpec(Spec):
    """campaign: its folder. output: a folder for copies of the round's plate.csv and proposal.json.
    more: another round although the last has no results yet. after: the number of rounds that there were when it was
    first tried; if there are more by now, that round was made and is returned, so that trying again makes no second one.
    """

    campaign: str
    output: str | None = None
    more: bool = False
    after: int | None = None

    def validate(self) -> None:
        if not self.campaign:
            raise SpecError("a campaign is needed.", field="campaign")
        if self.after is not None and self.after < 0:
            raise SpecError(f"{self.after} is below 0.", field="after")
