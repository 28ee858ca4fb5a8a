"""The rows of the hub. PostgreSQL holds the truth; index, compressed forms and counters can be rebuilt from it."""

from registry.models.accounts import ApiKey, AuditEvent, Membership, Namespace, User
from registry.models.bases import BaseAlias, BaseModel
from registry.models.experts import Blob, Encoded, Evaluation, Expert, File, Ref, Revision
from registry.models.jobs import Job
from registry.models.merges import Kinship, Merge, MergeParent, Method, Recipe
from registry.models.routing import (
    Embedding,
    Encoder,
    Fingerprint,
    Neighbour,
    RoutingChange,
    RoutingClock,
    RoutingEvaluation,
    RoutingSnapshot,
)
from registry.models.uploads import Upload, UploadFile

__all__ = [
    "ApiKey",
    "AuditEvent",
    "BaseAlias",
    "BaseModel",
    "Blob",
    "Embedding",
    "Encoded",
    "Encoder",
    "Evaluation",
    "Expert",
    "File",
    "Fingerprint",
    "Job",
    "Kinship",
    "Membership",
    "Merge",
    "MergeParent",
    "Method",
    "Namespace",
    "Neighbour",
    "Recipe",
    "Ref",
    "Revision",
    "RoutingChange",
    "RoutingClock",
    "RoutingEvaluation",
    "RoutingSnapshot",
    "Upload",
    "UploadFile",
    "User",
]
