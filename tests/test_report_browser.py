"""report.html in headless Chromium: it draws, in light and dark, wide and narrow, and nothing sticks out.

The page has no script; the test adds one to a copy, which measures boxes and writes what it found into the page.
Where Chromium is missing these tests are skipped, except in CI (`CI=true`), where that is a failure.
"""

import html
import json
import os
import re
import shutil
import struct
import subprocess
import zlib
from dataclasses import dataclass

import numpy as np
import pytest

from lowprec.report import report_html
from report_factory import make_report

pytestmark = pytest.mark.slow

PAPER = {"light": (0xFC, 0xFC, 0xFB), "dark": (0x15, 0x18, 0x1C)}
SCHEME_COLOURS = {"w4a16-g64": (0xD5, 0x5E, 0x00), "w8a8-int8": (0x00, 0x72, 0xB2)}
# Blink's setting behind prefers-color-scheme: 0 is dark, 1 is light.
PREFERENCE = {"dark": "--blink-settings=preferredColorScheme=0", "light": "--blink-settings=preferredColorScheme=1"}
QUIET = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--enable-logging=stderr",
)

PROBE = """<script>
addEventListener("load", () => {
  const box = e => { const r = e.getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom]; };
  const scrolled = e => e.closest(".scroll, .cells, pre, details:not([open])");
  const found = {
    dark: matchMedia("(prefers-color-scheme: dark)").matches,
    background: getComputedStyle(document.body).backgroundColor,
    inner: innerWidth, wide: document.documentElement.scrollWidth,
    figures: [...document.querySelectorAll("svg.plot")].map(e => [e.getAttribute("aria-label"), ...box(e)]),
    cells: [...document.querySelectorAll(".cell")].map(box),
    marks: [...document.querySelectorAll(".point, .pair, .chosen, .estimate")].map(box),
    texts: [...document.querySelectorAll("svg.plot text, h1, h2, h3, p, dt, dd, th, td, li")]
      .filter(e => !scrolled(e) && !e.closest(".sr")).map(e => [e.textContent.trim().slice(0, 60), ...box(e)]),
    tables: [...document.querySelectorAll("table")].filter(e => !e.closest("details")).map(box),
    // Two labels of one figure that cover each other cannot be read.
    labels: [...document.querySelectorAll("svg.plot")].map(p => [...p.querySelectorAll("text:not(.cell-label)")]
      .map(e => [e.textContent, ...box(e)])),
  };
  const out = document.createElement("pre");
  out.id = "probe"; out.textContent = JSON.stringify(found);
  document.body.append(out);
});
</script>"""
# Chromium refuses windows narrower than 500 pixels, so a phone is a frame in a wider window.
PHONE = """<!doctype html><iframe id="phone" style="width:390px;height:800px;border:0" srcdoc="{page}"></iframe>
<script>addEventListener("load", () => setTimeout(() => {{
  document.body.append(document.getElementById("phone").contentDocument.getElementById("probe").cloneNode(true));
}}, 100));</script>"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Browser:
    program: str
    profile: str

    def run(self, page, *options):
        """Chromium's standard output for `page`; fails when the page complains in the console."""
        command = [self.program, *QUIET, f"--user-data-dir={self.profile}", *options, page.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        assert "CONSOLE" not in done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        reason = "Chromium is missing: apt-get install chromium"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return Browser(program=program, profile=str(tmp_path_factory.mktemp("profile")))


@pytest.fixture(scope="module", params=[30, 80], ids=["30 blocks", "80 blocks"])
def page(request):
    return report_html(make_report(blocks=request.param))


def measured(browser, folder, text, *options):
    path = folder / "page.html"
    path.write_text(text, encoding="utf-8")
    dom = browser.run(path, "--dump-dom", "--virtual-time-budget=3000", *options)
    found = re.findall(r'<pre id="probe">(.*?)</pre>', dom, re.DOTALL)
    assert found, "the page did not finish loading"
    return json.loads(html.unescape(found[-1]))


def probed(page):
    return page.replace("</body>", PROBE + "</body>")


def check_layout(found, blocks_seen):
    assert found["wide"] <= found["inner"], "the page scrolls sideways"
    assert len(found["figures"]) >= 12
    assert [f[0] for f in found["figures"] if f[3] - f[1] < 40 or f[4] - f[2] < 10] == []
    assert len(found["cells"]) >= blocks_seen
    assert all(right - left > 3 and bottom - top > 10 for left, top, right, bottom in found["cells"])
    assert len(found["marks"]) >= 24 + 7 + 3
    assert all(right - left > 5 and bottom - top > 5 for left, top, right, bottom in found["marks"])
    assert len(found["tables"]) >= 8
    assert all(right - left > 100 and bottom - top > 30 for left, top, right, bottom in found["tables"])
    assert [t for t in found["texts"] if t[0] and (t[1] < -0.5 or t[3] > found["inner"] + 0.5)] == []
    for labels in found["labels"]:
        for index, one in enumerate(labels):
            assert [other for other in labels[index + 1 :] if overlap(one, other)] == [], one


def overlap(one, other):
    """Whether two boxes share more than a sliver; line boxes are a little taller than their glyphs."""
    across = min(one[3], other[3]) - max(one[1], other[1])
    down = min(one[4], other[4]) - max(one[2], other[2])
    return across > 1 and down > 4


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_draws_everything_on_a_desktop(browser, tmp_path, page, scheme):
    found = measured(browser, tmp_path, probed(page), PREFERENCE[scheme], "--window-size=1200,900")
    assert found["dark"] == (scheme == "dark")
    assert found["background"] == f"rgb{PAPER[scheme]}"
    check_layout(found, 120)


def test_page_fits_a_phone(browser, tmp_path, page):
    text = PHONE.format(page=html.escape(probed(page)))
    found = measured(browser, tmp_path, text, "--window-size=1000,900")
    assert found["inner"] == 390
    check_layout(found, 120)


def test_screenshots_in_light_and_dark_show_the_figures(browser, tmp_path):
    path = tmp_path / "report.html"
    path.write_text(report_html(make_report()), encoding="utf-8")
    corners = {}
    for scheme, preference in PREFERENCE.items():
        shot = tmp_path / f"{scheme}.png"
        browser.run(
            path, preference, f"--screenshot={shot}", "--force-device-scale-factor=0.5", "--window-size=800,2600"
        )
        pixels = read_png(shot.read_bytes())
        assert pixels.shape[:2] == (1300, 400)
        corners[scheme] = tuple(pixels[0, 0])
        ink = np.any(pixels != pixels[0, 0], axis=2)
        assert 0.05 < ink.mean() < 0.6, "blank, or not on paper"
        for name, colour in SCHEME_COLOURS.items():
            assert np.all(pixels == colour, axis=2).sum() > 1000, f"{name} is not in the picture"
    assert corners == PAPER


def read_png(raw):
    """[height, width, 3] uint8 of an 8-bit RGB or RGBA PNG without interlacing."""
    assert raw[:8] == b"\x89PNG\r\n\x1a\n"
    place, data = 8, b""
    while place < len(raw):
        size, kind = struct.unpack(">I4s", raw[place : place + 8])
        body = raw[place + 8 : place + 8 + size]
        if kind == b"IHDR":
            width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", body)
            assert (depth, interlaced) == (8, 0)
            channels = {2: 3, 6: 4}[colour]
        elif kind == b"IDAT":
            data += body
        place += 12 + size
    rows = np.frombuffer(zlib.decompress(data), np.uint8).reshape(height, 1 + width * channels)
    image = np.zeros((height, width, channels), np.uint8)
    above = np.zeros((width, channels), np.uint8)
    for index, row in enumerate(rows):
        above = unfilter(int(row[0]), row[1:].reshape(width, channels), above)
        image[index] = above
    return image[:, :, :3]


def unfilter(kind, line, above):
    """One row of pixels from its filtered bytes [width, channels] and the row above it."""
    if kind == 0:
        return line
    if kind == 1:
        return np.cumsum(line, axis=0, dtype=np.uint64).astype(np.uint8)
    if kind == 2:
        return line + above
    out, left, corner = [], [0] * line.shape[1], [0] * line.shape[1]
    for filtered, up in zip(line.tolist(), above.tolist(), strict=True):
        if kind == 3:
            guess = [(a + b) // 2 for a, b in zip(left, up, strict=True)]
        else:
            guess = [paeth(a, b, c) for a, b, c in zip(left, up, corner, strict=True)]
        left = [(f + g) & 255 for f, g in zip(filtered, guess, strict=True)]
        corner = up
        out.append(left)
    return np.array(out, np.uint8)


def paeth(a, b, c):
    """The predictor of PNG filter 4: whichever of left, up and corner is closest to left + up - corner."""
    p = a + b - c
    distances = (abs(p - a), abs(p - b), abs(p - c))
    return (a, b, c)[distances.index(min(distances))]
