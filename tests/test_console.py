"""The console in a real browser, over a real service with a real bundle and some traffic."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from bundles import (
    Place,
    add_bundle,
    add_live_bundle,
    body,
    constant,
    make_place,
    point_at,
    serving,
    settings_of,
)
from playwright.sync_api import Browser, Page, expect, sync_playwright
from servers import running_server

from bundle.manifest import Verdict, read_manifest, seal
from embeddings_store import open_store

CHROMIUM = Path("/usr/bin/chromium")
TOKEN = "an-operators-token"
HTML = "<img src=x onerror=\"document.title='owned'\">"
pytestmark = pytest.mark.skipif(not CHROMIUM.exists(), reason=f"{CHROMIUM} is not installed")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        # As root, as in most containers, Chromium does not start in its sandbox.
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        expect.set_options(timeout=20_000)
        yield chromium
        chromium.close()


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return make_place(tmp_path)


@contextmanager
def visit(
    browser: Browser, client: httpx.Client, *, expected: Sequence[str] = (), **options: Any
) -> Iterator[Page]:
    """The console, open. At the end nothing may have come from elsewhere, and the browser may have
    complained of nothing but what is `expected`."""
    context = browser.new_context(**{"viewport": {"width": 1240, "height": 900}, **options})
    page = context.new_page()
    complaints: list[str] = []
    hosts: set[str] = set()
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: hosts.add(httpx.URL(request.url).netloc.decode()))
    try:
        page.goto(f"{client.base_url}/console")
        yield page
        assert hosts == {client.base_url.netloc.decode()}
        assert [one for one in complaints if not any(e in one for e in expected)] == []
    finally:
        context.close()


def refused_copy(place: Place, bundle_id: str, reason: str) -> str:
    """Publishes a copy of a bundle that its gates have refused for that reason."""
    source = place.registry.path(bundle_id)
    with place.registry.draft() as draft:
        shutil.copytree(source, draft, dirs_exist_ok=True)
        (draft / "manifest.json").unlink()
        (draft / "reference.json").write_text("{ }")
        gates = (Verdict("log loss", False, 0.7, "at most 0.5", reason),)
        seal(draft, replace(read_manifest(source), files={}, id="", gates=gates))
        return place.registry.publish(draft)


def ranked(page: Page) -> list[tuple[str, float]]:
    """Ads and percentages, as the page ranks them."""
    rows = page.locator("#result tbody tr")
    cells = [row.locator("td").all_inner_texts() for row in rows.all()]
    return [(ad, float(share.removesuffix(" %"))) for _, ad, _, share in cells]


def rgb(page: Page, selector: str, name: str) -> tuple[float, ...]:
    script = "([selector, name]) => getComputedStyle(document.querySelector(selector))[name]"
    colour = page.evaluate(script, [selector, name])
    return tuple(float(part) for part in re.findall(r"[\d.]+", colour)[:3])


def luminance(colour: tuple[float, ...]) -> float:
    """Relative luminance as WCAG defines it."""
    linear = [
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4
        for part in (value / 255 for value in colour)
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(page: Page, selector: str, behind: str) -> float:
    lights = [
        luminance(rgb(page, selector, "color")),
        luminance(rgb(page, behind, "backgroundColor")),
    ]
    return (max(lights) + 0.05) / (min(lights) + 0.05)


def test_the_page_shows_what_is_live_and_the_data_of_its_tiers(
    browser: Browser, place: Place
) -> None:
    bundle_id = add_live_bundle(place)
    with serving(settings_of(place)) as client, visit(browser, client) as page:
        expect(page.get_by_role("status")).to_have_text("Serving")
        expect(page.locator("#live-id")).to_have_text(bundle_id)
        expect(page.locator("#live-facts")).to_contain_text(place.window.ref.build)
        expect(page.locator("#live-metrics")).to_have_text("0.7500auc")
        expect(page.locator("#lineage svg")).to_have_attribute(
            "aria-label",
            "Lineage: TPM 2017-04, 2017-05, 2017-06; CPM 06-01 to 06-30; A-CTR 06-01 to 06-30;"
            " for 2017-07-01",
        )
        widths, lefts = (
            [float(box.get_attribute(name) or 0) for box in page.locator("#lineage rect").all()]
            for name in ("width", "x")
        )
        # April, May and June one after the other, and twice June again.
        assert widths[1] > widths[0] == pytest.approx(widths[2])
        assert widths[3:] == pytest.approx([widths[2]] * 2)
        assert lefts[0] < lefts[1] < lefts[2] == pytest.approx(lefts[3]) == pytest.approx(lefts[4])


def test_the_charts_get_data_once_there_are_requests(browser: Browser, place: Place) -> None:
    add_live_bundle(place)
    with serving(settings_of(place)) as client, visit(browser, client) as page:
        last = page.locator("#stages tbody tr").last
        expect(last).to_have_text(re.compile("total.*\N{EN DASH}"))
        for _ in range(20):
            assert client.post("/v1/score", json=body(num=5)).status_code == 200
        assert client.post("/v1/score", json={"user": 1}).status_code == 422
        expect(page.locator("#chart-traffic figcaption")).to_have_text(
            "21 requests, 100 ads in 1 min"
        )
        expect(last).to_have_text(re.compile(r"total\d+\.\d\d ms"))
        for chart in ("traffic", "latency", "errors"):
            line = page.locator(f"#chart-{chart} .line").last.get_attribute("d") or ""
            points = re.findall(r"[ML]([\d.]+) ([\d.]+)", line)
            assert points, f"{chart} has no line"
        # Up from none at all, or down to it: the line that was drawn has both ends of the scale.
        line = page.locator("#chart-traffic .line")
        expect(line).to_have_attribute("d", re.compile(r" 16\.0\D"))
        expect(line).to_have_attribute("d", re.compile(r" 102\.0(\D|$)"))


def test_what_was_missing_and_what_callers_reported_is_on_the_page(
    browser: Browser, place: Place
) -> None:
    model = add_live_bundle(place)
    with serving(settings_of(place)) as client, visit(browser, client) as page:
        client.post("/v1/score", json=body(user={"id": "user-3", "features": {"income": 5}}))
        client.post("/v1/score", json=body())
        event = {"request_id": "r", "score": 0.5, "model": model}
        events = [{**event, "item": f"item-{i}", "clicked": i == 0} for i in range(4)]
        assert client.post("/v1/feedback", json=events).json()["counted"] == 4
        quality = page.locator("#quality")
        expect(quality).to_contain_text(re.compile(r"missing: age\s*50\.0 %"))
        expect(quality).to_contain_text(re.compile(rf"{model}\s*4\s*25\.0 %\s*2"))


def test_a_store_that_does_not_answer_is_seen_with_the_second_line_and_the_cache(
    browser: Browser, tmp_path: Path
) -> None:
    with running_server() as server:
        place = make_place(tmp_path, server.url)
        add_live_bundle(place)
        place.store.close()
        copy = tmp_path / "copy"
        open_store(str(copy)).publish(place.window)
        settings = settings_of(place, store_copy=str(copy), store_deadline_ms=200)
        with serving(settings) as client, visit(browser, client) as page:
            store = page.locator("#store")
            expect(store).to_contain_text("No request was degraded.")
            new = body(candidates={"id": ["an-item-that-no-bundle-knows"]})
            for _ in range(2):
                assert client.post("/v1/score", json=new).json()["degraded"] == []
            expect(store).to_contain_text(re.compile(r"item cache, hits\s*50\.0 %"))
            server.freeze()
            client.post("/v1/score", json=body())
            server.thaw()
            reason = "second line instead of the store: timeout"
            expect(store).to_contain_text(re.compile(rf"{reason}\s*33\.3 %\s*1"))


def test_a_sample_is_scored_and_its_ads_are_ranked_by_their_scores(
    browser: Browser, place: Place
) -> None:
    bundle_id = add_live_bundle(place)
    with serving(settings_of(place)) as client, visit(browser, client) as page:
        sample = client.get("/console/sample").json()["request"]
        expect(page.get_by_label("Request, JSON")).not_to_have_value("")
        assert json.loads(page.get_by_label("Request, JSON").input_value()) == sample
        page.get_by_role("button", name="Score").click()
        result = page.locator("#result")
        expect(result).to_contain_text(f"5 ads scored by {bundle_id}")
        expect(result).to_contain_text("run ")
        answer = client.post("/v1/score", json=sample).json()
        by_score = sorted(
            zip(sample["candidates"]["id"], answer["scores"], strict=True), key=lambda a: -a[1]
        )
        assert [ad for ad, _ in ranked(page)] == [ad for ad, _ in by_score]
        assert [s for _, s in ranked(page)] == pytest.approx(
            [100 * s for _, s in by_score], rel=0.01
        )
        widths = [float(w) for w in page.locator("#result .bar i").evaluate_all(_WIDTHS)]
        assert widths == sorted(widths, reverse=True)
        assert widths[0] == 100
        for name, num in answer["missing"].items():
            expect(result).to_contain_text(f"{name} ({num})")


_WIDTHS = "bars => bars.map(bar => parseFloat(bar.style.width))"


def test_a_request_that_is_wrong_is_answered_with_the_field_that_is_wrong(
    browser: Browser, place: Place
) -> None:
    add_live_bundle(place)
    with (
        serving(settings_of(place)) as client,
        visit(browser, client, expected=["status of 422"]) as page,
    ):
        page.get_by_label("Request, JSON").fill('{"user": {"id": 1}, "candidates": {"id": [1.5]}}')
        page.get_by_role("button", name="Score").click()
        expect(page.locator("#result")).to_contain_text("candidates.id[0]: 1.5 is not a string")
        page.get_by_label("Request, JSON").fill("{")
        page.get_by_role("button", name="Score").click()
        expect(page.locator("#result")).to_contain_text("not JSON")


def test_a_refused_bundle_appears_with_its_reason(browser: Browser, place: Place) -> None:
    live = add_live_bundle(place)
    with serving(settings_of(place)) as client, visit(browser, client) as page:
        expect(page.locator("#changes")).not_to_contain_text("Refused")
        bad = add_bundle(place, bias=1, change_graph=constant)
        point_at(place, bad)
        expect(page.locator("#changes")).to_contain_text(f"Refused {bad}constant: ")
        expect(page.locator("#live-id")).to_have_text(live)


def test_text_of_bundles_and_refusals_is_never_taken_for_html(
    browser: Browser, place: Place
) -> None:
    live = add_live_bundle(place)
    refused_copy(place, live, HTML)
    with serving(settings_of(place)) as client, visit(browser, client) as page:
        expect(page.locator("#bundles")).to_contain_text(f"at most 0.5 ({HTML})")
        point_at(place, HTML)
        expect(page.locator("#changes")).to_contain_text(HTML)
        page.get_by_label("Request, JSON").fill(json.dumps(body(candidates={"id": [HTML]})))
        page.get_by_role("button", name="Score").click()
        expect(page.locator("#result")).to_contain_text(HTML)
        assert page.locator("img[src]").count() == 0
        assert page.title() == "ecdctr console"


def test_nothing_live_and_a_service_that_is_away_are_said_in_words(
    browser: Browser, place: Place
) -> None:
    with serving(settings_of(place)) as client:
        context = browser.new_context()
        page = context.new_page()
        page.goto(f"{client.base_url}/console")
        expect(page.get_by_role("status")).to_have_text("Nothing live")
        expect(page.get_by_role("alert")).to_have_text(
            "Nothing is live: no bundle has been promoted."
        )
        assert client.get("/console/sample").status_code == 503
        live = add_live_bundle(place)
        expect(page.get_by_role("status")).to_have_text("Serving")
        expect(page.locator("#notice")).to_be_hidden()
    expect(page.get_by_role("status")).to_have_text("Service away")
    expect(page.get_by_role("alert")).to_contain_text("has not answered since")
    expect(page.locator("#live-id")).to_have_text(live)
    context.close()


def test_a_promotion_needs_the_right_token_and_then_swaps(browser: Browser, place: Place) -> None:
    first = add_live_bundle(place)
    second = add_bundle(place, bias=1)
    settings = settings_of(place, control_token=TOKEN)
    with (
        serving(settings) as client,
        visit(browser, client, expected=["status of 401"]) as page,
    ):
        page.get_by_role("button", name=f"Promote {second}").click()
        dialog = page.get_by_role("dialog")
        dialog.get_by_label("Control token").fill("a-guess")
        dialog.get_by_role("button", name="Promote").click()
        expect(dialog.get_by_role("alert")).to_contain_text("control token")
        expect(page.locator("#live-id")).to_have_text(first)
        dialog.get_by_label("Control token").fill(TOKEN)
        dialog.get_by_role("button", name="Promote").click()
        expect(page.locator("#live-id")).to_have_text(second)
        expect(dialog).to_be_hidden()
        assert client.get("/v1/models").json()["live"]["id"] == second
        expect(page.locator("#changes")).to_contain_text(f"Promoted {second}before: {first}")

        page.get_by_role("button", name="Roll back").click()
        assert dialog.get_by_label("Control token").input_value() == "", "the token was kept"
        dialog.get_by_label("Control token").fill(TOKEN)
        dialog.get_by_role("button", name="Roll back").click()
        expect(page.locator("#live-id")).to_have_text(first)
        assert page.evaluate("localStorage.length + sessionStorage.length + document.cookie") == "0"


def test_without_a_control_token_nothing_offers_to_promote(browser: Browser, place: Place) -> None:
    add_live_bundle(place)
    other = add_bundle(place, bias=1)
    with serving(settings_of(place)) as client, visit(browser, client) as page:
        expect(page.locator("#bundles")).to_contain_text(other)
        expect(page.get_by_role("button", name="Roll back")).to_be_hidden()
        assert page.get_by_role("button", name="Promote").count() == 0


def test_the_keyboard_alone_scores_and_promotes_with_a_focus_that_is_seen(
    browser: Browser, place: Place
) -> None:
    add_live_bundle(place)
    second = add_bundle(place, bias=1)
    settings = settings_of(place, control_token=TOKEN)
    with serving(settings) as client, visit(browser, client) as page:
        expect(page.locator("#body")).not_to_have_value("")
        for name in ("Skip to scoring", "API", "Metrics", "Bundles", f"Promote {second}"):
            page.keyboard.press("Tab")
            focused = page.locator(":focus")
            expect(focused).to_have_accessible_name(name)
            assert focused.evaluate("node => getComputedStyle(node).outlineStyle") == "solid"
        page.keyboard.press("Enter")
        expect(page.locator("#token")).to_be_focused()
        page.keyboard.type(TOKEN)
        page.keyboard.press("Enter")
        expect(page.locator("#live-id")).to_have_text(second)
        page.locator(".skip").focus()
        page.keyboard.press("Enter")
        for _ in range(2):
            page.keyboard.press("Tab")
        expect(page.get_by_role("button", name="Score")).to_be_focused()
        page.keyboard.press("Enter")
        expect(page.locator("#result")).to_contain_text("ads scored by")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable_in_light_and_in_dark(browser: Browser, place: Place, scheme: str) -> None:
    add_live_bundle(place)
    with (
        serving(settings_of(place)) as client,
        visit(browser, client, color_scheme=scheme) as page,
    ):
        expect(page.locator("#body")).not_to_have_value("")
        page.get_by_role("button", name="Score").click()
        expect(page.locator("#result table")).to_be_visible()
        is_dark = luminance(rgb(page, "body", "backgroundColor")) < 0.5
        assert is_dark == (scheme == "dark")
        for selector in ("h2", "#live-id", "dt", "dd", "figcaption", "th", "td", ".soft"):
            assert contrast(page, selector, "section") >= 4.5, selector
        assert contrast(page, "#state", "body") >= 4.5
        assert contrast(page, "button.main", "button.main") >= 4.5
        assert contrast(page, "#sample", "section") >= 4.5


def test_a_phone_shows_all_of_it_without_scrolling_sideways(browser: Browser, place: Place) -> None:
    bundle_id = add_live_bundle(place)
    refused_copy(place, bundle_id, "a-reason-without-a-single-space" * 4)
    settings = settings_of(place, control_token=TOKEN)
    phone = {"width": 360, "height": 740}
    with serving(settings) as client, visit(browser, client, viewport=phone) as page:
        point_at(place, "x" * 100)
        expect(page.locator("#changes")).to_contain_text("Refused")
        expect(page.locator("#body")).not_to_have_value("")
        page.get_by_role("button", name="Score").click()
        expect(page.locator("#result table")).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        for chart in ("traffic", "latency", "errors"):
            box = page.locator(f"#chart-{chart} svg").bounding_box()
            assert box is not None
            assert 0 <= box["x"] < box["x"] + box["width"] <= 360


def test_the_policy_lets_nothing_in_that_the_service_does_not_serve(
    browser: Browser, place: Place
) -> None:
    add_live_bundle(place)
    with (
        serving(settings_of(place)) as client,
        visit(browser, client, expected=["Content Security Policy"]) as page,
    ):
        policy = client.get("/console").headers["content-security-policy"].split("; ")
        assert "default-src 'none'" in policy
        assert "script-src 'self'" in policy
        assert not any("unsafe" in one or "http" in one for one in policy)
        # The browser really enforces it.
        page.evaluate("""() => {
            const script = document.createElement("script");
            script.textContent = "document.title = 'owned'";
            document.head.append(script);
        }""")
        assert page.title() == "ecdctr console"


def test_the_console_can_be_turned_off(place: Place) -> None:
    add_live_bundle(place)
    with serving(settings_of(place, console=False)) as client:
        for path in ("", "/console.js", "/bundles", "/sample"):
            assert client.get(f"/console{path}").status_code == 404
        assert client.get("/v1/models").status_code == 200
