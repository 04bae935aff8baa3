"""The report in a real browser, opened from disk. Needs Chromium: Debian's, or the one STEEPEST_CHROMIUM names."""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from steepest.lab.report import write_report
from steepest.lab.report.standing import standings
from steepest.lab.report.text import clean
from tests.lab.race_documents import HOSTILE, hollow_document, race_document

playwright = pytest.importorskip("playwright.sync_api", reason="the python package playwright is not installed")
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
CHARTS = ("validation", "sensitivity", "training", "dynamics")


@dataclass
class Reader:
    """A page, and everything that went wrong on it."""

    page: Any
    troubles: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def run(self, script: str, argument: Any = None) -> Any:
        return self.page.evaluate(script, argument)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    chromium = os.environ.get("STEEPEST_CHROMIUM") or shutil.which("chromium")
    if not chromium:
        pytest.skip("no Chromium: install Debian's package chromium, or set STEEPEST_CHROMIUM to the program")
    with playwright.sync_playwright() as driver:
        program = driver.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        yield program
        program.close()


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("reports")
    documents = {
        "plain": race_document(),
        "hostile": race_document(methods=10, steps=100, hostile=True),
        "hollow": hollow_document(),
        "many": race_document(methods=30, steps=60, lr_trials=3),
        "single": race_document(methods=1, seeds=1, steps=60),
        "watched": watched_document(),
    }
    return {name: write_report(document, folder / f"{name}.html") for name, document in documents.items()}


def watched_document() -> dict[str, Any]:
    """A race of which the trials were measured for their stability."""
    document = race_document(methods=3, steps=60)
    for trial in document["trials"]:
        trial["stability"] = {
            "step": [30, 60],
            "relative_sharpness": [0.4, 0.9],
            "sharpness": [8, 18],
            "edge": [20, 20],
        }
        trial["stability"]["threshold"] = [20.0, 20.0]
        trial["stability_verdict"] = "At the edge of stability."
    return document


@pytest.fixture
def opened(browser: Any, reports: dict[str, Path]) -> Iterator[Any]:
    """Open a report; at the end of the test nothing may have gone wrong and nothing may have been requested."""
    readers: list[tuple[Reader, str]] = []

    def open_report(name: str, *, width: int = 1280, script: str = "", **options: Any) -> Reader:
        context = browser.new_context(viewport={"width": width, "height": 850}, **options)
        page = context.new_page()
        reader = Reader(page)
        page.on("console", lambda m: m.type in {"error", "warning"} and reader.troubles.append(m.text))
        page.on("pageerror", lambda e: reader.troubles.append(str(e)))
        page.on("dialog", lambda d: (reader.troubles.append(f"dialog: {d.message}"), d.dismiss()))
        page.on("request", lambda r: reader.requests.append(r.url))
        if script:
            page.add_init_script(script)
        page.goto(reports[name].as_uri())
        page.wait_for_selector("body[data-charts=ready]", timeout=60_000)
        readers.append((reader, reports[name].as_uri()))
        return reader

    yield open_report
    for reader, address in readers:
        assert reader.troubles == []
        assert [url for url in reader.requests if not url.startswith("data:")] == [address]
        reader.page.context.close()


@pytest.mark.parametrize("name", ["plain", "hostile", "many", "single"])
def test_charts_are_drawn(opened: Any, name: str) -> None:
    reader = opened(name)
    for chart in CHARTS:
        box = reader.page.locator(f"#chart-{chart} svg.main-svg").first.bounding_box()
        assert box["width"] > 200
        assert box["height"] > 200
        marks = reader.run(
            "id => [...document.querySelectorAll(`#chart-${id} .scatterlayer path`)]"
            ".filter(p => p.getBoundingClientRect().width + p.getBoundingClientRect().height > 3).length",
            chart,
        )
        assert marks > 0


def test_stability_is_drawn_with_its_threshold(opened: Any) -> None:
    page = opened("watched").page
    names = "() => document.getElementById('chart-stability').data.map(t => t.y)"
    assert page.evaluate(names) == [[0.4, 0.9]] * 3
    page.select_option("#stability-quantity", label="Sharpness")
    page.wait_for_timeout(300)
    assert page.evaluate(names) == [[8, 18]] * 3 + [[20, 20]] * 3
    assert "At the edge of stability." in page.locator("#stability").inner_text()
    assert opened("plain").page.locator("#stability").count() == 0


def test_nothing_to_draw_says_so(opened: Any) -> None:
    reader = opened("hollow")
    assert reader.page.locator("h1").inner_text() == "No result yet"
    for chart in CHARTS:
        assert reader.page.locator(f"#chart-{chart} .empty").inner_text().startswith("No ")


