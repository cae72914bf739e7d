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
    with Site(folder, Registry()) as site, sync_playwright() as play:
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
        page.goto(f"{site.url}/#/models")
        page.locator("tbody tr").nth(1).wait_for()
        picture(page, "page-models")
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
        browser.close()


if __name__ == "__main__":
    main()
