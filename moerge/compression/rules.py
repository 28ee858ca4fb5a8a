"""The numbered rules of the containers: what a reader checks, in this order, before it trusts a claim of the file.

Every rule has a stable id, found in `EncodedInvalid.rule`. The first number is the step: 1 the safetensors shell,
2 the manifest, 3 each entry, 4 the planes against the entries, 5 each deflated piece, 6 while an entry is decoded,
7 the hash.
"""

from typing import NoReturn

from moerge.errors import EncodedInvalid

RULES = {
    "C1.size": "the file is not larger than the caller allows, and holds the bytes it claims",
    "C1.header": "the file has a strict safetensors header of at most 16 MiB",
    "C1.format": "the metadata names the format, compeft or int4",
    "C1.version": 'the version is exactly "1"',
    "C1.names": "the tensors are the planes of the format and plain/<name>, no other",
    "C1.types": "every plane has the dtype of its format and one dimension",
    "C2.inflate": "the manifest is one complete zlib stream and nothing else",
    "C2.size": "the manifest inflates to at most 8 MiB",
    "C2.json": "the manifest is strict JSON, nested three levels at most",
    "C2.count": "the manifest has at most 65,536 entries",
    "C2.entry": "an entry has the fields of its format, with plain integers",
    "C2.name": "a name has 1 to 512 bytes without control characters",
    "C2.unique": "no name stands twice, neither in the manifest nor among plain tensors",
    "C2.sorted": "entries are sorted by name",
    "C2.dtype": "a dtype is F32, F16 or BF16",
    "C2.shape": "a shape has at most 8 dimensions, each a plain integer from 0",
    "C2.coding": "a coding is 0 (gap8) or 1 (mask)",
    "C2.init": 'an initial value is 0, 1 or "base"',
    "C2.values": "all entries together have at most as many values as the caller allows",
    "C2.budget": "the decoded tensors fit the caller's output budget",
    "C2.expected": "where the caller knows the shapes, the entries have them",
    "C3.scales": "there is one scale per entry, in int4 one per row of an entry",
    "C3.count": "an entry keeps between none and all of its values",
    "C3.plane": "the length of a position plane is possible for its entry",
    "C3.finite": "a scale is finite, also in the dtype of its entry",
    "C3.negative": "a scale is not negative",
    "C3.zero": "a scale of values that are not zero is not zero, also in the dtype of its entry",
    "C4.pieces": "there are exactly as many pieces as the entries need",
    "C4.piece": "a piece has between one byte and as many as it decodes to",
    "C4.pos": "the pieces together are as long as their plane",
    "C4.sign": "the sign plane is as long as the entries need",
    "C4.padding": "unused bits of a plane are zero",
    "C5.deflate": "a piece is a raw deflate stream",
    "C5.length": "a piece inflates to exactly its share of the plane",
    "C5.end": "the deflate stream of a piece is complete",
    "C5.trailing": "nothing follows the deflate stream in its piece",
    "C6.position": "every kept position lies inside its tensor",
    "C6.emitted": "a gap plane has exactly as many gaps as values are kept",
    "C6.escape": "a gap plane does not end in an escape",
    "C6.popcount": "a mask has exactly as many bits as values are kept",
    "C6.code": "a value of int4 lies between -7 and 7",
    "C7.hash": "the SHA-256 over manifest, scales and decoded planes is the one in the metadata",
}

_REMEDY = "Fetch the file again, or make it again from the original adapter with moerge compress."


def refuse(rule: str, where: str, *, met: object, wanted: object) -> NoReturn:
    """Raise EncodedInvalid for a rule; `where` is the entry or tensor of the file that breaks it."""
    raise EncodedInvalid(
        f"{where} breaks rule {rule} of the format ({RULES[rule]}): met {met}, wanted {wanted}.",
        pointer=where,
        met=met,
        wanted=wanted,
        remedy=_REMEDY,
        rule=rule,
    )
