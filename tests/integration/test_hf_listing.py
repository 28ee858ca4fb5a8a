"""What stock clients read before they fetch: catalogue, model info, tree, history, refs."""

import re

import pytest

from registry.models import Expert, Job, Merge, Ref
from tests import tiny
from tests.integration import hf
from tests.integration.merges import merge_of

pytestmark = pytest.mark.django_db
FIELDS = {
    "_id", "id", "modelId", "author", "sha", "lastModified", "createdAt", "private", "gated", "disabled", "downloads",
    "likes", "tags", "library_name", "pipeline_tag", "cardData", "config", "usedStorage", "siblings",
}  # fmt: skip


@pytest.fixture
def ada():
    return hf.person("ada")


@pytest.fixture
def repo(ada):
    user, _ = ada
    return hf.expert(user, "bank", tiny.lora(seed=1))


def head(expert):
    return Ref.objects.get(expert=expert, name="main").revision


def test_model_info_has_every_field_that_old_and_new_clients_read(repo, ada):
    record = ada[1].get("/api/models/ada/bank").json()
    assert set(record) == FIELDS
    assert record["id"] == record["modelId"] == "ada/bank"
    assert record["author"] == "ada"
    assert record["sha"] == head(repo).commit
    assert (record["private"], record["gated"], record["disabled"]) == (False, False, False)
    assert record["library_name"] == "peft"
    assert {"peft", "tea", "license:apache-2.0", f"base_model:{tiny.BASE}", f"base_model:adapter:{tiny.BASE}"} <= set(
        record["tags"]
    )
    assert record["cardData"]["license"] == "apache-2.0"
    assert record["cardData"]["base_model"] == tiny.BASE
    assert record["config"] == {"peft": {"base_model_name_or_path": tiny.BASE}}
    assert record["siblings"] == [
        {"rfilename": "README.md"},
        {"rfilename": "adapter_config.json"},
        {"rfilename": "adapter_model.safetensors"},
    ]
    assert record["usedStorage"] == sum(len(data) for data in tiny.lora(seed=1).values())


def test_times_end_in_z_with_milliseconds(repo, ada):
    record = ada[1].get("/api/models/ada/bank").json()
    for name in ("lastModified", "createdAt"):
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", record[name])


def test_blobs_adds_sizes_and_digests(repo, ada):
    files = tiny.lora(seed=1)
    rows = {row["rfilename"]: row for row in ada[1].get("/api/models/ada/bank?blobs=True").json()["siblings"]}
    weights = files["adapter_model.safetensors"]
    assert rows["adapter_model.safetensors"]["size"] == len(weights)
    assert rows["adapter_model.safetensors"]["lfs"]["sha256"] == hf.sha256(weights)
    assert rows["adapter_model.safetensors"]["lfs"]["size"] == len(weights)
    assert rows["README.md"] == {
        "rfilename": "README.md",
        "size": len(files["README.md"]),
        "blobId": hf.git_id(files["README.md"]),
    }


def test_a_revision_is_answered_by_branch_tag_and_commit(repo, ada):
    user, caller = ada
    first = head(repo)
    second = hf.put(user, repo, {"NOTES.txt": b"more\n"}, "More")
    assert caller.json("POST", f"/api/models/ada/bank/tag/{first.commit}", {"tag": "v1"}).status_code == 201

    def sha(revision: str) -> str:
        return caller.get(f"/api/models/ada/bank/revision/{revision}").json()["sha"]

    assert sha("main") == second.commit
    assert sha("v1") == sha(first.commit) == sha("refs%2Ftags%2Fv1") == first.commit
    files = [row["rfilename"] for row in caller.get("/api/models/ada/bank/revision/v1").json()["siblings"]]
    assert "NOTES.txt" not in files


def test_a_commit_of_another_repository_is_not_found(repo, ada):
    user, caller = ada
    other = hf.expert(user, "other", tiny.lora(seed=2))
    response = caller.get(f"/api/models/ada/bank/revision/{head(other).commit}")
    assert (response.status_code, response["X-Error-Code"]) == (404, "RevisionNotFound")
    assert response["X-Error-Message"] == response.json()["error"]
    assert response["X-Request-Id"] == response.json()["request_id"]