def test_hover_shows_the_values(opened: Any) -> None:
    page = opened("plain").page
    chart = page.locator("#chart-validation")
    chart.scroll_into_view_if_needed()
    box = chart.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.move(box["x"] + box["width"] / 2 + 4, box["y"] + box["height"] / 2)
    label = page.locator("#chart-validation .hoverlayer")
    playwright.expect(label).to_contain_text("Muon")
    playwright.expect(label).to_contain_text("2 seeds")


def test_legend_hides_and_shows_a_method_in_every_chart(opened: Any) -> None:
    reader = opened("plain")
    chip = reader.page.locator(".chip[data-m='1']")

    def drawn(chart: str) -> int:
        return reader.run("id => document.querySelectorAll(`#chart-${id} .scatterlayer .trace`).length", chart)

    before = {chart: drawn(chart) for chart in CHARTS}
    chip.click()
    assert chip.get_attribute("aria-pressed") == "false"
    for chart in CHARTS:
        assert drawn(chart) < before[chart]
        hidden = reader.run(
            "id => document.getElementById(`chart-${id}`).data.filter(t => !t.visible).map(t => t.name)", chart
        )
        assert set(hidden) == {"Scion"}
    chip.focus()
    reader.page.keyboard.press("Space")
    assert {chart: drawn(chart) for chart in CHARTS} == before
    reader.page.locator("#toggle-all").click()
    assert all(drawn(chart) == 0 for chart in CHARTS)
    reader.page.locator("#toggle-all").click()
    assert {chart: drawn(chart) for chart in CHARTS} == before


def test_controls_change_the_charts(opened: Any) -> None:
    reader = opened("plain")
    page = reader.page

    def data(chart: str) -> Any:
        return reader.run("id => document.getElementById(`chart-${id}`).data.map(t => [t.x, t.y])", chart)

    def title(chart: str, axis: str) -> str:
        return reader.run("([id, a]) => document.getElementById(`chart-${id}`).layout[a].title.text", [chart, axis])

    first = data("dynamics")
    page.select_option("#role", label="attention out")
    second = data("dynamics")
    assert second != first
    page.locator("#quantity label", has_text="Weight norm").click()
    assert title("dynamics", "yaxis") == "Weight norm"
    assert data("dynamics") != second
    steps = data("validation")
    page.locator("label", has_text="Seconds").click()
    assert title("validation", "xaxis") == title("training", "xaxis") == "Seconds of training"
    assert data("validation") != steps
    page.locator("#band").uncheck()
    assert len(data("validation")) < len(steps)
    page.locator("#log").check()
    assert reader.run("document.getElementById('chart-validation').layout.yaxis.type") == "log"
    page.select_option("#metric", label="accuracy")
    assert title("validation", "yaxis") == "accuracy"


def test_tables_sort_numbers_as_numbers_with_missing_ones_last(opened: Any) -> None:
    page = opened("plain").page

    def column(table: str, index: int) -> list[str]:
        return page.eval_on_selector_all(
            f"{table} tbody tr", f"rows => rows.map(r => r.cells[{index}].dataset.v ?? r.cells[{index}].textContent)"
        )

    head = page.locator(".ranking thead th", has_text="Steps to target")
    for order in ("ascending", "descending"):
        head.locator("button").click()
        assert head.get_attribute("aria-sort") == order
        values = column(".ranking", 5)
        known = [float(v) for v in values if v]
        assert known == sorted(known, reverse=order == "descending")
        assert values[len(known) :] == [""] * (len(values) - len(known))
    page.locator("#trials summary").click()
    head = page.locator("#trials thead th", has_text="lr").locator("button")
    head.focus()
    page.keyboard.press("Enter")
    values = [float(v) for v in column("#trials", 1)]
    assert values == sorted(values)
    assert len(values) > 30


def test_copy_puts_the_snippet_on_the_clipboard(opened: Any) -> None:
    page = opened("plain", permissions=["clipboard-read", "clipboard-write"]).page
    page.locator("[data-copy=snippet-0]").click()
    playwright.expect(page.locator("[data-copy=snippet-0]")).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == page.locator("#snippet-0").text_content()
    assert "optimizer = build(model, 'muon', lr=0.02)" in page.locator("#snippet-0").text_content()


def test_copy_without_a_clipboard_selects_the_text(opened: Any) -> None:
    script = "Object.defineProperty(Navigator.prototype, 'clipboard', {get: () => undefined})"
    page = opened("plain", script=script).page
    page.locator("[data-copy=command]").click()
    playwright.expect(page.locator("[data-copy=command]")).not_to_have_text("Copy")
    assert page.evaluate("getSelection().toString()").strip() == page.locator("#command").text_content()


