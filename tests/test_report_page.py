"""The report page: what it says, that nothing in it can become markup, and how it behaves in a browser."""

from __future__ import annotations

import copy
import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import verdicts

from spectral_surgery import report
from spectral_surgery.report import page

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
HOSTILE = (
    '</script><script>window.hurt=1</script><img src=x onerror="window.hurt=1">'
    "\u202egpj.exe\x1b[31m\x00\ud800 $x^2$ {{ 7*7 }}"
)
"""Markup, a mark that turns text round, a terminal's escape, NUL, a lone surrogate, a formula, a template."""


def hostile(value: Any, seen: tuple[str, ...] = ()) -> Any:
    """Returns a verdict with hostile text behind every string that is not a word of the contract."""
    kept = ("outcome", "family", "stage", "change", "kind", "created", "unit")
    if isinstance(value, dict):
        return {key: inner if key in kept else hostile(inner, (*seen, key)) for key, inner in value.items()}
    if isinstance(value, list):
        return [hostile(inner, seen) for inner in value]
    return value + HOSTILE if isinstance(value, str) and value not in ("base", "unedited") else value


class Elements(HTMLParser):
    """Collects what a browser could fetch or run, and the text it would show."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.references: list[str] = []
        self.tags: list[str] = []
        self.handlers: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        names = ("src", "href", "srcset", "data", "action", "poster", "xlink:href", "background")
        self.references += [value or "" for name, value in attrs if name in names]
        self.handlers += [name for name, _ in attrs if name.startswith("on")]

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.fixture(scope="module")
def refined() -> dict[str, Any]:
    return verdicts.refined()


@pytest.fixture(scope="module")
def text(refined: dict[str, Any]) -> str:
    return page.render(refined)


def words(text: str) -> str:
    return re.sub(r"\s+", " ", " ".join(Elements(text).words))


def test_the_page_refers_to_nothing_outside_itself(text: str) -> None:
    found = Elements(text)
    assert found.references == ["data:,"]
    assert found.handlers == []
    assert found.tags.count("script") == 1
    assert not re.search(r"url\(|@import", text)
    assert not re.search(r"https?://", text)
    assert "default-src 'none'" in text


@pytest.mark.parametrize("name", verdicts.ALL)
def test_the_verdict_and_what_to_do_come_first(name: str) -> None:
    verdict = verdicts.ALL[name]()
    shown = words(page.render(verdict).partition("<main>")[2])
    heads = {
        "refined": "Use the refined adapter",
        "leave_alone": "Leave it alone",
        "not_better": "Not better than its base model",
        "seen_rows": "Refined; task accuracy not tested",
    }
    start = shown[:420]
    assert heads[name] in start
    assert verdict["sentence"].removeprefix("Leave it alone: ")[1:60] in start
    assert ("No adapter was written" in shown) == (verdict["outcome"] != "refined")


def test_figures_are_those_of_the_verdict(text: str, refined: dict[str, Any]) -> None:
    winner = next(c for c in refined["candidates"] if c["stage"] == "winner")
    link = refined["chain"][-1]
    shown = words(text)
    task, skills = (winner["test"][key] for key in ("task", "skills"))
    row = (
        f"refined: few-step tuning 0.2 {100 * task['mean']:.1f} [{100 * (task['mean'] - 1.96 * task['se']):.1f}, "
        f"{100 * (task['mean'] + 1.96 * task['se']):.1f}] {100 * skills['mean']:.1f}"
    )
    assert row in shown
    assert f"gain {100 * link['skills']['estimate']:+.1f} [{100 * link['skills']['low']:.1f}" in shown
    assert all(f"against {claim['against']} {claim['sentence']}" in shown for claim in refined["claims"])
    assert refined["command"] in shown


def test_every_candidate_is_on_the_ladder_with_its_stage(text: str, refined: dict[str, Any]) -> None:
    ladder = text.partition('<table class="ladder">')[2].partition("</table>")[0]
    rows = [words(row) for row in ladder.split("<tr")[2:]]
    assert len(rows) == len(refined["candidates"])
    for row, candidate in zip(rows, refined["candidates"], strict=True):
        assert candidate["name"] in row
        assert candidate["stage"] in row


def test_hostile_text_stays_text() -> None:
    shown = page.render(hostile(verdicts.refined()))
    found = Elements(shown)
    assert found.tags.count("script") == 1
    assert "img" not in found.tags
    assert found.handlers == []
    assert found.references == ["data:,"]
    assert not re.search("[\x00\x1b\u202e\ud800-\udfff]", shown)
    assert "\\u202egpj.exe\\u001b[31m\\u0000\\ud800" in words(shown)
    assert "{{ 7*7 }}" in words(shown)
    shown.encode("utf-8")


def test_without_examples_no_text_of_the_user_is_on_the_page(refined: dict[str, Any]) -> None:
    shown = html.unescape(page.render(refined, examples=False))
    texts = {one[key] for one in refined["examples"] for key in ("prompt", "answer", "base", "unedited") if one[key]}
    long = [text for text in texts if len(text) > 6]
    assert len(long) > 4
    assert [text for text in [*long, refined["rows"]["first"]] if text in shown] == []
    assert "Fixed and broken" not in shown


def test_the_page_copes_with_everything_unknown_being_null() -> None:
    verdict = verdicts.not_better()
    verdict["candidates"] = []
    verdict |= {"chain": [], "categories": [], "examples": [], "times": {}, "options": {}, "environment": {}}
    verdict["rows"] |= {"first": None, "smallest_difference": None}
    for key in ("task", "skills"):
        verdict["measures"][key]["margin"] = None
    shown = words(page.render(verdict))
    assert "Not better than its base model" in shown
    assert "What is kept, and at what price" not in shown


WATCH = """<script>
window.seen = {errors: [], blocked: []};
addEventListener("error", (event) => seen.errors.push(String(event.message)));
addEventListener("securitypolicyviolation", (event) => seen.blocked.push(event.blockedURI));
console.error = (...words) => seen.errors.push(words.join(" "));
</script>"""

TRY = """<script>
addEventListener("load", () => {
  const hover = (marks) => {
    const shape = [...document.querySelectorAll(marks)].filter((one) => one.getBoundingClientRect().width)[0];
    shape.scrollIntoView({block: "center"});
    const box = shape.getBoundingClientRect();
    const x = box.left + box.width / 2, y = box.top + box.height / 2;
    const hit = document.elementFromPoint(x, y).closest("[data-tip]");
    hit.dispatchEvent(new PointerEvent("pointerenter", {clientX: x, clientY: y}));
    const tip = document.getElementById("tip");
    const inside = tip.getBoundingClientRect();
    const shown = tip.hidden ? null : tip.textContent;
    hit.dispatchEvent(new PointerEvent("pointerleave"));
    return [shown, tip.hidden, inside.left >= 0 && inside.right <= innerWidth];
  };
  seen.hover = {picture: hover(".figure [data-tip]"), gates: hover(".gates td"), category: hover(".strip")};
  const labels = [...document.querySelectorAll("text.label")].filter((one) => one.getBoundingClientRect().width);
  const boxes = labels.map((one) => [one.textContent, one.getBoundingClientRect()]);
  seen.labels = boxes.map(([words]) => words);
  const cross = (p, q) => p.left < q.right && q.left < p.right && p.top + 3 < q.bottom && q.top + 3 < p.bottom;
  seen.overlaps = boxes.flatMap(([a, p], i) => boxes.slice(i + 1).filter(([, q]) => cross(p, q)).map(([b]) => a + b));
  const svg = labels[0].closest("svg").getBoundingClientRect();
  seen.outside = [...document.querySelectorAll(".figure text")].filter((one) => {
    const p = one.getBoundingClientRect();
    return p.width && (p.left < svg.left - 1 || p.right > svg.right + 1);
  }).map((one) => one.textContent);
  document.querySelectorAll("details").forEach((one) => { one.open = true; });
  seen.ready = document.body.dataset.ready;
  seen.hurt = window.hurt;
  seen.requests = performance.getEntriesByType("resource").map((entry) => entry.name);
  seen.width = innerWidth;
  seen.wide = document.documentElement.scrollWidth;
  const told = document.createElement("pre");
  told.id = "seen";
  told.textContent = JSON.stringify(seen);
  (parent === window ? document : parent.document).body.append(told);
});
</script>"""


def browse(text: str, folder: Path, width: int) -> dict[str, Any]:
    """Returns what the page told about itself in a frame of this width (a window is never so narrow as a phone)."""
    marked = text.replace("<head>", f"<head>{WATCH}").replace("</body>", f"{TRY}</body>")
    (folder / "page.html").write_text(marked, encoding="utf-8")
    frame = f'<body style="margin:0"><iframe src="page.html" style="border:0;width:{width}px;height:850px"></iframe>'
    (folder / "frame.html").write_text(frame, encoding="utf-8")
    command = [
        str(BROWSER),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--allow-file-access-from-files",
        f"--window-size={max(500, width)},900",
        f"--user-data-dir={folder / 'profile'}",
        "--virtual-time-budget=10000",
        "--enable-logging=stderr",
        "--dump-dom",
        (folder / "frame.html").as_uri(),
    ]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    told = re.search(r'<pre id="seen">(.*?)</pre>', run.stdout, re.DOTALL)
    assert told, run.stderr[-2000:]
    assert "CONSOLE" not in run.stderr
    return dict(json.loads(html.unescape(told[1])))


needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on this machine to open the page in")


@needs_browser
@pytest.mark.parametrize("width", [1280, 390])
def test_in_a_browser_values_show_and_nothing_is_fetched_or_overflows(text: str, tmp_path: Path, width: int) -> None:
    seen = browse(text, tmp_path, width)
    assert seen["errors"] == seen["blocked"] == seen["requests"] == []
    assert (seen["ready"], seen["width"]) == ("yes", width)
    parts = {"picture": "other skills", "gates": "gates", "category": "refined"}
    for part, word in parts.items():
        shown, hidden, inside = seen["hover"][part]
        assert word in (shown or ""), part
        assert hidden
        assert inside
    assert sorted(seen["labels"]) == ["base model", "continue lr 1e-3", "refined", "strength 0.6", "your adapter"]
    assert seen["overlaps"] == seen["outside"] == []
    assert seen["wide"] <= width


@needs_browser
def test_in_a_browser_hostile_text_does_nothing_at_phone_width(tmp_path: Path) -> None:
    seen = browse(page.render(hostile(verdicts.refined())), tmp_path, 390)
    assert seen["errors"] == seen["blocked"] == seen["requests"] == []
    assert "hurt" not in seen
    assert seen["wide"] <= 390


def test_the_report_is_written_whole_and_only_over_its_own(tmp_path: Path, refined: dict[str, Any]) -> None:
    verdict = copy.deepcopy(refined)
    folder = tmp_path / "new" / "out"
    written = report.write_report(verdict, folder)
    names = {path.relative_to(folder).as_posix() for path in written}
    assert names == {
        "report.html",
        *(f"figures/{n}.{e}" for n in ("trade-off", "gates", "spectra") for e in ("png", "svg")),
    }
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} == names
    before = {path: path.read_bytes() for path in written}
    assert {path: path.read_bytes() for path in report.write_report(verdict, folder)} == before