def test_a_fresh_repository_is_an_empty_tree_and_not_an_error(ada):
    _, caller = ada
    caller.json("POST", "/api/repos/create", {"name": "fresh", "organization": None})
    assert caller.get("/api/models/ada/fresh/tree/main").json() == []
    record = caller.get("/api/models/ada/fresh/revision/main").json()
    assert (record["sha"], record["siblings"]) == ("0" * 40, [])
    # push_to_hub asks for the card first and makes one only when it is told that the file, not the revision, is absent.
    assert caller.head("/ada/fresh/resolve/main/README.md")["X-Error-Code"] == "EntryNotFound"


def test_the_tree_lists_files_and_folders_by_level(repo, ada):
    user, caller = ada
    hf.put(user, repo, {"docs/a.md": b"a\n", "docs/deep/b.md": b"b\n", "docs.md": b"c\n"})
    top = caller.get("/api/models/ada/bank/tree/main").json()
    assert [(row["type"], row["path"]) for row in top] == [
        ("file", "README.md"),
        ("file", "adapter_config.json"),
        ("file", "adapter_model.safetensors"),
        ("directory", "docs"),
        ("file", "docs.md"),
    ]
    below = caller.get("/api/models/ada/bank/tree/main/docs").json()
    assert [(row["type"], row["path"]) for row in below] == [("file", "docs/a.md"), ("directory", "docs/deep")]
    every = caller.get("/api/models/ada/bank/tree/main/docs?recursive=True").json()
    assert [row["path"] for row in every] == ["docs/a.md", "docs/deep", "docs/deep/b.md"]
    assert below[0] == {"type": "file", "path": "docs/a.md", "size": 2, "oid": hf.git_id(b"a\n")}
    assert "xetHash" not in str(top)
    weights = next(row for row in top if row["path"].endswith(".safetensors"))
    assert weights["lfs"]["oid"] == hf.sha256(tiny.lora(seed=1)["adapter_model.safetensors"])


def test_a_folder_that_is_not_there_is_an_absent_entry(repo, ada):
    response = ada[1].get("/api/models/ada/bank/tree/main/additional_chat_templates?recursive=false&expand=false")
    assert (response.status_code, response["X-Error-Code"]) == (404, "EntryNotFound")
    assert response["X-Repo-Commit"] == head(repo).commit


def test_expand_names_the_commit_that_last_changed_each_file(repo, ada):
    user, caller = ada
    first = head(repo)
    second = hf.put(user, repo, {"NOTES.txt": b"one\n", "docs/a.md": b"a\n"}, "Notes")
    third = hf.put(user, repo, {"NOTES.txt": b"two\n"}, "Other notes\n\nAt length.")
    rows = {row["path"]: row["lastCommit"] for row in caller.get("/api/models/ada/bank/tree/main?expand=true").json()}
    assert rows["README.md"]["id"] == first.commit
    assert rows["docs"]["id"] == second.commit
    assert rows["NOTES.txt"]["id"] == third.commit
    assert rows["NOTES.txt"]["title"] == "Other notes"
    assert rows["NOTES.txt"]["date"].endswith("Z")


def test_long_trees_come_in_pages_that_link_on(repo, ada):
    _, caller = ada
    seen = []
    address = "/api/models/ada/bank/tree/main?recursive=true&limit=2"
    while address:
        response = caller.get(address)
        seen += [row["path"] for row in response.json()]
        link = response.get("Link", "")
        assert link == "" or (
            link.startswith("<http://testserver/api/models/ada/bank/tree/main?") and 'rel="next"' in link
        )
        address = link[len("<http://testserver") : link.index(">")] if link else ""
    assert seen == ["README.md", "adapter_config.json", "adapter_model.safetensors"]


