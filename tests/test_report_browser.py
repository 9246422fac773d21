"""The report in a real browser: it draws, sorts and fits, by mouse and keyboard, in the dark, on a phone, on paper."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from conmoe.diagnosis import Planned, Use
from conmoe.portrait import LayerPortrait, LostText, LostToken, Portrait
from conmoe.report.gather import Findings
from conmoe.report.measured import Compared, Figure
from conmoe.report.runs import Run, TaskRow
from conmoe.report.write import page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update")
HOSTILE = '"><img src=x onerror="window.hacked=1"><script>window.hacked=1</script>'


def scope(layer: int, E: int = 24) -> LayerPortrait:
    use = Use(
        layer=layer,
        experts=E,
        tokens=900,
        sample=900,
        least=1,
        median=9.5,
        never=0,
        few=2,
        reach=1.0,
        busiest=0.3,
        effective=20,
    )
    planned = Planned(
        layers=(layer,),
        experts=E,
        prototypes=E // 2,
        sequential=False,
        predicted=0.1 * (layer + 1),
        sample=None,
        expected=None,
        fresh=None,
        halves=None,
        width=8,
        tokens=900,
        sample_tokens=900,
        rests_on=900,
        reached=10,
        starved=0,
    )
    return LayerPortrait(
        layers=(layer,),
        assignment=tuple(e // 2 for e in range(E)),
        made_of=tuple(range(0, E, 2)),
        mixed=False,
        condensed=False,
        tokens=tuple(range(E)),
        contribution=tuple(1 / E for _ in range(E)),
        uses=(use,),
        planned=planned,
        similar=(0, 1),
        similarity=((1.0, 0.2), (0.2, 1.0)),
    )


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    """Three runs with everything that a page can show, and names that are HTML, or long."""
    texts = (LostText(text=HOSTILE + " word" * 60, kl=2.0),)
    tokens = (LostToken(before=HOSTILE, kl=3.0, next="\n", source=HOSTILE, result="x" * 80),)
    portrait = Portrait(scopes=tuple(map(scope, range(6))), texts=texts, tokens=tokens)
    run = Run(
        HOSTILE,
        form="shared",
        keep="0.5",
        bytes=50e9,
        source_bytes=100e9,
        numbers={
            "kl": Figure(0.123456, 0.01),
            "top1_agreement": Figure(0.9, 0.001),
            "excess_loss": Figure(0.05, 0.01),
            "perplexity": Figure(12.3, 0.2),
        },
        domains={HOSTILE: {"kl": Figure(0.2, 0.01)}, "wiki": {"kl": Figure(0.3, 0.01)}},
        parts={
            "tasks": (TaskRow("arc_easy", "acc", Figure(0.5, 0.1), None, None, "100"),),
            "speed": Compared(
                "ratio", (("tokens per second", Figure(3.0), Figure(4.0), Figure(4 / 3)),), (("turns", "3"),)
            ),
        },
        facts=(("command", "conmoe compress " + "long-name/" * 30), ("text", HOSTILE)),
        warnings=(HOSTILE,),
        portrait=portrait,
    )
    others = [
        replace(run, name=f"conmoe:refine=reconstruct,sequential=true,sample={n}", bytes=n * 1e9, domains={}, parts={})
        for n in (30, 9)
    ]
    others[0] = replace(others[0], numbers={**run.numbers, "kl": Figure(0.02, 0.001)}, portrait=None)
    others[1] = replace(others[1], numbers={**run.numbers, "kl": Figure(1.5, 0.1)}, portrait=None)
    out = tmp_path_factory.mktemp("page") / "report.html"
    out.write_text(page(Findings((run, *others)), HOSTILE), encoding="utf-8")
    return out


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=[*FLAGS])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, file):
    """``visit(**context)`` -> the opened page; nothing may be said on its console, nor asked of the network."""
    contexts, said = [], []

    def open_page(**options):
        context = browser.new_context(**options)
        contexts.append(context)
        shown = context.new_page()
        shown.on("console", lambda message: said.append(message.text))
        shown.on("pageerror", lambda error: said.append(str(error)))
        shown.on("request", lambda request: said.append(request.url) if request.url.startswith("http") else None)
        shown.goto(file.as_uri())
        return shown

    yield open_page
    for context in contexts:
        context.close()
    assert said == []


def test_plots_are_drawn_and_nothing_that_was_read_runs(visit):
    shown = visit()
    assert shown.evaluate("window.hacked") is None
    assert shown.locator("svg.plot circle").count() == 3
    assert shown.locator(".layer svg").count() == 6
    assert shown.locator(".layer img").first.evaluate("image => image.naturalWidth") == 2
    box = shown.locator("svg.plot").bounding_box()
    assert box["width"] > 500
    assert box["height"] > 200
    assert HOSTILE in shown.locator("h1").inner_text()


def column(shown, number):
    rows = shown.locator("section").first.locator("table").first.locator("tbody tr")
    return [float(rows.nth(row).locator("td").nth(number).get_attribute("data-v")) for row in range(rows.count())]


@pytest.mark.parametrize("press", ["click", "Enter", "Space"])
def test_tables_are_sorted_by_mouse_and_keyboard(visit, press):
    shown = visit()
    heading = shown.locator("section").first.locator("table").first.locator("th").nth(2)
    assert "KL" in heading.inner_text()
    for expected, state in ((sorted, "ascending"), (lambda values: sorted(values, reverse=True), "descending")):
        button = heading.locator("button")
        button.click() if press == "click" else button.press(press)
        values = column(shown, 2)
        assert len(values) == 3
        assert values == expected(values)
        assert heading.get_attribute("aria-sort") == state


def test_a_phone_scrolls_downwards_only(visit):
    shown = visit(viewport={"width": 390, "height": 844}, is_mobile=True, device_scale_factor=2)
    assert shown.evaluate("document.documentElement.scrollWidth") <= 390


def test_the_dark_is_dark_and_can_be_read(visit):
    def colours(scheme):
        shown = visit(color_scheme=scheme)
        style = shown.evaluate(
            "(({color, backgroundColor}) => [color, backgroundColor])(getComputedStyle(document.body))"
        )
        return [luminance(each) for each in style]

    for scheme in ("light", "dark"):
        ink, paper = colours(scheme)
        assert (ink < paper) == (scheme == "light")
        assert (max(ink, paper) + 0.05) / (min(ink, paper) + 0.05) > 7  # WCAG's contrast, level AAA


def luminance(colour: str) -> float:
    """WCAG 2.2: relative luminance of ``rgb(r, g, b)``."""
    parts = [float(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(share * part for share, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_on_paper_everything_is_open_and_fits(visit, tmp_path):
    shown = visit()
    shown.locator("details").first.evaluate("part => part.open = false")
    shown.pdf(path=tmp_path / "report.pdf", format="A4")
    assert (tmp_path / "report.pdf").stat().st_size > 10_000
    assert shown.evaluate("[...document.querySelectorAll('details')].every(part => part.open)")
    shown.emulate_media(media="print")
    assert not shown.locator("nav").is_visible()


def test_every_section_can_be_reached_by_its_link(visit):
    shown = visit()
    links = shown.locator("nav a").evaluate_all("links => links.map(link => link.getAttribute('href'))")
    assert len(links) >= 5
    assert json.dumps(links).count("#") == sum(shown.locator(link).count() for link in links)
