"""The page in a real browser, on the real service."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

import httpx
import pytest

ASSETS = Path(__file__).parent.parent.parent / "serving/page/assets"
TWO = ">first\nMKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQ\n>second one\nMVLSPADKTNVKAAWGKVGAHAGEYGAEALERMF\n"


def test_the_files_are_those_that_were_built() -> None:
    for name, told in json.loads((ASSETS / "assets.json").read_text()).items():
        digest = hashlib.sha256((ASSETS / name).read_bytes()).digest()
        assert told == "sha256-" + base64.b64encode(digest).decode(), f"{name}: build it again (make page)"


def test_headers_let_nothing_inline_or_foreign_run(site: Any) -> None:
    for path in ("/", "/page/app.js", "/page/style.css"):
        got = httpx.get(site.url + path)
        policy = got.headers["content-security-policy"]
        assert got.status_code == 200 and "default-src 'none'" in policy and "unsafe" not in policy
        assert httpx.get(site.url + path, headers={"If-None-Match": got.headers["etag"]}).status_code == 304
    assert httpx.get(site.url + "/page/../app.py").status_code == 404
    assert httpx.get(site.url + "/page/assets.json").status_code in (404, 422)


def _predict(page: Any, text: str) -> None:
    page.fill("#sequences", text)
    page.get_by_role("button", name="Predict", exact=True).click()


def test_sequences_become_a_table_that_sorts_and_filters(tab: Any) -> None:
    page = tab.go()
    page.fill("#sequences", TWO)
    page.get_by_text("2 sequences, 67 residues.").wait_for()
    page.get_by_text("tokens").wait_for()  # the price
    page.get_by_role("button", name="Predict", exact=True).click()
    rows = page.locator("tbody tr")
    rows.nth(1).wait_for()
    assert rows.count() == 2
    assert page.locator("td strong").first.inner_text() in ("high", "some", "low")
    page.get_by_role("button", name="residues").click()
    assert rows.first.locator("th").inner_text() == "second"
    page.get_by_label("Find in the table").fill("first")
    assert rows.count() == 1
    with page.expect_download() as found:
        page.get_by_role("button", name="Download as CSV").click()
    text = Path(found.value.path()).read_text()
    assert text.splitlines()[0].startswith("id,residues,") and len(text.splitlines()) == 3


def test_what_the_server_refuses_is_told_in_its_words(tab: Any) -> None:
    page = tab.go()
    _predict(page, ">bad\nMKT1AYI")
    alert = page.get_by_role("alert").last
    alert.wait_for()
    assert "illegal residue" in alert.inner_text()
    tab.troubles = [t for t in tab.troubles if "422" not in t]  # the browser logs the status of the answer


def test_a_script_in_a_header_does_not_run(tab: Any) -> None:
    page = tab.go()
    evil = "<img/src=x/onerror=document.title='owned'>"
    _predict(page, f">{evil} <script>document.title='owned'</script>\nMKTAYIAKQRQISFVKSHFSRQ")
    page.locator("tbody th button").first.wait_for()
    assert page.locator("tbody th button").first.inner_text() == evil
    page.locator("tbody th button").first.click()
    page.get_by_role("heading", name="Every substitution").wait_for()
    assert "owned" not in page.title() and page.locator("main img").count() == 0


def test_one_protein_has_tracks_and_every_substitution(tab: Any) -> None:
    page = tab.go("protein")
    page.fill("#protein", TWO)
    page.get_by_role("button", name="Look at it").click()
    page.get_by_role("heading", name="Every substitution").wait_for()
    page.get_by_text("What the heads say").wait_for()
    page.locator("figure svg rect").first.wait_for()
    page.get_by_text("627 of 627 rows").wait_for()  # 33 residues x 19
    assert page.get_by_role("img").count() >= 1


def test_models_have_their_cards(tab: Any) -> None:
    page = tab.go("models")
    page.get_by_role("button", name="tiny@1").click()
    page.locator(".card h1, .card h2").first.wait_for()
    page.get_by_text("sha256:").first.wait_for()


def test_a_library_is_priced_uploaded_and_submitted(tab: Any, tmp_path: Path) -> None:
    (tmp_path / "library.fasta").write_text(TWO)
    page = tab.go("library")
    page.set_input_files("#library-file", str(tmp_path / "library.fasta"))
    page.get_by_text("about 2 proteins of 34 residues").wait_for()
    page.get_by_role("button", name="Screen", exact=True).click()
    page.get_by_role("heading", name="screen: library.fasta").wait_for()
    page.get_by_text("pending").first.wait_for()  # nothing schedules jobs in this process
    page.get_by_role("button", name="Cancel the job").click()
    page.get_by_text("cancelled").first.wait_for()
    page.goto(f"{tab.url}/#/jobs")
    page.get_by_role("button", name="screen library.fasta").first.wait_for()


def test_a_label_table_is_submitted_with_its_column(tab: Any, tmp_path: Path) -> None:
    (tmp_path / "Assay 1.csv").write_text("sequence,stability\nMKTAYI,1.5\nMKTAYV,2\n")
    page = tab.go("train")
    page.set_input_files("#label-file", str(tmp_path / "Assay 1.csv"))
    page.get_by_text("columns sequence, stability").wait_for()
    assert page.locator("#target").input_value() == "stability"
    assert page.locator("#head-name").input_value() == "assay_1"
    page.get_by_role("button", name="Train", exact=True).click()
    page.get_by_role("heading", name="finetune: assay_1").wait_for()
    jobs = httpx.get(f"{tab.url}/v1/jobs?kind=finetune").json()["data"]
    assert jobs[0]["spec"]["targets"] == ["stability"] and jobs[0]["register_as"] == "assay_1"
    httpx.delete(f"{tab.url}/v1/jobs/{jobs[0]['id']}")


def test_a_campaign_is_started_measured_and_seen(tab: Any, site: Any, tmp_path: Path) -> None:
    from bioseq.campaigns.campaign import Campaign
    from training.campaigns.propose import propose

    page = tab.go("campaigns")
    page.fill("#campaign-name", "<b>gb1</b>")
    page.fill("#campaign-wild", "MKTAYIAKQRQISFVKSHFSRQ")
    page.fill("#campaign-sites", "4, 7")
    page.fill("#campaign-batch", "24")
    page.get_by_role("button", name="Start the campaign").click()
    page.get_by_role("heading", name="Campaign: <b>gb1</b>").wait_for()
    page.get_by_text("399 variants in the space; 0 rounds so far.").wait_for()
    page.get_by_role("button", name="Propose the next plate").click()
    page.get_by_role("heading", name="propose:").wait_for()
    jobs = httpx.get(f"{tab.url}/v1/jobs?kind=propose").json()["data"]
    httpx.delete(f"{tab.url}/v1/jobs/{jobs[0]['id']}")  # nothing runs jobs here: the round is made below
    made = httpx.get(f"{tab.url}/v1/campaigns").json()["data"][0]
    propose(Campaign(Path(site.settings.data) / "campaigns" / made["id"]))
    page = tab.go(f"campaigns/{made['id']}")
    page.reload()
    page.get_by_text("1 round so far. Wells: 24 proposed.").wait_for()
    page.locator("figure svg rect").nth(23).wait_for()  # a well each
    with page.expect_download() as found:
        page.get_by_role("button", name="Download plate.csv").click()
    wells = [line.split(",")[1] for line in Path(found.value.path()).read_text().splitlines()[1:]]
    (tmp_path / "bad.csv").write_text(f"well,fitness\n{wells[0]},much\n")
    page.set_input_files("#results-file", str(tmp_path / "bad.csv"))
    page.get_by_text("line 2, column 'fitness': 'much' is not a number").wait_for()
    tab.troubles.clear()  # the browser notes the 422 itself
    (tmp_path / "good.csv").write_text(
        "well,fitness\n" + "".join(f"{w},{i}\n" for i, w in enumerate(wells[:-1]))
    )
    page.set_input_files("#results-file", str(tmp_path / "good.csv"))
    page.get_by_text("good.csv: 23 wells measured, 0 failed, 0 that were not proposed.").wait_for()
    page.get_by_text("Wells: 1 proposed, 23 measured.").wait_for()
    page.get_by_text("Best by round: fitness 22 after round 1").wait_for()
    page.get_by_text("24 wells, 23 with fitness").wait_for()
    ledger = httpx.get(f"{tab.url}/v1/campaigns/{made['id']}/ledger")
    assert ledger.headers["content-type"].startswith("text/csv") and ledger.text.count("measured,1,") == 23
    with page.expect_download() as report:
        page.get_by_role("button", name="Download the report").click()
    assert "<html" in Path(report.value.path()).read_text()


@pytest.mark.parametrize(
    "view", ["predict", "protein", "library", "train", "campaigns", "jobs", "models", "keys"]
)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_serious_finding_of_axe(chromium: Any, site: Any, view: str, scheme: str) -> None:
    from axe_playwright_python.sync_playwright import Axe
    from page_helpers import Tab

    # the script of axe is injected by the test, which the page's own policy rightly forbids
    tab = Tab(chromium, site.url, color_scheme=scheme, bypass_csp=True)
    try:
        page = tab.go(view)
        page.locator("h1").first.wait_for()
        if view == "predict":
            _predict(page, TWO)
            page.locator("tbody tr").nth(1).wait_for()
        found = Axe().run(page).response["violations"]
        bad = {
            v["id"]: [n["html"][:120] for n in v["nodes"]]
            for v in found
            if v["impact"] in ("serious", "critical")
        }
        assert bad == {}
    finally:
        tab.context.close()


def test_keys_are_asked_for_and_kept_in_memory_only(chromium: Any, site: Any, tmp_path: Path) -> None:
    from page_helpers import Site, Tab

    from serving.database.base import Database
    from serving.database.keys import Keys

    database = Database(f"sqlite:///{tmp_path / 'service.sqlite'}")
    database.upgrade()
    secret = Keys(database).create("page", scopes=("read", "predict"))[1]
    database.dispose()
    with Site(tmp_path, site.registry) as locked:
        tab = Tab(chromium, locked.url)
        page = tab.go()
        page.get_by_text("This service asks for a key").wait_for()
        page.get_by_label("API key").fill(secret)
        page.get_by_role("button", name="Use it").click()
        _predict(page, TWO)
        page.locator("tbody tr").nth(1).wait_for()
        assert (
            page.evaluate("JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie])")
            == '[{},{},""]'
        )
        page.reload()
        page.get_by_text("This service asks for a key").wait_for()
        assert [t for t in tab.troubles if "401" not in t] == []
        tab.context.close()


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_screen_is_followed_to_its_hits(chromium: Any, site: Any, tmp_path: Path, data: Path) -> None:
    from live_service import Live
    from page_helpers import Tab

    live = Live(site.registry.resolve("tiny").path)
    try:
        live.start()
        from bioseq.bundles.registry import Registry

        Registry(live.home).register(site.registry.resolve("stability").path)
        tab = Tab(chromium, live.url)
        page = tab.go("library")
        page.reload()
        page.set_input_files("#library-file", str(data / "valid_orphan_25.fasta"))
        page.get_by_role("button", name="Screen", exact=True).click()
        page.get_by_role("heading", name="Hits").wait_for(timeout=600_000)
        page.locator("tbody tr").nth(24).wait_for()
        page.get_by_text("stability").first.wait_for()
        page.locator("figure svg circle").first.wait_for()
        with page.expect_download() as found:
            page.get_by_role("button", name="hits.csv").click()
        assert len(Path(found.value.path()).read_text().splitlines()) == 26
        assert tab.troubles == []
    finally:
        live.close()