@pytest.mark.parametrize("kind", ["application/x-www-form-urlencoded", "application/json"])
def test_paths_info_answers_known_paths_and_is_silent_about_others(repo, ada, kind):
    user, caller = ada
    hf.put(user, repo, {"docs/a b.md": b"a\n"})
    body = "paths=README.md&paths=docs&paths=docs%2Fa+b.md&paths=none&expand=false"
    if kind == "application/json":
        body = '{"paths": ["README.md", "docs", "docs/a b.md", "none"], "expand": false}'
    rows = caller.send("POST", "/api/models/ada/bank/paths-info/main", data=body, kind=kind).json()
    assert [(row["type"], row["path"]) for row in rows] == [
        ("file", "README.md"),
        ("directory", "docs"),
        ("file", "docs/a b.md"),
    ]


def test_history_is_newest_first_and_paged(repo, ada):
    user, caller = ada
    first = head(repo)
    second = hf.put(user, repo, {"NOTES.txt": b"one\n"}, "Second\n\nWith a reason.")
    third = hf.put(user, repo, {"NOTES.txt": b"two\n"}, "Third")
    rows = caller.get("/api/models/ada/bank/commits/main").json()
    assert [row["id"] for row in rows] == [third.commit, second.commit, first.commit]
    assert (rows[1]["title"], rows[1]["message"], rows[1]["authors"]) == ("Second", "With a reason.", [{"user": "ada"}])
    assert [row["id"] for row in caller.get(f"/api/models/ada/bank/commits/{second.commit}").json()] == [
        second.commit,
        first.commit,
    ]
    page = caller.get("/api/models/ada/bank/commits/main?limit=2")
    assert page["X-Total-Count"] == "3"
    assert "p=1" in page["Link"]
    last = caller.get("/api/models/ada/bank/commits/main?limit=2&p=1")
    assert [row["id"] for row in last.json()] == [first.commit]
    assert "Link" not in last


def test_refs_list_branches_and_tags_with_their_commits(repo, ada):
    user, caller = ada
    first = head(repo).commit
    assert caller.json("POST", "/api/models/ada/bank/branch/dev", {}).status_code == 201
    assert caller.json("POST", "/api/models/ada/bank/tag/main", {"tag": "v1"}).status_code == 201
    second = hf.put(user, repo, {"NOTES.txt": b"dev\n"}, branch="dev").commit
    assert caller.get("/api/models/ada/bank/refs?include_prs=1").json() == {
        "branches": [
            {"name": "dev", "ref": "refs/heads/dev", "targetCommit": second},
            {"name": "main", "ref": "refs/heads/main", "targetCommit": first},
        ],
        "tags": [{"name": "v1", "ref": "refs/tags/v1", "targetCommit": first}],
        "converts": [],
        "pullRequests": [],
    }
    assert "pullRequests" not in caller.get("/api/models/ada/bank/refs").json()


def test_branches_and_tags_are_made_once_and_forgotten(repo, ada):
    _, caller = ada
    assert caller.json("POST", "/api/models/ada/bank/branch/dev", {"startingPoint": "main"}).status_code == 201
    assert caller.json("POST", "/api/models/ada/bank/branch/dev", {}).status_code == 409
    assert (
        caller.json("POST", "/api/models/ada/bank/branch/x", {"startingPoint": "no"})["X-Error-Code"]
        == "RevisionNotFound"
    )
    for name in ("merge--1", "compeft-a", "refs%2Fpr%2F1", "a" * 40, "a%2Fb"):
        assert caller.json("POST", f"/api/models/ada/bank/branch/{name}", {}).status_code == 422
    assert caller.json("DELETE", "/api/models/ada/bank/branch/main", {}).status_code == 422
    assert caller.json("DELETE", "/api/models/ada/bank/tag/dev", {})["X-Error-Code"] == "RevisionNotFound"
    assert caller.json("DELETE", "/api/models/ada/bank/branch/dev", {}).status_code == 200
    assert caller.get("/api/models/ada/bank/revision/dev")["X-Error-Code"] == "RevisionNotFound"


