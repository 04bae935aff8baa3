import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from scipy.stats import ttest_rel

from steepest.lab.report import terminal_table, write_report
from steepest.lab.report.charts import chart_data, extremes, seed_band, windows
from steepest.lab.report.page import embed, render
from steepest.lab.report.standing import apart, standings, target_ratio
from steepest.lab.report.summary import summarize
from steepest.lab.report.text import clean, clean_code, duration, loss, memory, number, plot_text, short, spread
from tests.lab.race_documents import HOSTILE, hollow_document, race_document


class Page(HTMLParser):
    """What a browser sees: elements, attributes, visible text, and the text of each script."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.scripts, self.text, self._in = [], [], [], "", ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, k, v) for k, v in attrs]
        self._in = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self._in = ""

    def handle_data(self, data):
        if self._in == "script":
            self.scripts[-1] += data
        elif self._in != "style":
            self.text += data


def terminal(document, width=120):
    console = Console(width=width, force_terminal=False, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    with console.file:
        console.print(terminal_table(document))
    return console.export_text()


def every_document():
    yield "plain", race_document(steps=60)
    yield "one method", race_document(methods=1, steps=60)
    yield "one seed", race_document(seeds=1, steps=60)
    yield "many methods", race_document(methods=30, seeds=3, steps=60)
    yield "hostile", race_document(methods=10, steps=60, hostile=True)
    yield "nothing known", hollow_document()
    yield "no methods", race_document(steps=60) | {"methods": [], "trials": []}
    curveless = race_document(steps=60)
    for trial in curveless["trials"]:
        trial.update(curve=None, val=None, roles=None)
    yield "no curves", curveless


@pytest.mark.parametrize(("label", "document"), list(every_document()), ids=lambda x: x if isinstance(x, str) else "")
def test_every_document_renders(label, document):
    page = Page(render(document))
    assert len(page.scripts) == 3
    json.loads(page.scripts[0])
    assert terminal(document)
    assert page.tags.count("h1") == 1


@pytest.mark.parametrize("hole", [None, math.nan, "text", [], True])
def test_holes_anywhere_are_tolerated(hole):
    document = race_document(methods=2, steps=40)

    def without(value, keys):
        for key in keys:
            holed = json.loads(json.dumps(document))
            for target in value(holed):
                target[key] = hole
            render_quick(holed)

    without(lambda d: [d], set(document) - {"format", "methods", "trials"})
    without(lambda d: d["methods"], document["methods"][0])
    without(lambda d: d["trials"], document["trials"][0])
    without(lambda d: [t[k] for t in d["trials"] for k in ("val", "curve")], ["step", "seconds", "loss", "train_loss"])
    without(lambda d: [m["final"] for m in d["methods"]], ["mean", "std", "values"])


def render_quick(document):
    """Everything but the 2 MB of plotly.js."""
    summary = summarize(document)
    embed(chart_data(summary.standings, summary.reference))
    terminal(document)


def test_same_document_same_bytes_and_atomic(tmp_path):
    document = race_document(steps=40)
    first = write_report(document, tmp_path / "deep" / "a.html").read_bytes()
    assert first == write_report(document, str(tmp_path / "b.html")).read_bytes()
    with pytest.raises(ValueError, match="format"):
        write_report({"format": 99}, tmp_path / "b.html")
    assert (tmp_path / "b.html").read_bytes() == first
    assert sorted(x.name for x in tmp_path.iterdir()) == ["b.html", "deep"]


@pytest.mark.parametrize(
    ("document", "error", "words"),
    [
        ([], TypeError, "document must be a race document"),
        ({}, ValueError, "must be 1, got None"),
        ({"format": 1, "trials": []}, ValueError, r"document\['methods'\] must be a list"),
        ({"format": 1, "methods": [], "trials": [3]}, ValueError, r"document\['trials'\] must be a list of objects"),
    ],
)
def test_wrong_documents_are_refused(document, error, words, tmp_path):
    with pytest.raises(error, match=words):
        write_report(document, tmp_path / "x.html")
    with pytest.raises(error, match=words):
        terminal_table(document)
    assert not list(tmp_path.iterdir())


def test_page_asks_for_nothing_from_outside():
    page = Page(render(race_document(steps=40)))
    policy = next(v for t, k, v in page.attributes if k == "content" and "default-src" in v)
    assert policy.startswith("default-src 'none'")
    assert not re.search(r"https?:|\*|unsafe-eval", policy)
    links = [(t, k, v) for t, k, v in page.attributes if k in {"src", "href", "srcset", "action", "data", "poster"}]
    assert all(v.startswith("#") or v == "data:," for _, _, v in links)


def test_hostile_names_are_text():
    document = race_document(methods=10, steps=40, hostile=True)
    html = render(document)
    page = Page(html)
    assert not {"img", "a:js"} & set(page.tags)
    assert [t for t in page.tags if t == "script"] == ["script"] * 3
    assert not [k for _, k, _ in page.attributes if k.startswith("on")]
    for name in HOSTILE:
        assert clean(name) in page.text
    assert "49" not in re.findall(r">\s*(49)\s*<", html)
    assert "<" not in page.scripts[0]
    assert all(ord(c) < 128 for c in page.scripts[0])
    data = json.loads(page.scripts[0])
    assert all(not set("<>") & set(m["name"]) for m in data["methods"])


def test_terminal_reads_no_markup_and_no_control_sequences():
    output = terminal(race_document(methods=10, steps=40, hostile=True), width=300)
    assert "[bold]not bold[/bold]" in output
    assert "\x1b" not in output
    assert "\u202e" not in output


@pytest.mark.parametrize("width", [80, 100, 120])
def test_terminal_table_fits(width):
    lines = terminal(race_document(steps=40), width).splitlines()
    row = next(x for x in lines if x.startswith("1 "))
    assert "Muon" in row
    assert " ± " in row
    assert max(map(len, lines)) <= width


def test_headline_is_honest():
    clear = summarize(race_document(steps=40))
    assert clear.title == "Muon wins"
    assert [badge.kind for badge in clear.badges] == ["good", "good"]
    assert [tile.label for tile in clear.tiles][1] == "Steps to AdamW’s final loss"
    close = summarize(race_document(steps=40, gap=0.0))
    assert "not separable from" in close.title
    assert close.badges[0].kind == "unsure"
    assert summarize(race_document(steps=40, seeds=1)).title == "Muon is ahead on one seed"
    assert "only method" in summarize(race_document(steps=40, methods=1)).title
    partial = summarize(race_document(steps=40, status="partial"))
    assert partial.title == "Muon leads so far"
    assert partial.partial is not None
    assert summarize(hollow_document()).title == "No result yet"


def test_differences_are_paired_by_seed():
    table = {x.name: x for x in standings(race_document(steps=40, seeds=3))}
    muon, adamw, sgd = table["muon"], table["adamw"], table["sgd"]
    difference = apart(muon, adamw)
    pairs = np.array(adamw.values) - np.array(muon.values)
    assert difference.mean == pytest.approx(pairs.mean())
    assert difference.p_value == pytest.approx(ttest_rel(adamw.values, muon.values).pvalue)
    assert difference.significant
    assert apart(muon, sgd).seeds == 1
    assert not apart(muon, sgd).significant
    steps = muon.target("steps_to_target")
    assert steps is not None
    assert target_ratio(muon, adamw, "steps_to_target") == pytest.approx(40 / steps)
    assert target_ratio(sgd, adamw, "steps_to_target") is None


def test_a_lost_seed_is_not_averaged_away():
    document = race_document(steps=40)
    document["methods"][0]["final"]["values"][1] = None
    item = standings(document)[0]
    assert (item.mean, item.std, item.lost) == (None, None, 1)
    assert "1 of 2 seeds lost" in Page(render(document)).text


def test_winning_reference_is_measured_against_the_next():
    tiles = summarize(race_document(steps=40, reference="muon")).tiles
    assert [tile.label for tile in tiles][1] == "Steps to Scion’s final loss"
    assert tiles[1].value == "1.82× fewer"


def test_curves_are_those_of_the_best_learning_rate():
    item = standings(race_document(steps=40, seeds=3))[0]
    assert tuple(t["value"] for t in item.curves) == item.values
    band = seed_band(item.curves, "loss")
    assert band is not None
    assert band["n"] == 3
    assert band["mean"][-1] == pytest.approx(item.mean, rel=1e-4)
    assert all(a <= b <= c for a, b, c in zip(band["low"], band["mean"], band["high"], strict=True))


def test_band_covers_the_steps_all_seeds_reached():
    trials = [
        {"val": {"step": [0, 10, 20], "seconds": [0, 1, 2], "loss": [4.0, 2.0, 1.0]}},
        {"val": {"step": [0, 5, 10], "seconds": [0, 1, 2], "loss": [6.0, None, 4.0]}},
    ]
    band = seed_band(trials, "loss")
    assert band == {"step": [0, 10], "seconds": [0, 1.5], "mean": [5, 3], "low": [4, 2], "high": [6, 4], "n": 2}


def test_large_races_stay_light():
    document = race_document(methods=2, steps=30_000, lr_trials=3)
    summary = summarize(document)
    data = chart_data(summary.standings, summary.reference)
    assert max(len(s["y"]) for s in data["training"]) <= 400
    assert len(embed(data)) < 200_000


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=500), st.integers(2, 60))
def test_thinning_keeps_what_matters(values, points):
    y = np.array(values)
    kept = extremes(y, points)
    assert len(kept) <= max(points + 3, 0)
    assert {y[kept].min(), y[kept].max(), y[kept][0], y[kept][-1]} >= {y.min(), y.max(), y[0], y[-1]}
    assert (np.diff(kept) > 0).all()
    means = windows(y, points)
    assert len(means) <= points
    assert y.min() - 1e-6 <= means.min() <= means.max() <= y.max() + 1e-6


@given(st.text())
def test_any_text_becomes_safe(text):
    for made in (clean(text), plot_text(text), clean_code(text)):
        made.encode()
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", made)
    assert not set("<>") & set(plot_text(text))
    assert json.loads(embed(text)) == text
    assert not re.search("[<>&\u2028\u2029]", embed(text))


def test_numbers_read_well():
    assert [loss(x) for x in (1.70801, None, math.nan, 123456.0, 1e-5)] == ["1.7080", "–", "–", "1.23e+05", "1e-05"]
    assert [spread(x) for x in (0.0041, 0.02, 0.123, 1e-6, 0.0)] == ["0.0041", "0.020", "0.12", "1.0e-06", "0"]
    assert [short(x) for x in (0.02, 0.0003, 1234.0)] == ["0.02", "0.0003", "1,234"]
    assert [duration(x) for x in (0.5, 252, 7500)] == ["0.5 s", "4 min 12 s", "2 h 05 min"]
    assert [memory(x) for x in (12, 4096, 5e6, 3e12)] == ["12 B", "4 KiB", "4.77 MiB", "2,794 GiB"]
    assert number(True) is None
    assert number(10**400) is None
