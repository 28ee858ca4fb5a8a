"""The section of compressed forms on an expert's page: what it shows, to whom, and what its buttons do."""

import re

import pytest
from django.test import Client

from registry import jobs
from registry.models import Encoded, Job, Revision
from tests import factories, tiny
from tests.integration import forms, hf

pytestmark = pytest.mark.django_db


@pytest.fixture
def ann():
    return factories.user("ann")


@pytest.fixture
def made(ann) -> Revision:
    return forms.published(ann)


def section(client: Client, address: str = "/ann/tea/compressed") -> str:
    answer = client.get(address)
    assert answer.status_code == 200
    return answer.content.decode()


def rows(text: str) -> dict[str, str]:
    """The rows of the table by density and preset."""
    found = {}
    for row in re.findall(r"<tr[^>]*>(.*?)</tr>", text, re.DOTALL)[1:]:
        cells = [" ".join(re.sub(r"<[^>]+>", " ", cell).split()) for cell in re.findall(r"<td.*?</td>", row, re.DOTALL)]
        found[f"{cells[0]} {cells[1]}"] = row
    return found


def test_the_chart_has_a_dot_for_each_file_with_the_bytes_of_its_download(made, client) -> None:
    for density in ("0.05", "0.5"):
        forms.carried_out(hf.Caller().get(f"/api/v1/experts/ann/tea/compressed?density={density}").json()["job"])
    page = client.get("/ann/tea").content.decode()
    dots = sorted(int(size) for size in re.findall(r'data-bytes="(\d+)"', page))
    sizes = [
        int(hf.Caller().head(f"/api/v1/experts/ann/tea/compressed?density={k}")["Content-Length"])
        for k in (0.05, 0.2, 0.5)
    ]
    assert dots == sizes
    for part in (
        'role="img"',
        "<title id=",
        "<desc id=",
        "Shannon bound",
        "share of values kept (density)",
        "file size, ",
    ):
        assert part in page
    assert "<script" not in page.partition('<section id="compressed">')[2].partition("</section>")[0]
    assert "style=" not in page


def test_the_table_has_a_row_for_each_standard_density_and_a_link_or_a_button_in_it(made, client) -> None:
    table = rows(section(client))
    assert list(table) == [
        "all original",
        "5 % default",
        "10 % default",
        "20 % default own",
        "30 % default",
        "50 % default",
    ]
    for name, row in table.items():
        assert ("Make it" in row) == (name in {"5 % default", "10 % default", "30 % default", "50 % default"}), name
    own = Encoded.objects.get()
    assert f'title="{own.blob.size_bytes} bytes"' in table["20 % default own"]
    address = re.search(r'href="(/api[^"]+)"', table["20 % default own"])
    assert address is not None
    assert tiny.sha256(hf.Caller().get(address[1].replace("&amp;", "&")).body) == own.blob_id


def test_the_button_has_the_form_made_for_a_reader_without_account_or_scripts(made, client) -> None:
    answer = client.post("/ann/tea/compressed", {"preset": "default", "density": "0.1", "revision": made.commit})
    assert (answer.status_code, answer["Location"]) == (302, "/ann/tea#compressed")
    job = Job.objects.get(after=None, kind="compress")
    assert (job.revision, job.parameters["density"], job.requested_by) == (made, 0.1, None)
    text = section(client)
    assert 'hx-get="/ann/tea/compressed?revision=' in text
    assert "Queued" in rows(text)["10 % default"]
    assert "Look again" in rows(text)["10 % default"]
    client.post("/ann/tea/compressed", {"preset": "default", "density": "0.1"})
    assert Job.objects.filter(after=None, kind="compress").count() == 1
    forms.carried_out(job.pk)
    text = section(client)
    assert "hx-get" not in text
    assert "Download" in rows(text)["10 % default"]


def test_a_job_that_failed_shows_its_reason_in_its_row(made, client) -> None:
    client.post("/ann/tea/compressed", {"density": "0.1"})
    lease = jobs.claim(Job.objects.get(after=None, kind="compress").pk)
    assert lease is not None
    jobs.fail(lease, {"detail": "The weights <b>changed</b>."})
    row = rows(section(client))["10 % default"]
    assert "The weights &lt;b&gt;changed&lt;/b&gt;." in row
    assert "Failed" in row
    assert client.post("/ann/tea/compressed", {"density": "0.1"}).status_code == 409


