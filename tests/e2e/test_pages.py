"""The same journey through the pages, in headless Chromium; the screenshots are kept beside the test's other files."""

import json
import os
import re
from pathlib import Path

import pytest

from tests import tiny
from tests.e2e.test_journey import EXPERTS, unlike_pair
from tests.hubs import Hub

pytestmark = pytest.mark.browser


@pytest.fixture
def shots(tmp_path: Path):
    """Where screenshots go: MOERGE_SHOTS names a folder to keep them."""
    folder = Path(os.environ.get("MOERGE_SHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture
def signed_in(page, hub: Hub):
    """A page of the administrator, which fails the test on any error of a script."""
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(f"{hub.url}/login")
    page.get_by_label("Name").fill(hub.username)
    page.get_by_label("Password").fill(hub.password)
    page.get_by_role("button", name="Sign in").click()
    page.wait_for_url(f"{hub.url}/")
    yield page
    assert errors == []


def upload(page, hub: Hub, folder: Path, name: str) -> None:
    page.goto(f"{hub.url}/upload")
    page.locator("#folder").set_input_files(str(folder))
    page.locator("[name=name]").fill(name)
    page.locator("#send").click()


def test_a_newcomer_asks_and_gets_the_expert_without_an_account(page, hub: Hub, shots: Path):
    name = unlike_pair()[0]
    question = json.loads(page.request.get(f"{hub.url}/api/v1/experts/{hub.username}/{name}").text())["examples"][1]
    page.goto(hub.url)
    page.get_by_label("Your question or input").fill(question)
    page.get_by_role("button", name="Find the experts").click()
    first = page.locator("ol.answer li").first
    first.wait_for()
    assert re.search(rf"{hub.username}/(journey-|page-)?{name}", first.inner_text())
    page.screenshot(path=shots / "ask.png", full_page=True)
    first.get_by_role("link").click()
    assert "Example inputs" in page.locator("main").inner_text()
    page.screenshot(path=shots / "expert.png", full_page=True)


def test_the_question_box_works_without_scripts(chromium, hub: Hub):
    context = chromium.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(hub.url)
    page.get_by_label("Your question or input").fill("My card was swallowed by the cash machine")
    page.get_by_role("button", name="Find the experts").click()
    assert page.locator("ol.answer li").count() >= 1
    context.close()


def test_the_router_page_answers_while_one_types_and_keeps_the_question_in_its_address(page, hub: Hub, shots: Path):
    page.goto(f"{hub.url}/router")
    page.get_by_label("What is to be done").press_sequentially("My card was swallowed by the cash machine")
    first = page.locator("table.routed tbody tr").first
    first.wait_for()
    assert f"{hub.username}/banking-support" in first.inner_text()
    page.wait_for_url(re.compile(r"/router\?q=My\+card\+was\+swallowed\+by\+the\+cash\+machine$"))
    page.reload()
    assert f"{hub.username}/banking-support" in first.inner_text()
    page.screenshot(path=shots / "router.png", full_page=True)
    page.get_by_label("Each line is a question of its own").check()
    with page.expect_download() as waiting:
        page.get_by_role("button", name="CSV").click()
    assert f",{hub.username}/banking-support," in Path(waiting.value.path()).read_text()


def test_upload_merge_and_download_through_the_pages(signed_in, hub: Hub, shots: Path, tmp_path: Path):
    page = signed_in
    names = []
    for name in unlike_pair():
        upload(page, hub, EXPERTS / name, f"page-{name}")
        page.wait_for_url(f"{hub.url}/{hub.username}/page-{name}", timeout=60_000)
        page.locator(".badge.ready").first.wait_for(timeout=120_000)
        names.append(f"{hub.username}/page-{name}")
    page.screenshot(path=shots / "uploaded.png", full_page=True)

    page.goto(f"{hub.url}/merge?expert={names[0]}&expert={names[1]}")
    for name, weight in zip(names, ("0.7", "0.3"), strict=True):
        page.get_by_label(f"Weight of {name}").fill(weight)
    page.locator("input[name=method][value=ties]").check()
    page.screenshot(path=shots / "merge-form.png", full_page=True)
    page.get_by_role("button", name="Merge", exact=True).click()
    page.wait_for_url(re.compile(r"/merges/[0-9a-f]+$"))
    page.locator(".badge.ready").first.wait_for(timeout=120_000)
    page.screenshot(path=shots / "merge.png", full_page=True)
    with page.expect_download() as waiting:
        page.get_by_role("link", name="adapter_model.safetensors").click()
    saved = tmp_path / "merged.safetensors"
    waiting.value.save_as(saved)
    from safetensors.numpy import load_file

    assert any(key.endswith(".lora_A.weight") for key in load_file(saved))


def test_files_are_dropped_on_the_page_and_a_bad_one_is_explained(signed_in, hub: Hub, shots: Path):
    page = signed_in
    page.goto(f"{hub.url}/upload")
    files = tiny.adapter()
    config = json.loads(files["adapter_config.json"]) | {"r": 7}
    page.evaluate(
        """([config, weights]) => {
            const data = new DataTransfer();
            data.items.add(new File([config], "adapter_config.json"));
            data.items.add(new File([Uint8Array.from(atob(weights), (sign) => sign.charCodeAt(0))], "adapter_model.safetensors"));
            document.getElementById("drop").dispatchEvent(new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true }));
        }""",
        [json.dumps(config), __import__("base64").b64encode(files["adapter_model.safetensors"]).decode()],
    )
    page.locator("#list li").nth(1).wait_for()
    page.locator("[name=name]").fill("wrong-rank")
    page.locator("#send").click()
    problem = page.locator("#problem .problem")
    problem.wait_for()
    page.screenshot(path=shots / "problem.png", full_page=True)
    told = problem.inner_text()
    assert "met" in told
    assert "wanted" in told
    assert page.request.get(f"{hub.url}/api/v1/experts/{hub.username}/wrong-rank").status == 404


def test_the_own_sha256_of_the_uploader_is_right(page, hub: Hub):
    page.goto(f"{hub.url}/docs")
    for size in (0, 1, 55, 56, 63, 64, 65, 1000, 100_001):
        data = bytes(place * 7 % 251 for place in range(size))
        got = page.evaluate(
            """async ([url, size]) => {
                const { Hash } = await import(url);
                const data = Uint8Array.from({ length: size }, (_, place) => (place * 7) % 251);
                const hash = new Hash();
                hash.update(data.subarray(0, size >> 1)); hash.update(data.subarray(size >> 1));
                return hash.finish();
            }""",
            [f"{hub.url}/static/hub/sha256.js", size],
        )
        assert got == tiny.sha256(data), size


def test_signing_out_and_making_a_key(signed_in, hub: Hub):
    page = signed_in
    page.goto(f"{hub.url}/settings")
    page.get_by_label("Name of a new key").fill("from the page")
    page.get_by_role("button", name="Make the key").click()
    secret = page.locator("#secret").inner_text()
    answer = page.request.get(f"{hub.url}/api/whoami-v2", headers={"Authorization": f"Bearer {secret}"})
    assert answer.json()["name"] == hub.username
    page.reload()
    assert page.locator("#secret").count() == 0
    page.get_by_role("button", name="Sign out").click()
    page.goto(f"{hub.url}/upload")
    assert "/login" in page.url


def sizes_agree(page, hub: Hub) -> int:
    """Every dot of the chart has the bytes that one of the downloads has; how many there are."""
    dots = sorted(int(dot.get_attribute("data-bytes")) for dot in page.locator("#compressed circle").all())
    addresses = [link.get_attribute("href") for link in page.locator("#compressed table a").all()]
    lengths = [int(page.request.head(f"{hub.url}{address}").headers["content-length"]) for address in addresses]
    assert dots == sorted(lengths)
    return len(dots)


def test_the_page_draws_sizes_against_density_and_has_another_one_made(page, hub: Hub, shots: Path):
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(f"{hub.url}/{hub.username}/{unlike_pair()[0]}")
    before = sizes_agree(page, hub)
    assert before >= 1
    row = page.locator("#compressed tbody tr", has_text="30 %")
    row.get_by_role("button").click()
    row.get_by_role("link", name="Download").wait_for(timeout=60_000)
    assert sizes_agree(page, hub) == before + 1
    assert "Shannon bound" in page.locator("#compressed svg").text_content()
    assert page.get_by_role("img", name="Size of the compressed file").count() == 1
    page.locator("#compressed").screenshot(path=shots / "compressed.png")
    page.set_viewport_size({"width": 390, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.locator("#compressed").screenshot(path=shots / "compressed-phone.png")
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        assert page.evaluate(CONTRAST) >= 4.5, scheme
    page.locator("#compressed").screenshot(path=shots / "compressed-dark.png")
    assert errors == []


# The least contrast (WCAG 2.2) of a text of the chart on the page's ground.
CONTRAST = """() => {
  const light = (colour) => {
    const [r, g, b] = colour.match(/[\\d.]+/g).slice(0, 3).map(Number).map((c) => c / 255)
      .map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = light(getComputedStyle(document.documentElement).backgroundColor);
  return Math.min(...[...document.querySelectorAll(".chart text")].map((text) => {
    const ink = light(getComputedStyle(text).fill);
    return (Math.max(ink, ground) + 0.05) / (Math.min(ink, ground) + 0.05);
  }));
}"""


def test_a_form_is_asked_for_and_looked_for_again_without_scripts(chromium, hub: Hub):
    context = chromium.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(f"{hub.url}/{hub.username}/{unlike_pair()[1]}")
    row = page.locator("#compressed tbody tr", has_text="30 %")
    row.get_by_role("button").click()
    for _ in range(60):
        if row.get_by_role("link", name="Download").count():
            break
        row.get_by_role("button", name="Look again").click()
        page.wait_for_timeout(500)
    assert row.get_by_role("link", name="Download").count() == 1
    assert page.url.endswith(("#compressed", "?#compressed"))
    context.close()
