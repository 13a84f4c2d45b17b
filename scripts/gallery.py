#!/usr/bin/env python3
"""Pictures of real pages for docs/gallery, by the Chromium that is on the PATH.

    diffusion-train                                         # outputs/digits
    diffusion-train -m name=processes schedule=flow,cosine prediction=v,x0,eps trainer.steps=300 trainer.preview=64 \\
        trainer.report_every=10 trainer.preview_every=50 trainer.evaluate_every=50
    diffusion-report outputs/digits
    diffusion-report outputs/processes
    python scripts/gallery.py outputs/digits/report.html outputs/processes/report.html
"""

import io
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

GALLERY = Path(__file__).resolve().parents[1] / "docs" / "gallery"
SHOTS = (  # name, which page, view, size, colours
    ("digits", 0, "", (1280, 1000), "light"),
    ("sweep", 1, "", (1280, 1640), "dark"),
    ("compare", 1, "#compare", (1280, 1000), "light"),
)


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit("usage: python scripts/gallery.py PAGE_OF_A_RUN.html PAGE_OF_A_SWEEP.html")
    pages = [Path(word).resolve().as_uri() for word in sys.argv[1:]]
    GALLERY.mkdir(exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"])
        for name, which, view, (width, height), colours in SHOTS:
            context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=colours)
            page = context.new_page()
            page.goto(pages[which] + view)
            page.wait_for_function("[...document.images].every((image) => image.complete)")
            shot = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
            shot.save(GALLERY / f"{name}.png", optimize=True)
            context.close()
        browser.close()


if __name__ == "__main__":
    main()
