"""The page of `tools/report.py` in headless Chromium: what it draws and what its controls do.

Run by `make test-browser`. The browser is the first of NAMES on the path, or $CHROMIUM.
"""

from __future__ import annotations

import html
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from test_report_page import HOSTILE, text_of, write_run

pytestmark = pytest.mark.browser

NAMES = ("chromium", "chromium-browser", "chromium-headless-shell", "google-chrome")
WATCH = "<script>addEventListener('error', e => document.title = 'failed: ' + e.message)</script>"


@pytest.fixture(scope="module")
def browser() -> str:
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if not found:
        pytest.fail(f"no browser: install one of {', '.join(NAMES)}, or set CHROMIUM to its path")
    return found


@pytest.fixture
def page(tmp_path, browser):
    """A page in a browser: with some flags, after a script has used it."""

    def run(folders: list[Path], *flags: str, use: str = "", max_tokens: int = 30_000) -> str:
        text = text_of(*folders, max_tokens=max_tokens)
        assert text.count("<head>") == text.count("</body>") == 1
        text = text.replace("<head>", f"<head>{WATCH}")
        text = text.replace("</body>", f"<script>{use}</script></body>")
        (tmp_path / "page.html").write_text(text)
        command = [browser, "--no-sandbox", "--hide-scrollbars", "--virtual-time-budget=5000"]
        command += [*flags, f"file://{tmp_path}/page.html"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def inside(dom: str, name: str) -> str:
    """What stands in the element with an id, up to the next element with one."""
    (found,) = re.findall(rf'id="{name}"(.*?)(?: id="|</body>)', dom, re.DOTALL)
    return found


def tokens_of(dom: str) -> list[int]:
    """How many tokens each completion shows."""
    boxes = re.findall(r'class="tokens"[^>]*>(.*?)</div>', dom, re.DOTALL)
    return [box.count("<span") for box in boxes]


def test_curves_tables_and_the_pair_of_a_prompt_are_drawn(page, tmp_path):
    dom = page([write_run(tmp_path / str(seed), seed) for seed in (0, 1)], "--dump-dom")
    assert "<title>OPD report: opd</title>" in dom  # and not "failed: ..."
    assert inside(dom, "learning-charts").count("<svg") >= 2
    assert inside(dom, "health-charts").count("<svg") >= 1
    assert "Before: student at step 0" in dom and "After: student at step 3" in dom
    assert tokens_of(dom) == [5, 5]


def test_the_controls_and_the_pointer(page, tmp_path):
    choose = "const at = (id, value) => { const e = document.getElementById(id); e.value = value;"
    choose += " e.dispatchEvent(new Event('change')); };"
    dom = page([write_run(tmp_path / "run", 0)], "--dump-dom", use=f"{choose} at('of-verdict', -1)")
    assert "1 shown" in inside(dom, "count") and inside(dom, "list").count("<button") == 1
    assert inside(dom, "tip").lstrip().startswith('role="status" hidden')
    point = "document.querySelectorAll('.tokens span')[2].dispatchEvent("
    point += "new PointerEvent('pointerover', {bubbles: true, clientX: 9, clientY: 9}));"
    dom = page([tmp_path / "run"], "--dump-dom", use=point)
    tip = re.sub("<[^>]*>", " ", inside(dom, "tip"))
    assert "hidden" not in tip.split(">")[0]
    for words in ("token 3, id 7", "−0.502 nats", "−1.000 nats", "log_ratio", "teacher's top"):
        assert words in html.unescape(tip)
    at_end = point.replace("[2]", "[4]")
    dom = page([tmp_path / "run"], "--dump-dom", use=at_end)
    assert "0 %" in inside(dom, "tip")  # the teacher's -inf


def test_a_completion_is_copied(page, tmp_path):
    folder = write_run(tmp_path / "run", 0, text="x")
    use = "Object.defineProperty(navigator, 'clipboard', {value: {writeText: async text => { "
    use += "document.title = 'copied ' + text; }}});"
    use += "document.querySelector('#panes button.copy').click();"
    dom = page([folder], "--dump-dom", use=use)
    assert "<title>copied xxxxx</title>" in dom and ">copied</button>" in dom
    refused = use.replace("document.title = 'copied ' + text;", "throw new Error('no');")
    dom = page([folder], "--dump-dom", use=refused)
    assert ">select and copy by hand</button>" in dom
    assert "<title>OPD report" in dom


@pytest.mark.parametrize("width", [390, 1400])
def test_nothing_is_wider_than_the_window_and_no_word_is_broken(page, tmp_path, width):
    """Tables scroll in their cards; a name of one word fits in its column."""
    folders = [write_run(tmp_path / f"{name}", 0, lr=lr) for name, lr in (("a", 1e-3), ("b", 1))]
    use = (
        "const lines = cell => { const r = document.createRange(); r.selectNodeContents(cell);"
        " return new Set([...r.getClientRects()].map(b => b.top)).size; };"
        " const cells = [...document.querySelectorAll('th')];"
        " const words = cells.filter(c => /^\\w+$/.test(c.innerText));"
        " document.title = `wide ${document.documentElement.scrollWidth}, words ${words.length},"
        " broken ${words.filter(c => lines(c) > 1).map(c => c.innerText)}.`"
    )
    dom = page(folders, f"--window-size={width},900", "--dump-dom", use=use)
    (wide, num, broken) = re.findall(r"<title>wide (\d+), words (\d+),\s+broken (.*?)\.<", dom)[0]
    assert int(wide) <= width and int(num) > 10 and broken == ""


def test_a_hostile_completion_does_nothing(page, tmp_path):
    dom = page([write_run(tmp_path / "run", 0, text=HOSTILE)], "--dump-dom")
    (title,) = re.findall("<title>(.*?)</title>", dom, re.DOTALL)
    assert title.startswith("OPD report")
    assert "<img" not in dom and "onerror" in dom  # it is there, as text
    assert tokens_of(dom) == [5, 5]


def test_a_completion_of_5000_tokens_is_whole(page, tmp_path):
    folder = write_run(tmp_path / "run", 0, num=5000)
    dom = page([folder], "--dump-dom", max_tokens=10_000)
    assert tokens_of(dom) == [5000, 5000]


@pytest.mark.parametrize(("scheme", "bright"), [(0, False), (1, True)])
def test_the_page_is_dark_where_the_reader_is(page, tmp_path, scheme, bright):
    from matplotlib import image

    flags = (f"--blink-settings=preferredColorScheme={scheme}", "--window-size=1160,1200")
    page([write_run(tmp_path / "run", 0)], *flags, "--screenshot=shot.png")
    pixels = image.imread(tmp_path / "shot.png")[..., :3]
    assert pixels.shape == (1200, 1160, 3) and float(np.std(pixels)) > 0.02  # something is drawn
    assert (float(np.median(pixels)) > 0.5) == bright
