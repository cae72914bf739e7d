"""Pictures of the page for the docs: `python docs/make_images.py` starts the service with the shipped model and heads in a home of its
own, drives a headless Chromium through the views, and writes docs/images/*.png (256 colours, under 200 KiB each).

A campaign's results are made up, and its title says so.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests/page"), str(ROOT / "tests/jobs")]
IMAGES = ROOT / "docs/images"
MOST = 200 * 1024


def picture(page: Any, name: str) -> None:
    from PIL import Image

    IMAGES.mkdir(exist_ok=True)
    path = IMAGES / f"{name}.png"
    page.wait_for_timeout(500)  # charts are drawn after their library came
    page.evaluate("window.scrollTo(0, 0)")
    page.screenshot(path=str(path))
    Image.open(path).convert("RGB").quantize(256).save(path, optimize=True)
    assert path.stat().st_size < MOST, f"{path}: {path.stat().st_size} bytes"
    print(path.relative_to(ROOT))


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="bsi-") as folder:
        os.environ["BIOSEQ_HOME"] = folder
        show(Path(folder))


def store_of_samples(folder: Path) -> Path:
    """A vector store of the sample proteins, named `samples`."""
    import bioseq
    from bioseq.backbones.pooling import EmbedOptions
    from bioseq.inference.vectors import embed_stored, settings_of
    from bioseq.vectors.store import VectorStore

    model = bioseq.load("default")
    records = list(bioseq.read_fasta(ROOT / "bioseq/sample/proteins.fasta"))[:300]
    queries = [model.prepare(r, embed=EmbedOptions(), long_sequences="window") for r in records]
    store = VectorStore(folder / "samples", settings_of(model, EmbedOptions(), "window"))
    embed_stored(model, store, queries, [r.id for r in records])
    return folder / "samples"


def show(folder: Path) -> None:
    import httpx
    import numpy as np
    from conftest import FLAGS
    from page_helpers import Site
    from playwright.sync_api import sync_playwright

    import bioseq
    from bioseq.bundles.registry import Registry
    from bioseq.campaigns.campaign import Campaign
    from training.campaigns.propose import propose

    records = list(bioseq.read_fasta(ROOT / "bioseq/sample/proteins.fasta"))[:6]
    text = "".join(f">{r.id}\n{r.sequence}\n" for r in records)
    given = {"homologs": "default", "vector_stores": [str(store_of_samples(folder))]}
    with Site(folder, Registry(), **given) as site, sync_playwright() as play:
        browser = play.chromium.launch(executable_path="/usr/bin/chromium", args=FLAGS)
        page = browser.new_page(viewport={"width": 1200, "height": 800})
        page.set_default_timeout(180_000)
        page.goto(site.url)
        page.fill("#sequences", text)
        for box in page.get_by_role("checkbox").all():
            box.check()
        page.get_by_role("button", name="Predict", exact=True).click()
        page.locator("tbody tr").nth(5).wait_for()
        picture(page, "page-predict")
        page.locator("tbody th button").first.click()
        page.get_by_role("button", name="Show its homologs").click()
        page.locator("table.alignment tbody tr").nth(5).wait_for()
        page.get_by_role("button", name="Find the nearest by embedding").click()
        page.get_by_role("region", name="Nearest of").wait_for()
        page.set_viewport_size({"width": 1200, "height": 2600})
        picture(page, "page-protein")
        page.set_viewport_size({"width": 1200, "height": 800})
        page.goto(f"{site.url}/#/models")
        page.locator("tbody tr").nth(1).wait_for()
        picture(page, "page-models")
        page.goto(f"{site.url}/#/models/localization@1")
        page.locator(".card h1").wait_for()
        picture(page, "page-card")
        (folder / "library.fasta").write_text(text)
        page.goto(f"{site.url}/#/library")
        page.set_input_files("#library-file", str(folder / "library.fasta"))
        page.get_by_text("about 6 proteins").wait_for()
        picture(page, "page-library")
        page.get_by_role("button", name="Screen", exact=True).click()
        page.get_by_role("heading", name="screen: library.fasta").wait_for()
        page.goto(f"{site.url}/#/jobs")
        page.locator("tbody tr").first.wait_for()
        picture(page, "page-jobs")
        page.goto(f"{site.url}/#/train")
        page.locator("h1").wait_for()
        picture(page, "page-train")
        body = {"wild_type": records[0].sequence, "objectives": ["activity"], "sites": [12, 15, 18], "name": "an example with made-up results"}  # fmt: skip
        made = httpx.post(f"{site.url}/v1/campaigns", json=body, timeout=300).raise_for_status().json()["id"]
        campaign = Campaign(folder / "data/campaigns" / made)
        rng = np.random.default_rng(0)
        for number in (1, 2):
            propose(campaign)
            rows = [line.split(",") for line in campaign.plate(number).splitlines()[1:]]
            results = "well,activity\n" + "".join(
                f"{r[1]},{sum(map(ord, r[2])) % 97 / 97 + number / 2 + rng.normal(0, 0.05):.3f}\n"
                for r in rows
            )
            httpx.post(
                f"{site.url}/v1/campaigns/{made}/ingest",
                content=results,
                headers={"Content-Type": "text/csv"},
                timeout=60,
            ).raise_for_status()
        propose(campaign)
        page.goto(f"{site.url}/#/campaigns/{made}")
        page.set_viewport_size({"width": 1200, "height": 1100})
        page.locator("figure svg rect").nth(90).wait_for()
        page.locator("select").select_option("2")
        picture(page, "page-campaign")
        page.set_viewport_size({"width": 1200, "height": 800})
        page.goto(f"{site.url}/#/keys")
        page.get_by_label("For whom").fill("the lab")
        page.get_by_label("admin:").check()
        page.get_by_role("button", name="Make the key").click()
        page.locator("code.secret").wait_for()
        page.get_by_role("button", name="I have it").click()
        page.get_by_text("This service asks for a key").or_(page.locator("tbody tr")).first.wait_for()
        picture(page, "page-keys")
        browser.close()


if __name__ == "__main__":
    main()
