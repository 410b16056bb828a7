"""The page stands alone: checked as text, and in a browser where there is one."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import planted
import pytest

from spectral_surgery import page
from spectral_surgery.errors import OutputError
from spectral_surgery.inspecting import inspect
from spectral_surgery.inspection import Inspection

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)

WATCH = """<script>
window.seen = {errors: [], blocked: []};
addEventListener("error", (event) => seen.errors.push(String(event.message)));
addEventListener("securitypolicyviolation", (event) => seen.blocked.push(event.blockedURI));
console.error = (...words) => seen.errors.push(words.join(" "));
</script>"""

TRY = """<script>
addEventListener("load", () => {
  const hover = (id, mark) => {
    const shapes = document.querySelectorAll(`#${id} ${mark}`);
    const shape = shapes[Math.floor(shapes.length / 2)];
    shape.scrollIntoView({block: "center"});
    const box = shape.getBoundingClientRect();
    const x = box.left + box.width / 2, y = box.top + box.height / 2;
    const hit = document.elementFromPoint(x, y);
    hit.dispatchEvent(new PointerEvent("pointerenter", {clientX: x, clientY: y}));
    const tip = document.getElementById("tip");
    const shown = tip.hidden ? null : tip.textContent;
    hit.dispatchEvent(new PointerEvent("pointerleave"));
    return [shown, tip.hidden];
  };
  const choose = (id, value) => {
    const select = document.getElementById(id);
    select.value = value;
    select.dispatchEvent(new Event("change"));
    return document.getElementById(`${id === "kind" ? "fan" : "matrix"}-note`).textContent;
  };
  seen.hover = {map: hover("map", ".cell"), fan: hover("fan", ".dot"), matrix: hover("matrix", ".cell"),
    curve: hover("curve", ".dot"), compare: hover("compare", ".cell")};
  seen.chosen = choose("matrix-kind", "down_proj");
  document.getElementById("adapter").value = "1";
  document.getElementById("adapter").dispatchEvent(new Event("change"));
  seen.headline = document.getElementById("headline").textContent;
  seen.ready = document.body.dataset.ready;
  seen.requests = performance.getEntriesByType("resource").map((entry) => entry.name);
  seen.wide = document.documentElement.scrollWidth > innerWidth;
  const told = document.createElement("pre");
  told.id = "seen";
  told.textContent = JSON.stringify(seen);
  document.body.append(told);
});
</script>"""


@pytest.fixture(scope="module")
def views() -> list[Inspection]:
    return inspect([planted.readable(name="</script><b>one"), planted.readable(seed=3, name="two & three")])


@pytest.fixture(scope="module")
def text(views: list[Inspection]) -> str:
    return page.render(views)


class References(HTMLParser):
    """Collects every attribute that could make a browser fetch something, and counts script blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.scripts = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script"
        names = ("src", "href", "srcset", "data", "action", "poster", "xlink:href", "background")
        self.found += [value or "" for name, value in attrs if name in names]


def test_the_page_refers_to_nothing_outside_itself(text: str) -> None:
    parser = References()
    parser.feed(text)
    assert parser.found == ["data:,"]
    assert parser.scripts == 2
    style, script = re.search(r"<style>(.*?)</style>", text, re.DOTALL), text.rpartition("<script>")[2]
    assert style
    assert not re.search(r"url\(|@import", style[1])
    assert not re.search(r"\b(fetch|XMLHttpRequest|WebSocket|EventSource|sendBeacon|import|eval)\b", script)
    assert set(re.findall(r"https?://[^\"'\s]+", text)) == {"http://www.w3.org/2000/svg"}
    assert "default-src 'none'" in text


def test_the_data_on_the_page_are_those_of_the_inspection(text: str, views: list[Inspection]) -> None:
    block = re.search(r'<script id="data" type="application/json">(.*?)</script>', text, re.DOTALL)
    assert block
    data = json.loads(block[1])
    assert [one["name"] for one in data] == ["</script><b>one", "two & three"]
    path = planted.path(1, "o_proj")
    assert data[1]["modules"][path]["S"] == pytest.approx(views[1].modules[path].S, rel=1e-3)
    assert data[0]["against"]["two & three"]["cosine"].keys() == views[0].modules.keys()


def test_names_are_escaped_in_the_title(text: str) -> None:
    assert "<title>&lt;/script&gt;&lt;b&gt;one, two &amp; three" in text


def test_only_a_page_of_ours_is_replaced_and_only_when_told(text: str, tmp_path: Path) -> None:
    target = tmp_path / "page.html"
    page.check_path(target, overwrite=False)
    target.write_text(text, encoding="utf-8")
    page.check_path(target, overwrite=True)
    with pytest.raises(OutputError, match="Pass --overwrite"):
        page.check_path(target, overwrite=False)
    target.write_text("<!doctype html>")
    with pytest.raises(OutputError, match="no page of ours"):
        page.check_path(target, overwrite=True)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on this machine to open the page in")
@pytest.mark.parametrize("width", [1280, 500])
def test_in_a_browser_the_page_draws_answers_to_hovering_and_asks_for_nothing(
    text: str, tmp_path: Path, width: int
) -> None:
    target = tmp_path / "page.html"
    target.write_text(text.replace("<head>", f"<head>{WATCH}").replace("</body>", f"{TRY}</body>"), encoding="utf-8")
    command = [
        str(BROWSER),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--window-size={width},900",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--virtual-time-budget=10000",
        "--enable-logging=stderr",
        "--dump-dom",
        target.as_uri(),
    ]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    told = re.search(r'<pre id="seen">(.*?)</pre>', run.stdout, re.DOTALL)
    assert told, run.stderr[-2000:]
    seen = json.loads(html.unescape(told[1]))
    assert seen["errors"] == seen["blocked"] == seen["requests"] == []
    assert "CONSOLE" not in run.stderr
    assert seen["ready"] == "yes"
    assert all(hidden for _, hidden in seen["hover"].values())
    words = {"map": "norm of delta", "fan": "component", "matrix": "chance", "curve": "chance", "compare": "strength"}
    for figure, word in words.items():
        assert word in (seen["hover"][figure][0] or ""), figure
    assert seen["chosen"].startswith("down_proj output, 96 dimensions, in the residual stream")
    assert seen["headline"].startswith("two & three: 20 modules")
    assert not seen["wide"], "the page scrolls sideways"