def test_other_forms_are_offered_to_writers_and_made_for_nobody_else(made, ann, client) -> None:
    assert "Another form" not in section(client)
    for browser, status in ((client, 403), (Client(), 403)):
        if browser is not client:
            browser.force_login(factories.user("rob"))
            assert "Another form" not in section(browser)
        assert browser.post("/ann/tea/compressed", {"preset": "paper", "density": "0.1"}).status_code == status
        assert browser.post("/ann/tea/compressed", {"density": "0.15"}).status_code == status
    assert Job.objects.filter(after=None, kind="compress").count() == 0
    owner = Client()
    owner.force_login(ann)
    assert "Another form" in section(owner)
    assert owner.post("/ann/tea/compressed", {"preset": "int4", "density": ""}).status_code == 302
    assert owner.post("/ann/tea/compressed", {"preset": "paper", "density": "0.1"}).status_code == 302
    assert owner.post("/ann/tea/compressed", {"preset": "default", "density": "7"}).status_code == 422
    for job in Job.objects.filter(after=None, kind="compress"):
        assert forms.carried_out(job.pk).state == Job.State.DONE
    text = section(client)
    assert {"all int4", "10 % paper"} <= set(rows(text))
    assert "erased" in text  # the warning of preset paper
    assert len(re.findall("data-bytes", text)) == 2  # int4 keeps all values, so it has no place on the axis


def test_a_form_without_the_csrf_token_asks_for_nothing(made) -> None:
    browser = Client(enforce_csrf_checks=True)
    assert browser.post("/ann/tea/compressed", {"density": "0.1"}).status_code == 403
    assert Job.objects.filter(after=None, kind="compress").count() == 0


def test_the_section_of_a_private_expert_is_hidden(ann, client) -> None:
    forms.published(ann, "secret", private=True)
    assert client.get("/ann/secret/compressed").status_code == 404
    assert client.post("/ann/secret/compressed", {"density": "0.1"}).status_code == 404
    assert Job.objects.filter(after=None, kind="compress").count() == 0
    owner = Client()
    owner.force_login(ann)
    assert "5 %" in section(owner, "/ann/secret/compressed")


def test_the_page_of_an_older_revision_shows_and_makes_its_own_forms(made, ann, client) -> None:
    other = tiny.lora(seed=4, rank=8, alpha=16, modules=(tiny.QUERY, tiny.VALUE))
    newer = factories.revision(ann, made.expert, other)
    answer = client.post("/ann/tea/compressed", {"density": "0.1", "revision": made.commit})
    assert answer["Location"] == f"/ann/tea/tree/{made.commit}#compressed"
    assert Job.objects.get(after=None, kind="compress").revision == made
    assert "Queued" in rows(section(client, f"/ann/tea/compressed?revision={made.commit}"))["10 % default"]
    assert "Make it" in rows(section(client))["10 % default"]
    assert newer.commit in section(client)


def test_while_the_revision_is_processed_its_own_form_is_shown_as_under_way(ann, client) -> None:
    factories.revision(ann, factories.expert(ann, "tea"), forms.FILES)
    text = section(client)
    assert "Queued" in rows(text)["20 % default"]
    assert "<svg" not in text


def test_an_adapter_with_nothing_to_compress_says_so_instead(ann, client) -> None:
    made = factories.revision(ann, factories.expert(ann, "tiny"), tiny.lora(rank=1))
    forms.own(made)
    text = section(client, "/ann/tiny/compressed")
    assert "large enough" in text
    assert "Make it" not in text
    factories.revision(ann, factories.expert(ann, "half"), {"README.md": tiny.card()})
    assert (
        "compressed"
        not in client.get("/ann/half").content.decode().lower().partition("<footer")[0].partition("<main")[2]
    )


def test_snippets_name_the_command_and_the_revision_of_the_reconstruction(made, client) -> None:
    page = client.get("/ann/tea").content.decode()
    assert "moerge pull ann/tea" in page
    assert "--compressed --density 0.1" in page
    assert "revision=&quot;compeft-k10&quot;" in page or 'revision="compeft-k10"' in page


def test_accuracy_stands_in_the_row_of_its_form(ann, client) -> None:
    made = forms.published(ann)
    made.evaluations.create(source="card", dataset="Teas", metric="accuracy", value=0.9125)
    made.evaluations.create(
        source="card", dataset="Teas", metric="accuracy", value=0.8765, preset="default", density=0.2
    )
    made.evaluations.create(
        source="card", dataset="Other", metric="accuracy", value=0.1111, preset="default", density=0.2
    )
    table = rows(section(client))
    assert "0.9125" in table["all original"]
    assert "0.8765" in table["20 % default own"]
    assert "0.1111" not in section(client)
    evaluation = client.get("/ann/tea").content.decode().partition("<h2>Evaluation</h2>")[2].partition("</section>")[0]
    assert "original" in evaluation
    assert "default 20 %" in evaluation


def test_the_upload_page_offers_density_and_preset(ann) -> None:
    browser = Client()
    browser.force_login(ann)
    page = browser.get("/upload").content.decode()
    for density in ("0.05", "0.1", "0.2", "0.3", "0.5"):
        assert f'<option value="{density}">' in page
    for preset in ("paper", "hq", "int4"):
        assert f'<option value="{preset}">' in page