def test_the_catalogue_is_searched_filtered_sorted_and_paged(ada):
    user, caller = ada
    for seed, name in enumerate(("bank", "travel", "kitchen")):
        hf.expert(user, name, tiny.lora(seed=seed))
    bob, _ = hf.person("bob")
    hf.expert(bob, "travel", tiny.lora(seed=7))
    Expert.objects.filter(name="kitchen").update(downloads=5, tags=["cooking"], licence="mit")

    def ids(query: str) -> list[str]:
        return [row["id"] for row in caller.get(f"/api/models?{query}").json()]

    assert ids("author=ada&sort=createdAt") == ["ada/kitchen", "ada/travel", "ada/bank"]
    assert sorted(ids("search=travel")) == ["ada/travel", "bob/travel"]
    assert ids("search=travel&author=bob") == ["bob/travel"]
    assert ids("filter=cooking") == ids("filter=license:mit") == ids("filter=cooking&filter=peft") == ["ada/kitchen"]
    assert ids("filter=cooking&filter=tea") == []
    assert len(ids(f"filter=base_model:adapter:{tiny.BASE}")) == 4
    assert ids("filter=base_model:google-bert/bert-base-uncased") == []
    assert ids("sort=downloads&limit=1") == ["ada/kitchen"]
    assert all(
        len(ids(f"sort={sort}")) == 4 for sort in ("trendingScore", "likes", "lastModified", "downloads&direction=-1")
    )


def test_the_catalogue_links_to_its_next_page_by_the_host_of_the_request(ada):
    user, caller = ada
    for seed in range(3):
        hf.expert(user, f"e{seed}", tiny.lora(seed=seed))
    first = caller.get("/api/models?limit=2&sort=createdAt", Host="hub.example:8443")
    assert first["Link"].startswith("<http://hub.example:8443/api/models?")
    rest = caller.get("/api/models?" + first["Link"].partition("?")[2].partition(">")[0])
    assert [row["id"] for row in first.json()] + [row["id"] for row in rest.json()] == ["ada/e2", "ada/e1", "ada/e0"]
    assert "Link" not in rest


def test_siblings_are_in_the_catalogue_only_when_asked_for(repo, ada):
    assert "siblings" not in ada[1].get("/api/models").json()[0]
    assert len(ada[1].get("/api/models?full=true").json()[0]["siblings"]) == 3


def test_a_page_of_the_catalogue_costs_as_many_queries_for_many_as_for_one(ada, django_assert_max_num_queries):
    user, caller = ada
    for seed in range(5):
        hf.expert(user, f"e{seed}", tiny.lora(seed=seed))
    with django_assert_max_num_queries(10):
        assert len(caller.get("/api/models?full=true").json()) == 5


def test_an_odd_number_in_the_query_is_refused_by_name(repo, ada):
    for query in ("limit=x", "limit=0", "cursor=-1", "limit=" + "9" * 40):
        response = ada[1].get(f"/api/models?{query}")
        assert response.status_code == 422
        assert response.json()["errors"][0]["pointer"] == "?" + query.partition("=")[0]


@pytest.mark.parametrize(
    "path",
    [
        "/api/models/gpt2",
        "/api/models/gpt2/revision/main",
        "/api/models/google-bert/bert-base-uncased",
        "/gpt2/resolve/main/config.json",
        "/google-bert/bert-base-uncased/resolve/main/config.json",
        "/api/datasets/ada/bank",
        "/api/spaces/ada/bank/revision/main",
        "/datasets/ada/bank/resolve/main/README.md",
        "/api/models/ada/ba%00nk",
        "/api/models/a%2F..%2Fb/bank",
    ],
)
def test_base_models_and_other_kinds_of_repository_are_not_found(repo, path):
    for method in ("GET", "HEAD"):
        response = hf.Caller().send(method, path)
        assert (response.status_code, response["X-Error-Code"]) == (404, "RepoNotFound")


def test_other_addresses_below_api_answer_in_json(repo):
    response = hf.Caller().get("/api/quicksearch?q=a")
    assert (response.status_code, response.json()["code"]) == (404, "not-found")
    assert "X-Error-Code" not in response


def test_a_wrong_method_is_refused_with_the_right_ones(repo, ada):
    response = ada[1].send("DELETE", "/api/models/ada/bank/tree/main")
    assert (response.status_code, response["Allow"]) == (405, "GET, HEAD")


