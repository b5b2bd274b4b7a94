"""The report in a browser: nothing on the console, names stay text, labels apart, keyboard and pointer."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from crlseq.report import write_report
from tests.report.test_page import EVIL
from tests.synthetic import synthetic_run, with_pairs

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")

# Put into the page by the test: what a user would do and see. Its answer goes into the title.
PROBE = """<script>
addEventListener("error", (event) => { window.broken = event.message; });
addEventListener("load", () => {
  const all = (query) => [...document.querySelectorAll(query)];
  const boxes = (query) => all(query).map((item) => item.getBoundingClientRect());
  const meet = (a, b) => a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom;
  const pairs = (list) => list.flatMap((a, i) => list.slice(i + 1).filter((b) => meet(a, b))).length;
  const node = document.querySelector("#dag .node"), about = document.getElementById("about"), edge = document.querySelector("#dag .edge");
  const found = {
    labels: pairs(boxes("#dag text")), programs: pairs(boxes("#dag .node rect")),
    outside: all("#dag .node").filter((n) => { const r = n.querySelector("rect").getBoundingClientRect(); return [...n.querySelectorAll("text")].some((t) => t.getBoundingClientRect().right > r.right + .5); }).length,
    width: innerWidth, cut: all(".scroll > table").filter((t) => t.offsetWidth > t.parentElement.clientWidth).length,
    wide: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    images: all("img").length, scripts: all("script").length, handlers: all("*").filter((item) => [...item.attributes].some((a) => a.name.startsWith("on"))).length,
    dark: getComputedStyle(document.body).backgroundColor, ink: getComputedStyle(document.body).color,
    small: all("svg text").filter((t) => t.closest("svg").getBoundingClientRect().width && parseFloat(getComputedStyle(t).fontSize) < 9).length,
  };
  found.dags = boxes(".dag").map((b) => [b.width, b.right]);
  const mark = document.querySelector(".help"), told = mark && document.getElementById(mark.getAttribute("popovertarget"));
  if (mark) {
    found.hidden = getComputedStyle(told).display;
    mark.focus(); mark.click();
    found.meaning = told.matches(":popover-open") ? told.textContent : "";
    told.hidePopover();
  }
  if (!document.getElementById("about").textContent || !document.querySelector("body > script")) { document.title = JSON.stringify(found); return; }
  node.focus();
  found.focus = about.textContent;
  found.focused = document.activeElement === node;
  const path = edge && edge.getAttribute("d");
  node.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight", bubbles: true, cancelable: true }));
  found.keyed = node.getAttribute("transform");
  found.follows = edge ? edge.getAttribute("d") !== path : null;
  document.getElementById("reset").click();
  found.back = node.getAttribute("transform");
  const same = (a, b) => a.match(/-?[\\d.]+/g).every((x, i) => Math.abs(x - b.match(/-?[\\d.]+/g)[i]) < .11);
  found.redrawn = edge ? same(edge.getAttribute("d"), path) : null;
  node.setPointerCapture = () => {};  // there is no pointer to capture here
  const fire = (type, x, y) => node.dispatchEvent(new PointerEvent(type, { clientX: x, clientY: y, bubbles: true, button: 0 }));
  fire("pointerdown", 10, 10); fire("pointermove", 60, 30); fire("pointerup", 60, 30);
  found.scale = document.getElementById("dag").viewBox.baseVal.width / document.getElementById("dag").getBoundingClientRect().width;
  found.dragged = node.getAttribute("transform");
  const click = new MouseEvent("click", { bubbles: true, cancelable: true });
  node.dispatchEvent(click);
  found.dragIsNoClick = click.defaultPrevented;
  node.dispatchEvent(new PointerEvent("pointerenter"));
  found.hover = about.textContent;
  const cell = document.querySelector("#pairs td[title]"), pair = document.getElementById("pair");
  if (cell) {
    cell.click();
    found.tapped = pair.textContent;
    found.told = cell.title;
    found.marked = cell.classList.contains("on");
    found.flat = all("#pairs td[title]").filter((td) => Math.abs(td.offsetWidth - td.offsetHeight) > 12).length;
  }
  found.broken = window.broken || "";
  document.title = JSON.stringify(found);
});
</script>"""


def browse(path: Path, *flags: str) -> tuple[str, list[str]]:
    """The DOM after the page has run, and what stood on the console."""
    assert BROWSER is not None
    profile = tempfile.mkdtemp()  # not beside the page, which may lie in a run folder that others look at
    words = [
        BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
        "--enable-logging=stderr", f"--user-data-dir={profile}", "--virtual-time-budget=2000", "--window-size=1200,900",
        *flags, "--dump-dom", path.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, errors="replace")
    shutil.rmtree(profile, ignore_errors=True)
    assert done.returncode == 0, done.stderr
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def probe(page: str, path: Path, *flags: str, width: int | None = None) -> dict[str, Any]:
    """What `PROBE` finds in a page, whose policy would keep that script out.

    A window has 500 pixels at least, whatever is asked for: a narrower page is shown in a frame.
    """
    page = re.sub(r"<meta http-equiv=.Content-Security-Policy.*?>", "", page)
    page = page.replace("<head>", f"<head>{PROBE}", 1)
    if width is not None:
        told = "document.title = this.contentDocument.title"
        page = f'<iframe width="{width}" height="844" style="border: 0" onload="{told}" srcdoc="{html.escape(page)}"></iframe>'
    path.write_text(page, encoding="utf-8")
    dom, console = browse(path, *flags)
    assert not console, console
    title = re.search(r"<title>(\{.*?\})</title>", dom)
    assert title is not None, dom[:2000]
    found: dict[str, Any] = json.loads(html.unescape(title[1]))
    return found


def test_a_fault_would_be_seen(tmp_path: Path, run_folder: Path) -> None:
    """The console is read, and the page's policy stops what is not its own."""
    page = (run_folder / "report.html").read_text()
    evil = "<script>document.title = 'owned'</script><img src=x onerror=\"document.title='owned'\">"
    (tmp_path / "page.html").write_text(page.replace("<main>", f"<main>{evil}"))
    dom, console = browse(tmp_path / "page.html")
    assert len(console) >= 2 and "Content Security Policy" in " ".join(console)
    assert "<title>crlseq report</title>" in dom


