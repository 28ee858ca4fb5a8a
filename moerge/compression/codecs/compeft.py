"""ComPEFT in the container `compeft/1`: sparse signs and one scale per tensor (arXiv 2311.13171), read by numpy alone.

The file is safetensors. `manifest` lists the ternary tensors, `scales` their scales, `pos` and `sign` where values are
kept and with which sign; `plain/<name>` are the tensors that stay as they are. See `moerge.compression.rules` for what
a reader checks.
"""

import io
from collections.abc import Callable, Mapping
from math import prod
from typing import Any, BinaryIO

from threadpoolctl import threadpool_limits

from moerge.compression import planes, presets, published, scales, selection
from moerge.compression.arithmetic import NUMPY, Arithmetic
from moerge.compression.base import Parameter, Spec, Tensors
from moerge.compression.container import Initial
from moerge.compression.differences import Arrays, TensorSource
from moerge.compression.manifest import Budget
from moerge.compression.presets import Settings, Ternariser
from moerge.compression.reader import open_encoded
from moerge.compression.report import Ledger
from moerge.compression.writer import WRITER, Writer, Written, shell_bound
from moerge.tensors import files
from moerge.tensors.files import BF16, Array
from moerge.tensors.header import ITEM_BYTES

SPEC = Spec(
    name="compeft",
    version="1",
    title="ComPEFT (ternary)",
    paper="2311.13171",
    parameters=(
        Parameter(
            name="preset",
            default=presets.DEFAULT,
            choices=(presets.DEFAULT, presets.PAPER, presets.HQ),
            help="default: one threshold and scale per tensor, no evaluation data needed. hq: better at densities of "
            "a few percent, but the factors change their basis. paper: the authors' release.",
        ),
        Parameter(
            name="density",
            default=None,
            low=0.0,
            above=True,
            high=1.0,
            help="Share of values kept. By default 0.2, with a base from 1 B parameters 0.1, from 13 B 0.05.",
        ),
        Parameter(
            name="scale_rule",
            default=None,
            choices=(*scales.RULES, presets.HQ, presets.SIGMA, published.STC),
            help="How scales are found. Preset default: unbiased (its default), norm, proj, geo, mse; hq means the "
            "preset hq. Preset paper: sigma (its default), stc.",
        ),
        Parameter(
            name="alpha",
            default=None,
            low=0.0,
            above=True,
            high=1000.0,
            help="Factor on the standard deviation, for the scale rule sigma alone; 1 by default.",
        ),
    ),
)


def settings(parameters: Mapping[str, object]) -> Settings:
    """Parameters as settings. Raises ParameterInvalid."""
    return presets.settings(SPEC.parse(parameters))


def encode(
    tensors: Tensors,
    parameters: Mapping[str, object],
    *,
    initial: Mapping[str, Any] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> bytes:
    """Tensors as the bytes of a `compeft/1` file; the same input gives the same bytes.

    LoRA factors of at least 1,024 values become ternary, and the tensors that `initial` names (its values: 0, 1, a base
    tensor from which the difference is taken, or a function that reads one); all others stay as they are. Raises
    ParameterInvalid, AdapterInvalid for values that are not finite.
    """
    stream = io.BytesIO()
    write(stream, Arrays(tensors), tensors, settings(parameters), initial=initial or {}, metadata=metadata or {})
    return stream.getvalue()


def decode(
    data: bytes,
    *,
    initial: Initial | None = None,
    budget: Budget = Budget(),  # noqa: B008 - frozen record
) -> dict[str, Array | BF16]:
    """All tensors of a file, in their own dtypes; bfloat16 as BF16, which torch can view without a copy.

    `initial` gives base tensors for entries that are differences. Raises EncodedInvalid, and never returns a part.
    """
    with open_encoded(data, budget=budget) as encoded:
        decoded = dict(encoded.walk(initial))
        decoded |= {name: encoded.tensor(name) for name in encoded.plain}
    return dict(sorted(decoded.items()))


# Two threads of BLAS on small matrices fight for a busy machine's cores, and another order of sums is another file.
@threadpool_limits.wrap(limits=1, user_api="blas")  # type: ignore[untyped-decorator]
def write(
    stream: BinaryIO,
    source: TensorSource,
    tensors: Mapping[str, files.Tensor],
    wanted: Settings,
    *,
    initial: Mapping[str, Any],
    metadata: Mapping[str, str],
    arithmetic: Arithmetic = NUMPY,
    progress: Callable[[float], None] | None = None,
) -> tuple[Written, Ledger]:
    """Encode what `source` reads, one tensor at a time; `tensors` are the same tensors as they stay when plain.

    `progress` hears of the end of the work, when the planes are written: the share of them that is done.
    """
    names = presets.chosen(source, wanted.preset, initial)
    ternariser = Ternariser(source, names, wanted, arithmetic)
    with Writer() as writer:
        for made in ternariser:
            writer.add(made)
        plain = {name: tensor for name, tensor in tensors.items() if name not in names}
        written = writer.finish(stream, plain=plain, metadata={**metadata, **_facts(wanted)}, progress=progress)
    return written, ternariser.ledger


def size_bound(
    tensors: Tensors,
    parameters: Mapping[str, object],
    *,
    initial: Mapping[str, Any] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> int:
    """Bytes that `encode` never exceeds for tensors of these names, shapes and dtypes, whatever their values."""
    wanted = settings(parameters)
    source = Arrays(tensors)
    names = presets.chosen(source, wanted.preset, initial or {})
    claims = {name: source.claim(name) for name in tensors}
    rows = []
    positions = signs = plain = 0
    for name, (dtype, shape) in claims.items():
        size = prod(shape)
        if name not in names:
            plain += size * ITEM_BYTES[dtype]
            continue
        # The published rule keeps ties without limit.
        most = size if wanted.preset == presets.PAPER else selection.count_for(size, wanted.density)
        positions += _plane_bound(size, most)
        signs += (most + 7) // 8
        rows.append([name, dtype, list(shape), size, size + size // 255, planes.MASK, "base"])
    pieces = -(-positions // planes.PIECE_BYTES)
    return shell_bound(claims, sorted(rows), metadata or {}) + 4 * len(rows) + positions + 8 * pieces + signs + plain


def _plane_bound(size: int, most: int) -> int:
    gaps = min(most, (3 * size + 9) // 10) + size // 255
    return max(gaps, (size + 7) // 8) if planes.coding_for(most, size) == planes.MASK else gaps


def _facts(wanted: Settings) -> dict[str, str]:
    facts = {
        "preset": wanted.preset,
        "scale_rule": wanted.scale_rule,
        "density": repr(wanted.density),
        "writer": WRITER,
    }
    return facts if wanted.alpha is None else facts | {"alpha": repr(wanted.alpha)}
