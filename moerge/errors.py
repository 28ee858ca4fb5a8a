"""Errors of the library.

MoergeError
 ├─ HeaderInvalid       a safetensors header breaks a rule
 ├─ ConfigInvalid       an adapter_config.json breaks a rule
 ├─ AdapterInvalid      tensors and config do not fit together, or the kind is not supported
 ├─ CheckpointInvalid   a folder holds no readable full checkpoint
 ├─ EncodedInvalid      an encoded file (compeft/1, int4/1) breaks a numbered rule of its format
 ├─ BaseMismatch        an encoded difference needs a base checkpoint, and this is not the one
 ├─ ParameterInvalid    a codec parameter is unknown or outside its range
 ├─ RecipeInvalid       a merge recipe is malformed: unknown method, unknown parameter, value out of range
 ├─ ExpertsIncompatible experts of one recipe cannot be merged with each other
 ├─ StatisticsInvalid   statistics beside an adapter do not fit it, or hold what no statistics can
 ├─ QueryInvalid        a routing query breaks a rule
 ├─ IndexInvalid        vectors or a saved index do not fit what the routing index holds
 ├─ GatesInvalid        token-level gates do not fit their adapter, or are no gates
 ├─ PackInvalid         a routing pack, or prototypes, are not what their format says
 ├─ EncoderInvalid      the installed encoder is not the one known here
 └─ ExtraMissing        an optional part of the library is not installed

Every error carries what was met, what was wanted and what to do about it, so that each door can show it.
"""


class MoergeError(Exception):
    """Something the caller handed in is wrong, and this says what, where and what to do.

    `pointer` names the field (a JSON pointer for configs and recipes, a tensor or file name otherwise),
    `rule` the stable id of the broken rule where a format numbers its rules.
    """

    def __init__(
        self,
        detail: str,
        *,
        pointer: str = "",
        met: object = None,
        wanted: object = None,
        remedy: str = "",
        rule: str = "",
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        self.pointer = pointer
        self.met = met
        self.wanted = wanted
        self.remedy = remedy
        self.rule = rule


class HeaderInvalid(MoergeError):
    """A safetensors header is malformed or breaks one of the rules a hub adds to the format."""


class ConfigInvalid(MoergeError):
    """An adapter_config.json is not strict JSON, too large, or holds a value that no adapter can have."""


class AdapterInvalid(MoergeError):
    """Tensors and config disagree, a value is NaN or infinite, or this kind of adapter is not supported."""


class EncodedInvalid(MoergeError):
    """An encoded file breaks a rule of its format; `rule` says which."""


class CheckpointInvalid(MoergeError):
    """A folder or file holds no full checkpoint in safetensors, or shards that do not fit together."""


class BaseMismatch(MoergeError):
    """The base checkpoint is missing, or is not the one that the differences were taken from."""


class ParameterInvalid(MoergeError):
    """A parameter of a codec is unknown, of the wrong type, or outside its range."""


class RecipeInvalid(MoergeError):
    """A recipe names an unknown method or parameter, or a value outside its range."""


class ExpertsIncompatible(MoergeError):
    """The experts of one recipe have different bases, kinds or shapes."""


class StatisticsInvalid(MoergeError):
    """Statistics beside an adapter are malformed, do not fit its modules, or are not finite."""


class QueryInvalid(MoergeError):
    """A routing query is empty, too long, or asks for more than is allowed."""


class IndexInvalid(MoergeError):
    """Vectors have the wrong width, a card too many examples, or a saved index is not what was saved."""


class EncoderInvalid(MoergeError):
    """The weights of the packaged encoder are not those that the vectors in use were made with."""


class GatesInvalid(MoergeError):
    """A gate has no module in the adapter, another width than it, is not finite or is zero; or metadata is wrong."""


class PackInvalid(MoergeError):
    """A routing pack or a file of prototypes breaks its format, or what is to go into one does not fit together."""


class ExtraMissing(MoergeError, ImportError):
    """A part of the library was asked for whose own dependencies are not installed."""
