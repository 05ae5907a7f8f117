"""The page, in a real headless Chromium: what a user sees and does."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from helpers.chromium import Chromium
from helpers.handmade import Writer, usual_run

from vgen.cli import main
from vgen.profiling import semconv

HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=alert(1)>\u2028"


def page(run: Path, file: Path, *arguments: str) -> Path:
    assert main(["trace", str(run), "--html", str(file), *arguments]) == 0
    return file


@pytest.fixture
def shown(browser: Chromium, tmp_path):
    return browser.open(page(usual_run(tmp_path / "run"), tmp_path / "trace.html", "--step", "2"))


def state(browser: Chromium):
    return browser.evaluate("vgenTrace.state()")


def place(browser: Chromium, name: str, *, at: float = 0.5) -> tuple[float, float]:
    """A point on the row of a span, `at` of the way along the time that is shown."""
    now, box = (
        state(browser),
        browser.evaluate("(({x, y, width}) => [x, y, width])(document.getElementById('rows').getBoundingClientRect())"),
    )
    row = now["shown"].index(name)
    return box[0] + now["names"] + at * (box[2] - now["names"]), box[1] + now["axis"] + (row + 0.5) * now["row"]


def colors(browser: Chromium) -> dict[str, float]:
    """How bright the picture on the canvas is, from 0 to 255, and how many colours there are in it."""
    return browser.evaluate(
        "(() => { const canvas = document.getElementById('rows'), all = new Set(); let sum = 0;"
        "const { data } = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);"
        "for (let i = 0; i < data.length; i += 4) { sum += data[i] + data[i + 1] + data[i + 2];"
        "all.add(data[i] << 16 | data[i + 1] << 8 | data[i + 2]); }"
        "return { brightness: sum / (data.length * 0.75), number: all.size }; })()"
    )


def test_it_draws_without_a_network_or_an_error(shown: Chromium, tmp_path):
    assert state(shown)["spans"] == 12
    assert state(shown)["shown"][0] == "train.step"
    assert shown.evaluate("document.getElementById('summary').textContent") == "12 spans, 9.600 s"
    urls = {event["request"]["url"].split(":")[0] for event in shown.said("Network.requestWillBeSent")}
    assert urls <= {"file", "data"}
    assert shown.said("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled") == []
    assert colors(shown)["number"] > 20
    assert shown.screenshot(Path(os.environ.get("VGEN_TEST_ARTEFACTS", tmp_path)) / "trace.png").startswith(b"\x89PNG")


def test_zoom_by_wheel_buttons_keys_double_click_and_drag(shown: Chromium):
    whole = state(shown)
    assert (whole["from"], whole["to"]) == (0, whole["total"])
    x, y = place(shown, "train.step", at=0.25)
    under = 0.25 * whole["total"]
    shown.mouse("mouseWheel", x, y, deltaX=0, deltaY=-300, modifiers=2)  # with the control key
    near = state(shown)
    assert near["to"] - near["from"] == pytest.approx(0.549 * whole["total"], rel=0.01)
    # what was under the pointer is still there
    assert near["from"] + 0.25 * (near["to"] - near["from"]) == pytest.approx(under, rel=0.01)
    shown.evaluate("document.getElementById('all').click()")
    shown.settle()
    assert state(shown)["to"] == whole["total"]
    shown.press("+")
    assert state(shown)["to"] - state(shown)["from"] == pytest.approx(0.6 * whole["total"])
    left = state(shown)["from"]
    shown.mouse("mousePressed", x, y, button="left", buttons=1, clickCount=1)
    shown.mouse("mouseMoved", x + 100, y, button="left", buttons=1)
    shown.mouse("mouseReleased", x + 100, y, button="left", clickCount=1)
    assert state(shown)["from"] < left
    shown.press("0")
    x, y = place(shown, "update")
    shown.click(x, y, count=2)
    now = state(shown)
    assert now["to"] - now["from"] == pytest.approx(1.1e9, rel=0.01)  # the update took a second
    assert now["chosen"] == "update"


def test_hover_and_details_tell_what_a_span_was(shown: Chromium):
    x, y = place(shown, semconv.WEIGHT_SYNC)
    shown.mouse("mouseMoved", x, y)
    assert state(shown)["hovered"] == semconv.WEIGHT_SYNC
    hint = shown.evaluate("document.getElementById('hint').innerText")
    assert semconv.WEIGHT_SYNC in hint
    assert "300.0 ms" in hint
    assert "vgen.weight_sync.bytes: 300000000" in hint
    shown.click(x, y)
    details = shown.evaluate("document.getElementById('details').innerText")
    assert "vgen.step\t2" in details  # inherited from the step
    shown.mouse("mouseMoved", 5, 5)
    assert shown.evaluate("document.getElementById('hint').hidden")


def test_search_finds_names_attributes_and_errors(browser: Chromium, tmp_path):
    writer = Writer(tmp_path)
    step = writer.step(1, 0, 10)
    outer = writer.span(semconv.GENERATE, 0, 8, under=step)
    for number in range(80):
        own = {"gen_ai__request__id": f"request-{number}"}
        writer.span(semconv.REQUEST, 0, 0.1 * number, under=outer, error="TimeoutError" if number == 5 else None, **own)
    writer.span("update", 8, 10, under=step)
    browser.open(page(tmp_path, tmp_path / "trace.html"))
    folded = state(browser)
    assert folded["spans"] == 83
    assert folded["shown"] == ["train.step", "vgen.generate", "update"]  # 80 requests at once are folded
    browser.press("/")
    browser.write("request-7")
    assert state(browser)["matches"] == 11
    browser.press("Enter")
    assert browser.evaluate("document.getElementById('found').textContent") == "1 of 11"
    assert len(state(browser)["shown"]) == 83  # what was found is unfolded
    assert "request-7" in browser.evaluate("document.getElementById('details').innerText")
    browser.press("Escape")
    assert state(browser)["matches"] == 0
    browser.press("/")
    browser.write("timeouterror")
    browser.press("Enter")
    assert state(browser)["matches"] == 1
    assert "TimeoutError" in browser.evaluate("document.querySelector('#details .bad').textContent")
    # and it was scrolled to where it can be seen
    assert browser.evaluate("document.getElementById('scroll').scrollTop") > 0


def test_dark_where_the_system_is(browser: Chromium, tmp_path):
    file = page(usual_run(tmp_path / "run"), tmp_path / "trace.html")

    assert colors(browser.open(file))["brightness"] > 180
    assert colors(browser.open(file, dark=True))["brightness"] < 80


def test_nothing_in_a_span_becomes_markup_or_script(browser: Chromium, tmp_path):
    writer = Writer(tmp_path)
    step = writer.step(1, 0, 5)
    writer.span(HOSTILE, 0, 5, under=step, note=HOSTILE, error=HOSTILE)
    file = page(tmp_path, tmp_path / "trace.html")
    assert "owned'</script>" not in file.read_text()
    browser.open(file)
    assert browser.evaluate("document.title") == "vgen: last trace"
    x, y = place(browser, HOSTILE)
    browser.mouse("mouseMoved", x, y)
    browser.click(x, y)
    assert HOSTILE.split("\u2028")[0] in browser.evaluate("document.getElementById('details').textContent")
    assert browser.evaluate("document.images.length") == 0
    assert browser.evaluate("document.scripts.length") == 2
    assert browser.said("Runtime.exceptionThrown", "Page.javascriptDialogOpening") == []


def test_ten_thousand_spans_fit_and_only_what_is_in_sight_is_drawn(browser: Chromium, tmp_path):
    writer = Writer(tmp_path)
    step = writer.step(1, 0, 100)
    requests = [(0.001 * i, 1 + 0.009 * i) for i in range(9_990)]
    writer.generate(step, 0, 95, requests, spans=9_990)
    file = page(tmp_path, tmp_path / "trace.html")
    assert file.stat().st_size <= 3_000_000
    browser.open(file)
    assert state(browser)["spans"] == 9_993
    browser.press("e")
    assert len(state(browser)["shown"]) == 9_993
    browser.evaluate(
        "(() => { const kind = CanvasRenderingContext2D.prototype, plain = kind.fillText; window.texts = 0;"
        "kind.fillText = function (...given) { window.texts += 1; return plain.apply(this, given); }; })()"
    )
    browser.evaluate("document.getElementById('scroll').scrollTop = 100000")
    browser.settle()
    assert 10 < browser.evaluate("window.texts") < 500
    assert browser.evaluate("document.getElementById('scroll').scrollTop") == 100000


def test_what_could_not_be_shown_is_said_on_the_page(browser: Chromium, tmp_path):
    writer = Writer(tmp_path)
    writer.step(1, 0, None)
    browser.open(page(tmp_path, tmp_path / "trace.html"))
    assert "1 span never ended" in browser.evaluate("document.getElementById('problems').textContent")


def test_an_ancient_or_scriptless_browser_is_told(tmp_path):
    text = page(usual_run(tmp_path / "run"), tmp_path / "trace.html").read_text()
    assert "<noscript>" in text
    assert "http" not in text.replace("http-equiv", "")
