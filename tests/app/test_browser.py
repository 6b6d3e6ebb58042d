"""The page in a real browser: Chromium found on PATH or Playwright's own, driven by Playwright.

Skipped, with the reason printed, where there is none; with CI=true in the environment that is a failure.
Screenshots go to the folder named by DIFFUSERS_GUIDANCE_SCREENSHOTS, and then the bundled models make the pictures.
Without it there are none, and small models in their place make noise, which is fast.
"""

import importlib.util
import json
import os
import re
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import parse_qsl, urlsplit

import pytest
from PIL import Image

from diffusers_guidance import samples

SCREENSHOTS = os.environ.get("DIFFUSERS_GUIDANCE_SCREENSHOTS")
PATIENCE = 240_000
"""Milliseconds to wait for what the page does; a limit for what hangs, not a measure."""
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip


def absent(reason):
    """Skips all of this file, or fails it where a browser is required."""
    if os.environ.get("CI") == "true":
        raise RuntimeError(f"no browser tests: {reason}")
    pytest.skip(reason, allow_module_level=True)


for package in ("gradio", "playwright"):
    if importlib.util.find_spec(package) is None:
        absent(f"the package {package} is not installed")

from playwright.sync_api import expect, sync_playwright  # noqa: E402

from diffusers_guidance.pipelines.app import work as app_work  # noqa: E402
from diffusers_guidance.pipelines.app.page import _open_others  # noqa: E402
from diffusers_guidance.pipelines.app.settings import BUNDLED, PRESETS, SCALES, SHOWN, Generation  # noqa: E402
from diffusers_guidance.pipelines.app.suited import suited  # noqa: E402

pytestmark = pytest.mark.slow

expect.set_options(timeout=PATIENCE)


