"""What a name of an owner, an expert, a branch or a file may be."""

import re
import unicodedata

from registry.errors import Fault, NameInvalid

PART = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9])?")
COMMIT = re.compile(r"[0-9a-f]{40}")
BRANCH = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=,~-]{0,126}")

# First path segments of the site, of the Hub protocol, and words that pages to come may want.
RESERVED_OWNERS = frozenset(
    """
    about abuse account accounts admin administration administrator all anonymous api app apps ask assets auth badge
    badges base
    bases blob blobs blog branch bucket buckets by-hash catalog catalogue cdn chat collection collections commit
    commits compare contact cookies crossdomain dashboard dataset datasets docs download downloads email error
    errors evaluation evaluations experts explore export faq favicon favicon.ico feed feedback file files gist guest
    healthz health help home hub hubs humans.txt import index info job jobs join kernel kernels key keys legal
    licence licences license licenses lineage live login logout mail main me media member members merge merges
    method methods metrics mirror model models moerge moderator news new none null oauth official org organisation
    organisations organization organizations orgs owner packs page pages password ping policy post posts pricing
    privacy profile profiles project projects public query queue raw readyz ready refs register registry repo repos
    report resolve revision revisions robots.txt root route router routes routing rss save search security self
    server service session sessions settings setup share shop signin signout signup site sitemap sitemap.xml space
    spaces static statistics stats status store super support sysadmin system tag tags task tasks team teams
    telemetry terms test token tokens tools tree undefined update updates upload uploads user username users v1 v2
    verify version versions void webhook webhooks webmaster well-known wiki www xet
    """.split()
)
LOOKALIKES = str.maketrans({"l": "1", "i": "1", "o": "0", ".": "", "_": "", "-": ""})


def strict_key(name: str) -> str:
    """The key under which look-alike owner names collide: case folded, separators dropped, l and I as 1, O as 0."""
    return name.casefold().translate(LOOKALIKES)


RESERVED_KEYS = frozenset(strict_key(word) for word in RESERVED_OWNERS)


def check_part(part: str, *, pointer: str) -> None:
    """One part of owner/name, by the rules that stock Hub clients apply too."""
    if not PART.fullmatch(part) or "--" in part or ".." in part or part.endswith(".git"):
        raise NameInvalid(
            f"{part[:100]!r} is not a valid name.",
            faults=[
                Fault(
                    pointer,
                    part[:100],
                    "1 to 96 of A-Z a-z 0-9 . _ -, starting and ending with a letter or digit, "
                    "without -- or .., not ending in .git",
                    "Choose a name of these characters.",
                )
            ],
        )


def check_owner(name: str, *, pointer: str = "/owner") -> None:
    """An owner name that somebody wants to register."""
    check_part(name, pointer=pointer)
    if strict_key(name) in RESERVED_KEYS:
        raise NameInvalid(
            f"{name!r} is reserved.",
            faults=[Fault(pointer, name, "a name that the hub does not use itself", "Choose another name.", "N3")],
        )


def split(full_name: str, *, pointer: str = "/expert") -> tuple[str, str]:
    """owner and name of `owner/name`. Raises NameInvalid."""
    owner, slash, name = full_name.partition("/")
    if not slash or "/" in name:
        raise NameInvalid(
            f"{full_name[:200]!r} is not of the form owner/name.",
            faults=[Fault(pointer, full_name[:200], "owner/name", "Write the namespace, a slash and the name.")],
        )
    check_part(owner, pointer=pointer)
    check_part(name, pointer=pointer)
    return owner, name


def check_branch(name: str, *, pointer: str = "/branch") -> None:
    """A branch or tag name that somebody wants to make; some are the hub's own."""
    reserved = name.startswith(("compeft-", "merge--", "refs")) or COMMIT.fullmatch(name)
    if not BRANCH.fullmatch(name) or ".." in name or reserved:
        raise NameInvalid(
            f"{name[:100]!r} cannot be a branch or tag.",
            faults=[
                Fault(
                    pointer,
                    name[:100],
                    "letters, digits and . _ + = , ~ -; not compeft-*, merge--*, refs* or 40 hexadecimal digits",
                    "Choose another name.",
                    "N3",
                )
            ],
        )


def check_path(path: str, *, pointer: str) -> None:
    """A file name inside an expert: relative, plain, the same on every system."""
    reasons = []
    if not path or len(path.encode()) > 255:
        reasons.append("1 to 255 bytes")
    if path.startswith(("/", "~")) or "\\" in path or re.match(r"[A-Za-z]:", path):
        reasons.append("a relative path with forward slashes")
    if any(part in {"", ".", ".."} for part in path.split("/")):
        reasons.append("no empty, . or .. part")
    if any(unicodedata.category(sign) in {"Cc", "Cf", "Cs", "Co", "Cn"} for sign in path):
        reasons.append("no control, invisible or direction-changing characters")
    elif unicodedata.normalize("NFC", path) != path:
        reasons.append("Unicode in composed form (NFC)")
    if any(len(part.encode()) > 200 or part.endswith((" ", ".")) for part in path.split("/")):
        reasons.append("parts of at most 200 bytes that do not end in a dot or space")
    if reasons:
        raise NameInvalid(
            f"The file name {path[:120]!r} is not allowed.",
            faults=[Fault(pointer, path[:120], "; ".join(reasons), "Rename the file and upload again.", "U3")],
        )
