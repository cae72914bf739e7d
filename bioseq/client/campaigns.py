"""Campaigns of a service.

campaign = remote.create_campaign("MKT...", ["fitness"], sites=[39, 40, 41, 54])
job = remote.wait(remote.submit("propose", {"campaign": campaign["id"]})["id"])
remote.plate(campaign["id"], 1)                     # the plate of round 1, CSV
remote.ingest(campaign["id"], "results.csv")
remote.campaign_report(campaign["id"], "report.html")
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from bioseq.client.exchange import Call, Connection, ask
from bioseq.client.jobs import upload
from bioseq.errors import InputError
from bioseq.output import atomic_file


def _at(campaign_id: str, more: str = "") -> str:
    return f"/v1/campaigns/{quote(campaign_id, safe='')}{more}"


async def create_campaign(
    at: Connection,
    wild_type: str,
    objectives: Sequence[str],
    *,
    candidates: str | Path | None = None,
    **fields: Any,
) -> dict[str, Any]:
    """Start a campaign; its `id` goes into a job of the kind propose. `candidates` is a CSV file of this machine, or
    `file:ID`. The other fields are those of `bioseq campaign create`: sites, mutations, allowed (residues by position),
    forbidden, batch, plate, controls, budget, seed, model, homologs, and a `name` for lists."""
    body = {"model": at.model, "wild_type": wild_type, "objectives": list(objectives), **fields}
    if "allowed" in body:
        body["allowed"] = {str(k): v for k, v in body["allowed"].items()}
    if candidates is not None:
        known = str(candidates).startswith("file:")
        body["candidates"] = candidates if known else f"file:{(await upload(at, candidates))['id']}"
    return await ask(at, Call("POST", "/v1/campaigns", body))


async def campaigns(at: Connection) -> list[dict[str, Any]]:
    """This key's campaigns, newest first."""
    return (await ask(at, Call("GET", "/v1/campaigns")))["data"]


async def campaign(at: Connection, campaign_id: str) -> dict[str, Any]:
    """Settings, rounds, wells and the best so far."""
    return await ask(at, Call("GET", _at(campaign_id)))


async def delete_campaign(at: Connection, campaign_id: str) -> None:
    await ask(at, Call("DELETE", _at(campaign_id)))


async def ingest(
    at: Connection,
    campaign_id: str,
    results: str | Path,
    *,
    round_: int | None = None,
    correct: bool = False,
) -> dict[str, int]:
    """Take in a CSV file of results, all rows or none: counts of measured, failed and unproposed wells. Raises
    `InputError` with line and column."""
    path = Path(results)
    if not path.is_file():
        raise InputError(f"cannot read {path}: there is no such file.")
    query = {"correct": "true"} if correct else {}
    query |= {} if round_ is None else {"round": str(round_)}
    headers = {"Content-Type": "text/csv"}
    return await ask(at, Call("POST", _at(campaign_id, "/ingest"), query=query, headers=headers, file=path))


async def mark(at: Connection, campaign_id: str, event: str, which: Sequence[str] = ()) -> int:
    """Mark wells (2/B7: round 2, well B7) or variants as ordered, abandoned or excluded; how many wells that were."""
    body = {"event": event, "which": list(which)}
    return (await ask(at, Call("POST", _at(campaign_id, "/mark"), body)))["wells"]


async def plate(at: Connection, campaign_id: str, number: int) -> str:
    """plate.csv of a round."""
    return await ask(at, Call("GET", _at(campaign_id, f"/plates/{number}")), bytes.decode)


async def campaign_ledger(at: Connection, campaign_id: str) -> str:
    """ledger.csv: every event of every well; of a well the last row counts."""
    return await ask(at, Call("GET", _at(campaign_id, "/ledger")), bytes.decode)


async def campaign_report(at: Connection, campaign_id: str, output: str | Path) -> Path:
    """The campaign as one HTML file, which must not be there yet."""
    page = await ask(at, Call("GET", _at(campaign_id, "/report")), bytes)
    with atomic_file(output) as path:
        path.write_bytes(page)
    return Path(output)
