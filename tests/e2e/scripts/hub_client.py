"""One stock huggingface_hub against one hub, in a process of its own: prints what it saw as JSON.

    python hub_client.py OWNER FOLDER

HF_ENDPOINT, HF_TOKEN and HF_HOME say where and as whom. Runs on every version from 0.20 on, so it uses only what all have.
"""

import json
import sys
import warnings
from pathlib import Path

import huggingface_hub
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.utils import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

OWNER, FOLDER = sys.argv[1], Path(sys.argv[2])
NAME = "client-" + huggingface_hub.__version__.replace(".", "-")
REPO = f"{OWNER}/{NAME}"
WEIGHTS = "adapter_model.safetensors"
api = HfApi()
seen: dict[str, object] = {"version": huggingface_hub.__version__}


def raised(call, *arguments, **named) -> str:
    """The name of what a call raises."""
    try:
        call(*arguments, **named)
    except (RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError) as error:
        return type(error).__name__.replace("Remote", "")
    return "nothing"


def upload() -> None:
    seen["whoami"] = api.whoami()["name"]
    seen["url"] = str(api.create_repo(REPO))
    seen["url again"] = str(api.create_repo(REPO, exist_ok=True))
    seen["empty tree"] = api.list_repo_files(REPO)
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        first = api.upload_folder(repo_id=REPO, folder_path=FOLDER, commit_message="The adapter")
        again = api.upload_folder(repo_id=REPO, folder_path=FOLDER, commit_message="The adapter again")
    seen["commits are one"] = getattr(first, "oid", None) == getattr(again, "oid", None)
    api.upload_file(path_or_fileobj=b"Notes of the tests.\n", path_in_repo="notes/first note.md", repo_id=REPO)


def read() -> None:
    info = api.model_info(REPO, files_metadata=True)
    sizes = {file.rfilename: file.size for file in info.siblings}
    seen["sizes"] = sizes
    seen["sha256"] = next(file.lfs["sha256"] for file in info.siblings if file.rfilename == WEIGHTS)
    seen["private"] = info.private
    seen["tags"] = info.tags
    seen["files"] = sorted(api.list_repo_files(REPO))
    seen["listed"] = [model.id for model in api.list_models(author=OWNER, search=NAME)]
    seen["exists"] = [api.repo_exists(REPO), api.repo_exists(f"{OWNER}/none"), api.file_exists(REPO, "none.json")]
    snapshot = Path(snapshot_download(REPO))
    seen["snapshot is the folder"] = all(
        (snapshot / path.relative_to(FOLDER)).read_bytes() == path.read_bytes()
        for path in FOLDER.rglob("*")
        if path.is_file() and path.name != "training_args.bin"
    )
    seen["leftover was left out"] = not (snapshot / "training_args.bin").exists()
    seen["snapshot is the commit"] = snapshot.name == info.sha


def revisions() -> None:
    commits = api.list_repo_commits(REPO)
    seen["titles"] = [commit.title for commit in commits]
    first = commits[-1].commit_id
    api.create_branch(REPO, branch="dev", revision=first)
    api.create_tag(REPO, tag="v1", revision=first)
    refs = api.list_repo_refs(REPO)
    seen["branches"] = sorted(branch.name for branch in refs.branches)
    seen["tags made"] = [tag.name for tag in refs.tags]
    seen["files of v1"] = sorted(api.list_repo_files(REPO, revision="v1"))
    seen["files by long names"] = [
        sorted(api.list_repo_files(REPO, revision=name)) for name in ("refs/tags/v1", "refs/heads/dev")
    ]
    api.delete_file("notes/first note.md", repo_id=REPO)
    seen["files after delete"] = sorted(api.list_repo_files(REPO))
    path = hf_hub_download(REPO, "notes/first note.md", revision=commits[0].commit_id)
    seen["deleted file of its commit"] = Path(path).read_text()
    seen["raised"] = [
        raised(hf_hub_download, f"{OWNER}/none", "README.md"),
        raised(hf_hub_download, REPO, "README.md", revision="none"),
        raised(hf_hub_download, REPO, "none.json"),
        raised(api.model_info, "google-bert/bert-base-uncased"),
    ]


def remove() -> None:
    api.delete_repo(REPO)
    seen["after delete"] = raised(api.model_info, REPO)
    seen["listed after delete"] = [model.id for model in api.list_models(author=OWNER, search=NAME)]


upload()
read()
revisions()
remove()
print(json.dumps(seen))  # noqa: T201 - the answer to the test