def test_rare_calls_are_told_that_they_are_not_offered(repo, ada):
    for method, path in (
        ("POST", "/api/models/ada/bank/super-squash/main"),
        ("GET", "/api/models/ada/bank/discussions"),
        ("POST", "/api/models/ada/bank/lfs-files/duplicate"),
        ("POST", "/ada/bank.git/info/lfs/objects/batch"),
        ("GET", "/api/models/ada/bank/xet-write-token/main"),
    ):
        response = ada[1].send(method, path)
        assert response.status_code == 501
        assert response["X-Error-Message"]


def test_a_merge_that_is_computed_reads_like_any_repository(repo, ada):
    user, caller = ada
    other = hf.expert(user, "other", tiny.lora(seed=2))
    merge = merge_of([repo, other], files=tiny.lora(seed=9))
    record = caller.get(f"/api/models/merges/{merge.pk}").json()
    assert (record["id"], record["sha"]) == (f"merges/{merge.pk}", merge.commit)
    assert set(record) == FIELDS
    assert [row["rfilename"] for row in record["siblings"]] == sorted(tiny.lora())
    via = caller.get(f"/api/models/ada/bank/revision/merge--{merge.pk}").json()
    assert (via["id"], via["sha"]) == ("ada/bank", merge.commit)
    # snapshot_download goes on with the commit that it was given.
    paths = [row["path"] for row in caller.get(f"/api/models/ada/bank/tree/{merge.commit}").json()]
    assert paths == sorted(tiny.lora())
    response = caller.get(f"/ada/bank/resolve/{merge.commit}/adapter_model.safetensors")
    assert response.body == tiny.lora(seed=9)["adapter_model.safetensors"]
    assert response["X-Repo-Commit"] == merge.commit
    assert merge.full_name not in str(caller.get("/api/models").json())


@pytest.mark.parametrize(("state", "status"), [("queued", 503), ("running", 503), ("failed", 409), ("cancelled", 503)])
def test_a_merge_that_is_not_computed_has_a_commit_and_tells_of_its_job(repo, ada, state, status, settings):
    settings.HUB_HOLD_SECONDS = 0
    _, caller = ada
    merge = merge_of([repo, repo], state=Merge.State(state))
    job = Job.objects.create(kind="merge", merge=merge, key=f"merge:m{merge.pk}", state=state)
    record = caller.get(f"/api/models/merges/{merge.pk}/revision/main").json()
    assert record["sha"] == merge.commit
    assert {row["rfilename"] for row in record["siblings"]} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "lineage.json",
        "recipe.json",
        "report.json",
    }
    for method, path in (
        ("HEAD", f"/merges/{merge.pk}/resolve/main/adapter_config.json"),
        ("GET", f"/merges/{merge.pk}/resolve/{merge.commit}/adapter_model.safetensors"),
        ("GET", f"/api/models/merges/{merge.pk}/tree/main"),
        ("GET", f"/ada/bank/resolve/merge--{merge.pk}/README.md"),
    ):
        response = caller.send(method, path)
        assert response.status_code == status
        assert job.pk in response["X-Error-Message"]
        assert "X-Error-Code" not in response
        assert ("Retry-After" in response) == (status == 503)


def test_a_yanked_expert_says_so_in_a_header_that_clients_show(repo, ada):
    _, caller = ada
    Expert.objects.filter(pk=repo.pk).update(yanked_at=repo.created_at, yank_reason="Trained on\nthe wrong rows; sorry")
    for path in ("/api/models/ada/bank", "/ada/bank/resolve/main/README.md"):
        assert caller.get(path)["X-HF-Warning"] == "yanked; ada/bank was yanked: Trained on the wrong rows; sorry"
    assert caller.get("/api/models").json() == []


@pytest.mark.parametrize("path", ["commit/{sha}", "blob/main/docs/a.md", "tree/main/docs"])
def test_addresses_that_clients_print_lead_people_to_a_page(repo, path):
    sha = head(repo).commit
    response = hf.Caller().get("/ada/bank/" + path.format(sha=sha))
    assert response.status_code == 302
    assert response["Location"] == f"/ada/bank/tree/{sha if 'commit' in path else 'main'}"