def test_nothing_on_the_console(run_folder: Path) -> None:
    dom, console = browse(run_folder / "report.html")
    assert console == []
    assert dom.count('class="node"') == 2 * 3  # with labels, and for a phone without


def test_a_question_mark_opens_by_keyboard_and_touch(run_folder: Path, tmp_path: Path) -> None:
    """Without a script of the page's own."""
    page = re.sub(r"<script>.*?</script>", "", (run_folder / "report.html").read_text(), flags=re.DOTALL)
    found = probe(page, tmp_path / "probe.html")
    assert found["meaning"].startswith("Detectable effect") and found["hidden"] == "none"


@pytest.mark.parametrize("n", [8, 30])
@pytest.mark.parametrize("width", [390, 800])
def test_the_dag_scrolls_on_no_small_screen(tmp_path: Path, width: int, n: int) -> None:
    """One of the two drawings is there, and within the page."""
    names = [f"VERYLONGPERTURBATIONNAME{k}" for k in range(5 * n)]
    edges = [(a, b) for a in range(n) for b in range(a + 1, n) if (7 * a + 3 * b) % 13 == 0]
    run = synthetic_run(n, 5 * n, edges, names=names)
    write_report(run, tmp_path / "report.html")
    found = probe((tmp_path / "report.html").read_text(), tmp_path / "probe.html", width=width)
    (shown,) = (box for box in found["dags"] if box[0] > 0)
    assert shown[0] > 100 and shown[1] <= width and found["wide"] <= 0
    assert width == 800 or found["dags"][0][0] == 0  # a phone gets the one without labels


def test_a_dag_of_thirty_programs_with_any_names(tmp_path: Path) -> None:
    names = [*EVIL[:4], *(f"TNFRSFWM{k}" for k in range(146))]
    edges = [(a, b) for a in range(30) for b in range(a + 1, 30) if (7 * a + 3 * b) % 13 == 0]
    run = synthetic_run(30, 150, edges, names=names, genes=[*EVIL[:4], *(f"GENE{k}" for k in range(60))])
    write_report(run, tmp_path / "report.html")
    found = probe((tmp_path / "report.html").read_text(), tmp_path / "probe.html")
    assert (found["labels"], found["programs"], found["outside"]) == (0, 0, 0)
    assert (found["images"], found["scripts"], found["handlers"], found["broken"]) == (0, 2, 0, "")
    assert found["focused"] and found["focus"].startswith("P0  ") and EVIL[0] in found["focus"]
    assert found["keyed"] == "translate(12,0)" and found["follows"]
    assert found["back"] == "translate(0,0)" and found["redrawn"]
    x, y = (
        round(found["scale"] * moved) for moved in (50, 20)
    )  # the picture may be shrunk: the program stays under the pointer
    assert found["dragged"] == f"translate({x},{y})" and found["dragIsNoClick"]
    assert 1 <= found["scale"] <= 1.3
    assert found["hover"].startswith("P0  ")
    assert found["small"] == 0


def test_phone_and_dark_mode(tmp_path: Path) -> None:
    run = synthetic_run(6, 30, [(0, 1), (1, 2)], names=[f"VERYLONGPERTURBATIONNAME{k}" for k in range(30)])
    run = with_pairs(run, {(0, 1): {"status": "upstream", "change": 0.5}})
    run = replace(run, info={**run.info, "command": "crlseq fit " + "x" * 200})
    write_report(run, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    found = probe(page, tmp_path / "probe.html", "--blink-settings=preferredColorScheme=0", width=390)
    assert found["width"] == 390 and found["cut"] == 0  # the last column of every table is seen
    assert found["wide"] <= 0  # nothing but the marked parts scrolls sideways
    assert (found["dark"], found["ink"]) == ("rgb(13, 17, 23)", "rgb(230, 237, 243)")
    assert found["labels"] == 0
    assert found["tapped"] == found["told"] and "P0 is upstream of P1" in found["tapped"] and found["marked"]
    assert found["flat"] == 0  # cells of the matrix stay squares that a finger meets