def find_chromium(playwright):
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    found = next(filter(None, map(shutil.which, names)), playwright.chromium.executable_path)
    if not Path(found).exists():
        absent("no Chromium, neither on PATH nor Playwright's own")
    return found


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium(playwright), args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def served(small_models, tmp_path_factory):
    """A server that is up for all tests here, and opens with a picture of the first model only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("outputs")))
        patch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
        if not SCREENSHOTS:
            patch.setattr(samples, "MODEL", small_models)
        from diffusers_guidance.pipelines.app import page as app_page

        given = []
        patch.setattr(app_page, "_open_others", lambda *later: given.append(later))
        page, studio = app_page.launch()
        yield SimpleNamespace(address=page.local_url, studio=studio, openings=given[0][1])
        page.close()


@pytest.fixture
def address(served):
    return served.address


@pytest.fixture(scope="module")
def windows():
    """The pages that visits use one after another, by kind: what the browser has read and compiled for one stays."""
    return SimpleNamespace(free={}, wrong=[])


@pytest.fixture
def visit(browser, windows, address):
    """Opens the page for one more user; at the end, no visit may have met an error or another host."""
    wrong, taken = windows.wrong, []

    def open_window(kind):
        page = browser.new_context(**kind).new_page()
        page.set_default_timeout(PATIENCE)
        page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda request: None if is_local(request.url, address) else wrong.append(request.url))
        return page

    def open_page(width=1280, height=1000, color_scheme="light", **kind):
        free = windows.free.setdefault(tuple(kind), [])
        page = free.pop() if free else open_window(kind)
        taken.append((free, page))
        page.set_viewport_size({"width": width, "height": height})
        page.emulate_media(color_scheme=color_scheme)
        page.goto(address)
        expect(page.get_by_role("button", name="Generate")).to_be_visible()
        return page

    yield open_page
    open_still = [(free, page) for free, page in taken if not page.is_closed()]
    for _, page in open_still:
        page.evaluate("localStorage.clear(), sessionStorage.clear()")
        page.context.clear_cookies()
    seen = [*wrong]
    for free, page in open_still:
        page.goto("about:blank")  # breaks off what runs for this visit, which is no error
        free.append(page)
    wrong.clear()
    assert not seen


@pytest.fixture
def gate(monkeypatch):
    """Every run waits at its first step until this event is set."""
    opened, take = threading.Event(), app_work._take

    def held(pipe, asked, name, rule, policy, tell, *observers):
        tell(name, 0, asked.steps)
        opened.wait(PATIENCE / 1000)
        return take(pipe, asked, name, rule, policy, tell, *observers)

    monkeypatch.setattr(app_work, "_take", held)
    yield opened
    opened.set()


def is_local(url, address):
    return url.startswith((address, "data:", "blob:"))


def shoot(page, name, full=True):
    if SCREENSHOTS:
        page.screenshot(path=Path(SCREENSHOTS, f"{name}.png"), full_page=full, animations="disabled")


def tab(page, name):
    """Goes to a tab and returns what is in it."""
    page.get_by_role("tab", name=name).click()
    return page.get_by_role("tabpanel").filter(visible=True)


def open_up(scope, title):
    """Unfolds what is folded away, or folds it again."""
    scope.get_by_role("button", name=re.compile(f"^{title}")).filter(visible=True).click()


def set_number(scope, label, value):
    """Types into the number beside a slider, and again if what has just unfolded put its default back."""
    box = scope.get_by_role("spinbutton", name=re.compile(f"{label}"))
    for _ in range(50):
        box.fill(str(value))
        box.press("Tab")
        box.page.wait_for_timeout(100)
        if box.input_value() == str(value):
            return
    pytest.fail(f"{label} stays {box.input_value()}")


def settings(page, steps):
    open_up(page, "Picture")
    set_number(page, "Steps", steps)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_opens_with_a_picture(visit, scheme):
    page = visit(color_scheme=scheme)
    expect(page.locator(".dg-pair img")).to_have_count(2)
    expect(page.locator(".dg-shots img")).to_have_count(4)
    expect(page.locator(".dg-numbers")).to_contain_text("plain CFG: 40")
    expect(page.locator(".dg-steps b")).to_have_count(20)
    shoot(page, f"open-{scheme}")


def test_the_examples_at_the_top_lead_to_the_presets_that_make_them(visit, served):
    page = visit()
    for number, (name, made) in enumerate(zip(SHOWN, served.openings[BUNDLED], strict=True)):
        page.locator(".dg-head a").nth(number).click()
        expect(page.locator("#status")).to_contain_text("press Generate")
        expect(page.get_by_role("radio", name=name, exact=True)).to_be_checked()
        taken = Generation.read(dict(parse_qsl(urlsplit(page.url).query, keep_blank_values=True)))
        for each in (taken, made.settings):
            assert each.but(**PRESETS[name].settings()).values() == each.values()
        assert (taken.prompt, taken.seed) == (made.settings.prompt, made.settings.seed)


def test_generate(visit):
    page = visit()
    settings(page, 20)
    page.get_by_label("Prompt", exact=True).fill("a guitar, 3d style")
    page.get_by_role("button", name="Generate").click()
    expect(page.locator(".dg-progress progress")).to_be_visible()
    expect(page.locator('.dg-pair img[alt$="as it forms"]')).to_be_visible()
    expect(page.locator(".dg-numbers")).to_be_hidden()  # they are another picture's
    shoot(page, "generate-running", full=False)
    expect(page.locator("#status")).to_contain_text("Seed 0")
    expect(page.locator(".dg-numbers")).to_contain_text("plain CFG: 40")
    open_up(page, "Code that makes")
    expect(page.locator(".cm-content")).to_contain_text("a guitar, 3d style")
    shoot(page, "generate")


def test_a_batch_and_its_pictures(visit):
    page = visit()
    settings(page, 4)
    set_number(page, "Pictures", 4)
    page.get_by_role("radio", name="High scale without burn", exact=True).check()
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#status")).to_contain_text("APG + AdaptiveGuidance · scale 15 · 4 steps")
    expect(page.locator("#status")).to_contain_text("Seeds 0 to 3")
    thumbnails = page.locator(".dg-thumbs button")
    before = page.locator(".dg-pair img").last.get_attribute("src")
    thumbnails.nth(2).click()
    expect(thumbnails.nth(2)).to_have_attribute("aria-pressed", "true")
    assert page.locator(".dg-pair img").last.get_attribute("src") != before
    with page.expect_download() as download:
        page.get_by_role("link", name="Save the picture").click()
    assert download.value.suggested_filename == "a-hamburger-3d-style-seed2.png"
    shoot(page, "batch")


def test_presets_and_their_knobs(visit):
    page = visit()
    expect(page.get_by_role("radio", name="Same picture, less time", exact=True)).to_be_checked()
    page.get_by_role("radio", name="High scale without burn", exact=True).check()
    open_up(page, "Rule and policy")
    expect(page.get_by_role("spinbutton", name=re.compile("Momentum"))).to_be_visible()
    expect(page.get_by_role("spinbutton", name=re.compile("Norm threshold"))).to_have_value("6")
    expect(page.get_by_role("spinbutton", name=re.compile("Guidance scale"))).to_have_value("15")
    page.get_by_role("radio", name="Half the time", exact=True).check()
    expect(page.get_by_role("spinbutton", name=re.compile("Guidance scale"))).to_have_value("5")
    set_number(page, "Save", 0.25)
    expect(page.get_by_role("radio", name="Same picture, less time", exact=True)).to_be_checked()
    expect(page.get_by_role("spinbutton", name=re.compile("Momentum"))).to_be_hidden()
    expect(page.get_by_role("spinbutton", name=re.compile("Rescale"))).to_be_visible()
    expect(page.get_by_role("spinbutton", name=re.compile("Save"))).to_be_visible()
    page.get_by_label("Policy", exact=True).click()
    page.get_by_role("option", name="AdaptiveGuidance").click()
    expect(page.get_by_role("spinbutton", name=re.compile("Threshold", re.IGNORECASE)).last).to_be_visible()
    expect(page.get_by_role("radio", name="Same picture, less time", exact=True)).not_to_be_checked()
    shoot(page, "knobs")


def test_compare(visit, tmp_path):
    page = visit()
    panel = tab(page, "Compare")
    expect(panel.get_by_text("5 pictures of one prompt and one seed to make")).to_be_visible()
    panel.get_by_role("checkbox", name="AdaptiveGuidance").uncheck()
    expect(panel.locator(".dg-empty")).to_have_count(4)
    for scale in SCALES[-6:]:
        panel.get_by_role("checkbox", name=f"{scale:g}", exact=True).check()
    expect(panel.get_by_text("a grid of 28 pictures: at most 24")).to_be_visible()
    expect(panel.locator(".dg-empty")).to_have_count(0)
    for scale in SCALES[-6:]:
        panel.get_by_role("checkbox", name=f"{scale:g}", exact=True).uncheck()
    expect(panel.locator(".dg-empty")).to_have_count(4)
    open_up(panel, "Picture")
    set_number(panel, "Steps", 8)
    panel.get_by_role("button", name="Compare").click()
    expect(panel.get_by_text("4 pictures, seed 0")).to_be_visible()
    expect(panel.locator(".dg-grid img")).to_have_count(4)
    expect(panel.locator(".dg-grid figcaption b").first).to_have_text("plain CFG")
    panel.locator(".dg-zoom").first.press("Enter")
    expect(page.get_by_role("dialog").locator("img")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_have_count(0)
    expect(panel.locator(".dg-grid figcaption").last).to_contain_text("NFEs")
    shoot(page, "compare")
    for kind in ("PNG", "JSON"):
        with page.expect_download() as download:
            panel.get_by_role("button", name=f"Download {kind}").click()
        download.value.save_as(tmp_path / kind)
    assert Image.open(tmp_path / "PNG").width > 400
    assert len(json.loads((tmp_path / "JSON").read_text())["columns"]) == 4
    set_number(panel, "Steps", 50)
    panel.get_by_role("button", name="Compare").click()
    expect(panel.locator(".dg-progress progress")).to_be_visible()
    panel.get_by_role("button", name="Cancel").click()
    expect(panel.get_by_text("Cancelled.")).to_be_visible()
    expect(panel.get_by_role("button", name="Download")).to_have_count(0)  # they would be of the grid before


def test_cancel_with_nothing_running_changes_nothing_and_a_grid_keeps_its_height_as_it_fills(visit):
    page = visit()
    page.get_by_role("button", name="Cancel").first.click()
    panel = tab(page, "Compare")
    panel.get_by_role("button", name="Cancel").click()
    page.wait_for_timeout(1000)
    expect(panel.get_by_text("5 pictures of one prompt and one seed to make")).to_be_visible()
    tab(page, "Generate")
    expect(page.locator("#status")).to_contain_text("Seed 0 · CFG + Forecast")
    panel = tab(page, "Compare")
    open_up(panel, "Picture")
    set_number(panel, "Steps", 5)
    panel.get_by_role("button", name="Compare").click()
    before = panel.locator(".dg-grid").bounding_box()["height"]
    expect(panel.get_by_text("5 pictures, seed 0")).to_be_visible()
    assert panel.locator(".dg-grid").bounding_box()["height"] == pytest.approx(before, abs=2)


def test_benchmark_and_its_cancellation(visit):
    page = visit()
    panel = tab(page, "Benchmark")
    set_number(panel, "Prompts", 1)
    panel.get_by_role("button", name="Run benchmark").click()
    expect(panel.locator(".dg-table tbody tr").first).to_be_visible()
    panel.get_by_role("button", name="Cancel").click()
    expect(panel.get_by_text("Cancelled.")).to_be_visible()
    shoot(page, "benchmark-cancelled")
    set_number(panel, "Steps", 4)
    panel.get_by_role("button", name="Run benchmark").click()
    expect(panel.get_by_text("averaged over 1 prompt")).to_be_visible()
    shoot(page, "benchmark")
    for width in (800, 390):
        page.set_viewport_size({"width": width, "height": 900})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        # Names break between their words, and the last column is not cut off.
        assert max(row.bounding_box()["height"] for row in panel.locator(".dg-table tr").all()) < 100
        assert panel.locator(".dg-scroll").evaluate("box => box.scrollWidth <= box.clientWidth")
    shoot(page, "phone-benchmark-made")


def test_cancel_and_go_on(visit):
    page = visit()
    settings(page, 100)
    set_number(page, "Pictures", 8)
    page.get_by_role("button", name="Generate").click()
    expect(page.locator(".dg-progress progress")).to_be_visible()
    page.get_by_role("button", name="Cancel").first.click()
    expect(page.locator("#status")).to_contain_text("Cancelled.")
    expect(page.locator(".dg-pair img").first).to_be_visible()
    shoot(page, "cancelled", full=False)
    set_number(page, "Pictures", 1)
    set_number(page, "Steps", 3)
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#status")).to_contain_text("Seed 0")
    expect(page.locator(".dg-numbers")).to_contain_text("plain CFG: 6")


def test_wrong_input_is_answered_in_a_sentence(visit):
    page = visit()
    page.get_by_label("Prompt", exact=True).fill("")
    page.get_by_role("button", name="Generate").click()
    sentence = "The prompt is empty: say what the picture should show."
    expect(page.get_by_text(sentence).first).to_be_visible()
    expect(page.locator("#status")).to_contain_text(sentence)
    shoot(page, "wrong-input", full=False)
    page.get_by_label("Prompt", exact=True).fill("x" * 600)
    assert len(page.get_by_label("Prompt", exact=True).input_value()) == 500


def test_two_users_at_once(visit, gate):
    first, second = visit(), visit()
    for page, prompt, steps, pictures in ((first, "a tiger", 2, 8), (second, "a rocket", 4, 1)):
        page.get_by_label("Prompt", exact=True).fill(prompt)
        settings(page, steps)
        set_number(page, "Pictures", pictures)
    for page in (first, second):
        page.get_by_role("button", name="Generate").click()
        if page is first:
            expect(page.locator(".dg-progress progress")).to_be_visible()
    expect(second.get_by_text(re.compile(r"queue: *1/1"))).to_be_visible()
    shoot(second, "queued", full=False)
    gate.set()
    expect(first.locator("#status")).to_contain_text("Seeds 0 to 7")
    expect(second.locator(".dg-numbers")).to_contain_text("plain CFG: 8")


def test_leaving_frees_the_device(visit):
    leaving = visit()
    settings(leaving, 100)
    set_number(leaving, "Pictures", 8)
    leaving.get_by_role("button", name="Generate").click()
    expect(leaving.locator(".dg-progress progress")).to_be_visible()
    leaving.close()
    page = visit()
    settings(page, 3)
    page.get_by_role("button", name="Generate").click()
    expect(page.locator(".dg-numbers")).to_contain_text("plain CFG: 6")


SCROLLING = """() => [...document.querySelectorAll("body *")].filter((each) => each.offsetParent
    && /auto|scroll/.test(getComputedStyle(each).overflowX) && each.scrollWidth > each.clientWidth + 1
    ).map((each) => each.className)"""
"""The parts of the page that scroll sideways."""


def test_phone(visit):
    page = visit(width=390, height=844, has_touch=True, is_mobile=True)
    settings(page, 4)
    open_up(page, "Picture")
    open_up(page, "Picture")
    for side in page.locator("#Generation-width input, #Generation-height input").all():
        assert side.evaluate("box => box.scrollWidth <= box.clientWidth")  # nothing is cut off
    open_up(page, "Picture")
    page.get_by_role("button", name="Generate").tap()
    expect(page.locator(".dg-numbers")).to_contain_text("plain CFG: 8")
    expect(page.locator("#status")).to_be_in_viewport()
    for name in ("Compare", "Benchmark", "Generate"):
        panel = tab(page, name)
        if name == "Compare":
            panel.get_by_role("button", name="Picture").click()
            set_number(panel, "Steps", 1)
            panel.get_by_role("button", name="Compare").click()
            expect(panel.get_by_text("5 pictures, seed 0")).to_be_visible()
        shoot(page, f"phone-{name.lower()}")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert not page.evaluate(SCROLLING)


def test_by_keyboard(visit):
    page = visit()
    settings(page, 3)
    prompt = page.get_by_label("Prompt", exact=True)
    prompt.focus()
    prompt.fill("a rocket")
    page.keyboard.press("Enter")
    expect(page.locator(".dg-numbers")).to_contain_text("plain CFG: 6")
    set_number(page, "Steps", 100)  # long enough to be seen running
    prompt.focus()
    page.keyboard.press("Tab")
    for _ in range(60):  # by Tab alone to the button that starts
        if page.evaluate("document.activeElement.textContent.trim()") == "Generate":
            break
        page.keyboard.press("Tab")
    else:
        pytest.fail("Tab does not reach the button")
    page.keyboard.press("Enter")
    expect(page.locator(".dg-progress progress")).to_be_visible()


def test_a_list_closes_when_tab_leaves_it_and_arrows_move_within_presets_and_pictures(visit):
    page = visit()
    page.get_by_label("Model", exact=True).focus()
    expect(page.get_by_role("option").filter(visible=True).first).to_be_visible()
    page.keyboard.press("Tab")
    page.wait_for_timeout(1000)
    expect(page.get_by_role("option").filter(visible=True)).to_have_count(0)
    page.get_by_role("radio", name="Same picture, less time").focus()
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("radio", name="Half the time")).to_be_checked()
    line = page.locator(".dg-pair input")
    line.focus()
    before = line.input_value()
    page.keyboard.press("ArrowRight")
    assert line.input_value() != before
    assert f"--cut: {line.input_value()}%" in page.locator(".dg-pair").get_attribute("style")


def test_history_and_two_beside_each_other(visit):
    page = visit()
    settings(page, 2)
    page.get_by_label("Prompt", exact=True).fill("a rocket, noto style")
    page.get_by_role("radio", name="High scale without burn", exact=True).check()
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#status")).to_contain_text("scale 15 · 2 steps")
    page.get_by_role("button", name="Keep this one on the left").click()
    expect(page.get_by_role("button", name="Put plain CFG back on the left")).to_be_visible()
    page.locator("#history button").first.click()
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("a hamburger, 3d style")
    expect(page.get_by_role("radio", name="Same picture, less time", exact=True)).to_be_checked()
    expect(page.locator(".dg-pair span").first).to_contain_text("kept: APG + AG")
    expect(page.locator("#status")).to_contain_text("20 steps")
    shoot(page, "history")


@pytest.mark.skipif(len(samples.models()) < 2, reason="there is one bundled model here")
def test_the_page_follows_the_model_chosen_at_the_top(visit, address):
    first, second = [*samples.models()][:2]
    page = visit()
    model = page.get_by_label("Model", exact=True).filter(visible=True)
    expect(model).to_have_value(first)
    page.get_by_role("radio", name="High scale without burn", exact=True).check()
    model.click()
    page.get_by_role("option", name=second, exact=True).click()
    scale = page.get_by_role("spinbutton", name=re.compile("Guidance scale")).filter(visible=True)
    expect(scale).to_have_value(f"{suited(second).high:g}")
    expect(page.get_by_role("radio", name="High scale without burn", exact=True)).to_be_checked()
    page.get_by_role("radio", name="Half the time", exact=True).check()
    expect(scale).to_have_value(f"{suited(second).scale:g}")
    open_up(page, "Picture")
    set_number(page, "Steps", 4)
    page.get_by_role("button", name="Generate").click()
    expect(page.locator(".dg-numbers")).to_contain_text("plain CFG: 8")
    shoot(page, "second-model")
    page.get_by_label("Scheduler", exact=True).filter(visible=True).click()
    expect(page.get_by_role("option").filter(visible=True)).to_have_count(1)
    page.keyboard.press("Escape")
    href = page.get_by_role("link", name="link", exact=True).get_attribute("href")
    assert f"model={second}" in href
    page.locator("#history button").first.click()  # made with the first model
    expect(model).to_have_value(first)
    page.locator("#history button").nth(1).click()
    expect(model).to_have_value(second)
    tab(page, "Compare")
    expect(page.get_by_label("Model", exact=True).filter(visible=True)).to_have_value(second)
    page.goto(address + href)
    expect(page.locator("#status")).to_contain_text("The settings of the link are in")
    expect(page.get_by_label("Model", exact=True).filter(visible=True)).to_have_value(second)
    small = visit(width=390, height=844, has_touch=True, is_mobile=True)
    shoot(small, "phone-two-models")
    assert small.evaluate("document.documentElement.scrollWidth") <= 390


def test_a_link_and_a_picture_carry_the_settings(visit, address, tmp_path):
    page = visit()
    settings(page, 2)
    page.get_by_label("Prompt", exact=True).fill("a pizza & more")
    page.get_by_role("radio", name="Half the time", exact=True).check()
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#status")).to_contain_text("2 steps")
    href = page.get_by_role("link", name="link", exact=True).get_attribute("href")
    with page.expect_download() as download:
        page.get_by_role("link", name="Save the picture").click()
    download.value.save_as(tmp_path / "picture.png")

    def restored():
        expect(page.get_by_label("Prompt", exact=True)).to_have_value("a pizza & more")
        expect(page.get_by_role("radio", name="Half the time", exact=True)).to_be_checked()
        expect(page.locator("#status")).to_contain_text("press Generate")

    page.goto(address + href)
    restored()
    page.goto(address)
    open_up(page, "Picture")
    page.locator(".dg-restore input").set_input_files(tmp_path / "picture.png")
    restored()
    page.goto(address + "?steps=1000")
    expect(page.locator("#status")).to_contain_text("a whole number from 1 to 100")


@pytest.mark.skipif(len(samples.models()) < 2, reason="there is one bundled model here")
def test_the_opening_is_of_the_chosen_model_or_has_no_pictures(visit, served):
    first, second = [*samples.models()][:2]
    page, shots = visit(), {}

    def choose(name):
        page.get_by_label("Model", exact=True).filter(visible=True).click()
        page.get_by_role("option", name=name, exact=True).click()

    def shown():
        return [each.get_attribute("src") for each in page.locator(".dg-shots img").all()]

    shots[first] = shown()
    choose(second)
    expect(page.locator(".dg-shots img")).to_have_count(0)
    expect(page.locator("#status")).to_contain_text(f"are by {first}: press Generate for one by {second}.")
    choose(first)
    expect(page.locator(".dg-shots img")).to_have_count(4)
    expect(page.locator("#status")).to_contain_text("Seed 0 · CFG + Forecast")
    choose(second)
    expect(page.locator(".dg-shots img")).to_have_count(0)
    _open_others(served.studio, served.openings)
    assert [*served.openings] == [*samples.models()]
    # They appear without another choice.
    expect(page.locator(".dg-head")).to_contain_text(f"By the model {second},")
    expect(page.locator(".dg-head")).to_contain_text(suited(second).alone)
    expect(page.locator(".dg-shots img")).to_have_count(4)
    shots[second] = shown()
    assert not {*shots[first]} & {*shots[second]}
    page.goto(f"{served.address}?model={second}")
    expect(page.locator(".dg-head")).to_contain_text(f"By the model {second},")
    shoot(page, "opening-second-model")


NAMELESS = """() => [...document.querySelectorAll('input, textarea, select, button, [role=slider], img')]
    .filter(e => e.checkVisibility() && !(e.labels && e.labels.length && e.labels[0].textContent.trim())
        && !e.getAttribute('aria-label') && !e.getAttribute('aria-labelledby') && !e.title && e.alt == null
        && !e.textContent.trim())
    .map(e => e.outerHTML.slice(0, 200))"""


def test_everything_has_a_label(visit):
    page = visit()
    for accordion in page.get_by_role("button", name=re.compile("^(Picture|Rule and policy|Code)")).all():
        if accordion.is_visible():
            accordion.click()
    assert page.evaluate(NAMELESS) == []
    for name in ("Compare", "Benchmark"):
        tab(page, name)
        assert page.evaluate(NAMELESS) == []
