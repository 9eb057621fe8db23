"""Pictures of what a run leaves to look at: its report, and the card of the dataset that it would publish.

    python tests/pictures.py runs/quickstart .github/pictures

Needs Chromium, chromedriver, and what `pip install -e ".[dev]"` brings.
"""

import base64
import sys
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import quote

from conftest import chromium
from datasets import Dataset
from markdown_it import MarkdownIt
from PIL import Image

from hf_reflect import build_report
from hf_reflect.hub.__main__ import main as hub

# the Hub's own look, about
_CARD = """<!doctype html><meta charset="utf-8"><style>
body {{ font: 16px/1.6 system-ui, sans-serif; color: #1f2937; margin: 0; padding: 24px 40px; max-width: 880px; }}
h1, h2 {{ line-height: 1.25; margin: 1.2em 0 .5em; }} h1 {{ margin-top: 0; }}
table {{ border-collapse: collapse; font-size: 14px; }} th, td {{ border: 1px solid #d5dae1; padding: 5px 10px; }}
th {{ background: #f3f4f6; text-align: left; }} code {{ background: #eef0f3; border-radius: 4px; padding: 1px 5px; }}
pre {{ background: #f3f4f6; border-radius: 8px; padding: 12px 16px; overflow: hidden; }} pre code {{ padding: 0; }}
</style>{body}"""


def main(run: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as work, chromium(work) as browser:
        page = build_report(run, Path(work) / "report.html")
        browser.get(page.as_uri())
        picture(browser, folder / "report.png", 1280, 1500)
        selected = Dataset.load_from_disk(str(run / "selected"))
        shown = selected["row_id"][selected["variant"][:].index("response")]
        browser.get(f"{page.as_uri()}#row={quote(shown)}")
        picture(browser, folder / "reader.png", 1280, 1000)
        contents = Path(work) / "quickstart"
        assert hub(["write", str(run), str(contents), "--tokenizer", str(run / "model")]) == 0
        text = (contents / "README.md").read_text(encoding="utf-8").split("\n---\n", 1)[1]  # below the metadata
        card = contents / "card.html"
        card.write_text(_CARD.format(body=MarkdownIt("commonmark").enable("table").render(text)), encoding="utf-8")
        browser.get(card.as_uri())
        picture(browser, folder / "card.png", 960, 1350)


def picture(browser, path: Path, width: int, height: int) -> None:
    """The top of the page that is open, as wide and as high as this."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.execute_cdp_cmd("Emulation.setScrollbarsHidden", {"hidden": True})
    shot = base64.b64decode(browser.execute_cdp_cmd("Page.captureScreenshot", {})["data"])
    Image.open(BytesIO(shot)).convert("RGB").quantize(128).save(path, optimize=True)
    print(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
