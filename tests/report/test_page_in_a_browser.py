"""The page in headless Chromium: nothing is too wide, broken or loaded, in light and dark."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from itertools import product
from pathlib import Path

import pytest

from tangent_ops.report import collect, page_of
from tangent_ops.shards import Plan

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
WIDTHS = (380, 1400)

# A window cannot be as narrow as a phone, but a frame in it can. What its page finds goes into the
# title, which is in the source that --dump-dom prints.
FRAME = """<script>addEventListener("message", event => { document.title = event.data; })</script>
<iframe src="measured.html" width="{width}" height="1000" frameborder="0"></iframe>"""
MEASURE = """<script>
addEventListener("load", () => {
  const images = [...document.images];
  const inside = [...document.body.querySelectorAll("*")].filter(one => !one.closest("table"));
  const wide = inside.filter(one => one.getBoundingClientRect().right > innerWidth + 1);
  const found = {
    width: innerWidth, scroll: document.documentElement.scrollWidth, images: images.length,
    decoded: images.filter(one => one.complete && one.naturalWidth > 0).length,
    wide: wide.map(one => one.tagName + "." + one.className),
    loaded: performance.getEntriesByType("resource").map(one => one.name)
      .filter(name => !name.startsWith("data:")),
    background: getComputedStyle(document.body).backgroundColor,
    rows: document.querySelectorAll(".dots .track").length,
  };
  parent.postMessage(JSON.stringify(found), "*");
});
</script>"""


def opened(path: Path, dark: bool, profile: Path) -> tuple[str, str]:
    """The page's source after it was loaded, and what the browser's console says."""
    assert BROWSER is not None
    words = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    words += ["--window-size=1600,1000", f"--user-data-dir={profile}", "--dump-dom"]
    words += ["--virtual-time-budget=10000"]  # to wait for the message
    words += ["--enable-logging=stderr", f"--blink-settings=preferredColorScheme={int(not dark)}"]
    result = subprocess.run(
        [*words, path.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    return result.stdout, "\n".join(re.findall(r".*CONSOLE.*", result.stderr))


@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium: apt-get install chromium")
def test_wide_and_narrow_light_and_dark(exact: Plan, stepped: Plan, tmp_path: Path) -> None:
    for plan in (exact, stepped):
        text = page_of(collect(plan, progress=False))
        assert text.count("<meta http-equiv") == text.count("</body>") == 1
        measured = re.sub(r"<meta http-equiv.*?>", "", text).replace("</body>", f"{MEASURE}</body>")
        (tmp_path / "page.html").write_text(text, encoding="utf-8")
        (tmp_path / "measured.html").write_text(measured, encoding="utf-8")
        source, console = opened(tmp_path / "page.html", False, tmp_path / "browser")
        assert "<h2>Accuracy</h2>" in source and not console
        backgrounds = set()
        for width, dark in product(WIDTHS, (False, True)):
            (tmp_path / "frame.html").write_text(FRAME.replace("{width}", str(width)))
            source, console = opened(tmp_path / "frame.html", dark, tmp_path / "browser")
            assert not console
            title = re.search(r"<title>(.*?)</title>", source)
            assert title is not None
            found = json.loads(title[1])
            assert (found["width"], found["wide"], found["loaded"]) == (width, [], [])
            assert found["scroll"] <= width
            assert found["images"] == found["decoded"] > 12
            assert found["rows"] == len(text.split('<div class="track')) - 1 > 3
            backgrounds.add(found["background"])
            assert (found["background"] == "rgb(255, 255, 255)") is not dark
        assert len(backgrounds) == 2
