"""`moerge merge`: several experts become one, by a hub or on this machine."""

import argparse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from moerge.cli import arguments
from moerge.cli.terminal import Terminal
from moerge.cli.verify import add_timeout
from moerge.client import Hub, drafts, merging
from moerge.client.drafts import Draft
from moerge.client.merging import Result
from moerge.client.records import Merge
from moerge.errors import ParameterInvalid

NAME = "merge"
HELP = "make one expert of several"
DESCRIPTION = """Carries out RECIPE, a file that says which experts (owner/name[@revision], or folders) are merged, with
what weights and by which method. Where all of them are folders, or with --local, it is computed on this machine, by
numpy alone; else the hub computes it, once for everybody who asks for the same, and the result is fetched and verified.
DIR is touched only when everything is there; an earlier merge in it is replaced."""
EXAMPLE = """example:
  moerge merge recipe.yaml --out ./merged --endpoint http://127.0.0.1:8000
  moerge merge recipe.yaml --out ./merged --local
  moerge merge recipe.yaml --check

recipe.yaml:
  method: ties
  parameters: {density: 0.2}
  experts:
    - {expert: ann/travel-desk, weight: 0.6}
    - {expert: ann/small-talk, weight: 0.4}"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", type=Path, help="YAML or JSON file")
    parser.add_argument("--out", metavar="DIR", type=Path, help="folder to fill; made when not there")
    parser.add_argument("--local", action="store_true", help="compute here; references are fetched first")
    parser.add_argument(
        "--base", type=Path, metavar="CHECKPOINT",
        help="folder with the base's weights, for what is computed here and depends on them: DoRA, IA3 among others, "
        "full weights",
    )  # fmt: skip
    parser.add_argument(
        "--check", action="store_true", help="only say whether it can be carried out and what it would take"
    )
    add_timeout(parser)


def run(wanted: argparse.Namespace, terminal: Terminal) -> None:
    if (wanted.out is None) != wanted.check:
        raise ParameterInvalid(
            "A merge needs a folder to go to, and a check none.", pointer="--out", met=str(wanted.out or "nothing"),
            wanted="--out DIR, or --check", remedy="Give one of both.",
        )  # fmt: skip
    draft = drafts.read(wanted.recipe)
    if wanted.base is not None:
        draft = replace(draft, base=wanted.base)
    is_here = wanted.local or len(draft.folders) == len(draft.experts)
    if wanted.out is not None:
        merging.check_free(wanted.out.absolute())
    with _hub(draft, wanted, terminal, is_here=is_here) as hub:
        if wanted.check:
            told = merging.check_here(draft, hub=hub) if hub is None or is_here else merging.check(hub, draft)
            _warn(told, terminal)
            terminal.answer(told, _checked(told))
            return
        if is_here:
            result = merging.here(draft, wanted.out, hub=hub, progress=terminal.watch)
        else:
            assert hub is not None
            result = _by_hub(hub, draft, wanted.out, terminal)
    _warn(result.report, terminal)
    terminal.answer(_record(result, wanted.out), _lines(result, wanted.out))


@contextmanager
def _hub(draft: Draft, wanted: argparse.Namespace, terminal: Terminal, *, is_here: bool) -> Iterator[Hub | None]:
    """The hub, where one is needed: folders are merged without any."""
    if is_here and len(draft.folders) == len(draft.experts):
        yield None
        return
    with Hub(wanted.endpoint, wanted.token, wait_seconds=wanted.timeout, progress=terminal.watch) as hub:
        yield hub


def _by_hub(hub: Hub, draft: Draft, out: Path, terminal: Terminal) -> Result:
    merge = merging.ask(hub, draft)
    try:
        return merging.fetch(hub, merge, out)
    except KeyboardInterrupt:
        terminal.say(_farewell(hub, merge))
        raise


def _farewell(hub: Hub, merge: Merge) -> str:
    """What becomes of a merge that its caller no longer waits for: only what this call began is stopped."""
    later = f"`moerge pull {merge.full_name} --out DIR` fetches {merge.full_name} when it is ready."
    if merge.job is None or not merge.is_new:
        return later
    stopped = hub.cancel(merge.job.id)
    if stopped is None:
        return f"The hub goes on with job {merge.job.id}. {later}"
    if stopped.state == "done":
        return later
    return f"The hub was told to stop job {merge.job.id}."


def _warn(told: Mapping[str, Any], terminal: Terminal) -> None:
    for warning in _list(told.get("warnings")):
        terminal.warn(str(warning))


def _checked(told: Mapping[str, Any]) -> list[str]:
    """What a hub or this machine says of a recipe; fields that it does not tell are left out."""
    recipe, output, cost, licence = (_object(told.get(name)) for name in ("recipe", "output", "cost", "licence"))
    rank = f", rank {output['rank']}" if output.get("rank") else ""
    rows = [("method", str(recipe.get("method"))), *_checked_experts(told), ("output", f"{output.get('kind')}{rank}")]
    if cost:
        rows.append(("size", f"at most {_count(cost.get('written_bytes'))} bytes"))
        rows.append(("memory", f"about {_count(cost.get('memory_bytes'))} bytes"))
        rows.append(("time", f"about {cost.get('cpu_seconds')} s of one core"))
    if licence:
        rows.append(("licence", f"{licence.get('licence') or 'unknown'} ({licence.get('verdict')})"))
    kinship = _object(told.get("kinship"))
    for pair in map(_object, _list(kinship.get("pairs"))):
        figures = ", ".join(f"{name} {_figure(value)}" for name, value in pair.items() if isinstance(value, float))
        rows.append(("kinship", f"{pair.get('first')}, {pair.get('second')}: {figures}"))
    if kinship.get("state", "ready") != "ready":
        rows.append(("kinship", str(kinship.get("reason") or f"of other pairs: {kinship['state']}")))
    if told.get("repo"):
        rows.append(("address", f"{told['repo']} ({told.get('state') or 'not asked for yet'})"))
    return [*arguments.table(rows), "can be merged"]


def _checked_experts(told: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for expert in map(_object, _list(told.get("experts"))):
        facts = [str(expert["kind"])] if expert.get("kind") else []
        facts += [f"{name} {expert[name]}" for name in ("rank", "modules") if expert.get(name)]
        yield "expert", f"{expert.get('expert')} at {expert.get('revision')} ({', '.join(facts)})"


def _object(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _count(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _figure(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _record(result: Result, out: Path) -> dict[str, Any]:
    merge = result.merge
    return {
        "out": str(out),
        "by": "hub" if merge else "here",
        "merge": merge.full_name if merge else None,
        "commit": merge.commit if merge else None,
        "digest": result.digest,
        "recipe": result.recipe,
        "report": {name: value for name, value in result.report.items() if name != "modules"},
        "files": [{"path": file.path, "size": file.size, "sha256": file.sha256} for file in result.files],
    }


def _lines(result: Result, out: Path) -> list[str]:
    recipe, report, merge = result.recipe, result.report, result.merge
    rows = [("merged", f"{merge.full_name} at {merge.commit}" if merge else "here"), ("into", str(out))]
    rows.append(("method", str(recipe.get("method"))))
    rows += [("expert", _expert(_object(expert))) for expert in _list(recipe.get("experts"))]
    if report.get("rank"):
        rows.append(("rank", str(report["rank"])))
    energy, ternary = report.get("energy_kept"), _object(report.get("ternary"))
    if isinstance(energy, int | float) and not ternary:
        rows.append(("energy kept", f"{energy:.1%}"))
    if ternary:
        rows.append(("ternary", f"density {ternary.get('density')}, cosine {_figure(ternary.get('cosine'))}"))
    rows += [("file", f"{file.path}, {file.size:,} bytes") for file in result.files]
    return arguments.table(rows)


def _expert(expert: Mapping[str, Any]) -> str:
    weight = expert.get("weight")
    shown = f"{weight:g}" if isinstance(weight, int | float) else str(weight)
    return f"{shown} of {expert.get('expert')} at {expert.get('revision')}"