@pytest.mark.parametrize("name", ["plain", "hostile", "hollow", "many"])
def test_phone_width_needs_no_sideways_scroll(opened: Any, name: str) -> None:
    reader = opened(name, width=390, has_touch=True, is_mobile=True)
    reader.run("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    assert reader.run("[innerWidth, document.documentElement.scrollWidth]") == [390, 390]
    small = reader.run(
        """() => [...document.querySelectorAll('body *')]
        .filter(e => !e.closest('svg, script, style, .visually-hidden, option') && e.getClientRects().length)
        .filter(e => [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim()))
        .filter(e => parseFloat(getComputedStyle(e).fontSize) < 14).map(e => e.outerHTML.slice(0, 80))"""
    )
    assert small == []


def test_hostile_names_are_shown_and_run_nothing(opened: Any) -> None:
    reader = opened("hostile")
    page = reader.page
    text = page.locator("body").text_content()
    for name in HOSTILE:
        assert clean(name) in text
    titles = [item.title for item in standings(race_document(methods=10, steps=100, hostile=True))]
    for index, title in enumerate(titles):
        script = (
            "c => Plotly.Fx.hover(document.getElementById('chart-sensitivity'), [{curveNumber: c, pointNumber: 0}])"
        )
        reader.run(script, 2 * index + 1)
        label = page.locator("#chart-sensitivity .hoverlayer")
        playwright.expect(label).to_contain_text(f"{clean(title, 60)}, lr")
    assert reader.run("window.hacked") is None
    assert reader.run("document.querySelectorAll('main img, svg a, svg image, svg [style*=bold]').length") == 0
    assert reader.run("document.scripts.length") == 3


def test_the_policy_blocks_every_request(browser: Any, reports: dict[str, Path]) -> None:
    page = browser.new_page()
    page.goto(reports["plain"].as_uri())
    blocked = page.evaluate(
        """async () => {
        const seen = [];
        addEventListener('securitypolicyviolation', (e) => seen.push(e.effectiveDirective));
        new Image().src = 'http://127.0.0.1:9/x.png';
        await fetch('http://127.0.0.1:9/').catch(() => {});
        for (const tag of ['script', 'iframe']) {
          const e = document.createElement(tag);
          e.src = 'http://127.0.0.1:9/';
          document.body.append(e);
        }
        await new Promise((done) => setTimeout(done, 300));
        return seen.sort();
        }"""
    )
    assert blocked == ["connect-src", "frame-src", "img-src", "script-src-elem"]
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_both_themes(opened: Any, scheme: str) -> None:
    """The contrast of text with the page, and with a card, is at least 4.5 (WCAG AA)."""
    reader = opened("plain", color_scheme=scheme)
    ratios = reader.run(
        """() => {
        const css = getComputedStyle(document.documentElement);
        const light = (name) => {
          const c = css.getPropertyValue(name).trim();
          const [r, g, b] = [1, 3, 5].map((i) => parseInt(c.slice(i, i + 2), 16) / 255)
            .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
          return 0.2126 * r + 0.7152 * g + 0.0722 * b;
        };
        const pairs = [['--text', '--bg'], ['--muted', '--bg'], ['--muted', '--surface'], ['--muted', '--accent-soft'],
          ['--muted', '--soft'], ['--accent', '--bg'], ['--good', '--good-soft'], ['--warn', '--warn-soft'],
          ['--warn', '--surface'], ['--bad', '--surface']];
        return pairs.map(([a, b]) => {
          const [x, y] = [light(a), light(b)].sort((p, q) => q - p);
          return [a, b, (x + 0.05) / (y + 0.05)];
        });
        }"""
    )
    assert [row for row in ratios if row[2] < 4.5] == []
    dark = reader.run("getComputedStyle(document.body).backgroundColor") == "rgb(16, 18, 22)"
    assert dark == (scheme == "dark")


def test_structure_for_assistive_technology(opened: Any) -> None:
    reader = opened("plain")
    levels = reader.run("[...document.querySelectorAll('h1, h2, h3')].map(h => +h.tagName[1])")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b - a <= 1 for a, b in pairwise(levels))
    ids = reader.run(
        "[...document.querySelectorAll('main [id], body > [id]')].map(e => e.id).filter(i => !/-/.test(i))"
    )
    assert len(ids) == len(set(ids))
    nameless = reader.run(
        "[...document.querySelectorAll('main button, main select, main input')]"
        ".filter(e => !(e.textContent.trim() || e.ariaLabel || e.labels?.length)).length"
    )
    assert nameless == 0
    dangling = reader.run(
        "[...document.querySelectorAll('[aria-labelledby]')].map(e => e.getAttribute('aria-labelledby'))"
        ".filter(id => !document.getElementById(id)).length"
    )
    assert dangling == 0
