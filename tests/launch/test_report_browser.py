"""The report's page in a real browser: no complaint, no request, nothing wider than the screen, values by keyboard."""

import shutil

import numpy as np
import pytest
from browser import Browser
from made_up_runs import record, write_run

from dfl.report.build import write_report

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [pytest.mark.launch, pytest.mark.timeout(180),
              pytest.mark.skipif(PROGRAM is None, reason="no Chromium here (Debian: apt-get install chromium)")]
LABELS = ["a-very-long-class-name-without-a-space-" + "x" * 40, "</script>", "c"]


def run_of(folder, peers=10, rounds=40, **fields):
    """A run with every chart there is: layers, scalars, classes, a baseline, a graph."""
    rng = np.random.default_rng([peers, *folder.name.encode()])
    records = [record(t, np.clip(rng.normal(0.3 + t / 100, 0.05, peers), 0, 1).tolist() if t % 5 == 0 else None, 0.5 + t / 100,
                      truncation_error=float(rng.uniform()), train_loss_peers=rng.uniform(size=peers).tolist(),
                      layers={"cross_term": {f"encoder.layer.{k}.attention.self.query": float(rng.uniform()) for k in range(6)}})
               for t in range(rounds + 1)]
    shards = rng.integers(0, 50, (peers, len(LABELS))).tolist()
    facts = {"primary": "accuracy", "better": {"accuracy": "higher"}, "label_names": LABELS, "base": "/a/folder/" + "long" * 30,
             "shards": {"examples": [sum(row) for row in shards], "classes": shards}}
    fields = {"peers": peers, "topology": {"name": "edge_activation", "base": "complete", "p": 0.2}} | fields
    run = write_run(folder, records, facts=facts, **fields)
    write_run(run / "baseline-local", records, facts=facts, **(fields | {"method": "local"}))
    return run


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    root = tmp_path_factory.mktemp("pages")
    write_report([run_of(root / "one")], root / "one.html")
    write_report([run_of(root / "hundred", peers=100, rounds=20)], root / "hundred.html")
    several = [run_of(root / f"{rule['name']}{rule.get('T', '')}-{p}-{seed}", rounds=10, seed=seed, method=rule,
                      topology={"name": "edge_activation", "base": "complete", "p": p})
               for rule in ({"name": "lora"}, {"name": "tad", "T": 1}, {"name": "tad", "T": 5}) for p in (0.1, 0.5) for seed in (0, 1)]
    write_report(several, root / "several.html")
    write_report([write_run(root / "empty", [], rounds=3)], root / "empty.html")
    alone = [record(t, [0.1 * t], measures={"consensus_distance": 0.0}) for t in (1, 2)]
    write_report([write_run(root / "alone", alone, peers=1)], root / "alone.html")
    return root


@pytest.fixture
def browser():
    opened = Browser(PROGRAM)
    yield opened
    opened.close()


@pytest.mark.parametrize("name", [pytest.param("one", marks=pytest.mark.core), "hundred", "several", "empty", "alone"])
@pytest.mark.parametrize("width, dark", [(390, False), (1280, True)])
def test_a_page_loads_alone_and_fits(name, width, dark, pages, browser):
    page = pages / f"{name}.html"
    browser.open(page, width, dark=dark)
    assert browser.complaints() == []
    assert browser.requests() == [page.as_uri()]
    assert browser.value("document.documentElement.scrollWidth") <= width, browser.value(
        "[...document.querySelectorAll('*')].filter(e => e.getBoundingClientRect().right > screen.width + 1).slice(0, 5)"
        ".map(e => e.tagName + '.' + e.className).join(' ')")
    assert browser.value("[...document.querySelectorAll('figure')].every(f => f.querySelector('svg[role=img]').children.length > 1)")
    # text of charts lies inside its chart
    assert browser.value("""[...document.querySelectorAll('figure svg[role=img] text')].filter(t => {
        const a = t.getBoundingClientRect(), b = t.closest('svg').getBoundingClientRect();
        return a.left < b.left - 1 || a.right > b.right + 1;
    }).map(t => t.textContent).slice(0, 5).join(' | ')""") == ""
    ground, ink = browser.value("[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]")
    assert (ground == "rgb(255, 255, 255)") != dark and ground != ink


def test_values_are_read_with_the_keyboard_and_tables_open(pages, browser):
    browser.open(pages / "one.html", 1280)
    browser.value("document.querySelector('figure svg[role=img]').focus()")
    read = "document.querySelector('figure .readout').textContent"
    assert "arrow keys" in browser.value(read)
    for _ in range(2):
        browser.key("ArrowRight")
    assert browser.value(read).startswith("round 5 · mean of peers, least to most 0.")
    browser.key("Escape")
    assert "arrow keys" in browser.value(read)
    browser.value("document.querySelector('figure details').open = true")
    browser.value("new Promise((done) => setTimeout(done, 50))")
    assert browser.value("document.querySelectorAll('figure .numbers tbody tr').length") == 9  # rounds 0, 5 ... 40
    assert browser.complaints() == []


def test_choices_and_the_slider_change_what_is_drawn(pages, browser):
    browser.open(pages / "one.html", 1280)
    links = "document.querySelector('figure.graph .readout').textContent"
    before = browser.value(links)
    browser.value("{ const s = document.querySelector('figure.graph input'); s.value = 7; s.dispatchEvent(new Event('input')); 0 }")
    assert before.startswith("round 1 ") and browser.value(links).startswith("round 8 ")
    shown = "document.querySelectorAll('figure svg[role=img]')[0].querySelectorAll('path').length"
    all_lines = browser.value(shown)
    browser.value("[...document.querySelectorAll('figure button')].find(b => b.textContent === 'each peer').click()")
    assert browser.value(shown) == all_lines - 10
    browser.open(pages / "several.html", 390)
    heat = "document.querySelector('figure.heat svg[role=img]').textContent"
    assert browser.value("document.querySelector('figure.heat select')") is None and "method.T" in browser.value(heat)
    title = "document.querySelector('figure.lines svg[role=img]').innerHTML"
    first = browser.value(title)
    browser.value("{ const s = document.querySelector('figure.lines select'); s.value = 1; s.dispatchEvent(new Event('change')); 0 }")
    assert browser.value(title) != first and browser.complaints() == []
    chosen = "[...new Set([...document.querySelectorAll('figure.lines select')].map(s => s.selectedOptions[0].textContent))]"
    assert browser.value(chosen) == ["edge_activation p=0.5"]  # all charts show the same topology


def test_a_page_that_breaks_would_be_noticed(pages, browser):
    """The checks above see what they are for."""
    broken = pages / "broken.html"
    text = (pages / "empty.html").read_text().replace("Content-Security-Policy", "X-Nothing")
    broken.write_text(text.replace("</main>", '<div style="width: 900px">x</div><img src="http://127.0.0.1:9/x.png"></main>')
                      .replace('"use strict";', '"use strict"; console.log("hello");'))
    browser.open(broken, 390)
    assert browser.complaints() and browser.requests() == [broken.as_uri(), "http://127.0.0.1:9/x.png"]
    assert browser.value("document.documentElement.scrollWidth") > 390
