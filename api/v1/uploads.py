"""Uploads: promise files, send each in chunks that can be resumed, complete. Bodies are read as streams."""

import re
from typing import Any
from urllib.parse import quote

from drf_spectacular.types import OpenApiTypes
from drf_spectacular.utils import OpenApiParameter, OpenApiResponse, extend_schema
from rest_framework import serializers as s
from rest_framework.parsers import BaseParser
from rest_framework.request import Request
from rest_framework.response import Response

from api.authentication import require
from api.v1 import schemas
from api.v1.base import View
from registry.errors import Fault, RequestMalformed
from registry.models import Revision, Upload, UploadFile
from registry.services import uploads
from registry.services.uploads import Claim, Range

CONTENT_RANGE = re.compile(r"bytes (?:(\d{1,15})-(\d{1,15})|\*)/(\d{1,15})")


class UploadClaim(schemas.StrictSerializer):
    path = s.CharField(trim_whitespace=False, allow_blank=True, max_length=1000)
    size = s.IntegerField(min_value=0, max_value=2**50, help_text="Bytes.")
    sha256 = s.CharField(max_length=200)


class UploadCard(schemas.StrictSerializer):
    """Card fields given beside the files; they win over README.md."""

    description = s.CharField(required=False, allow_blank=True)
    examples = s.ListField(child=s.CharField(), required=False)
    instruction = s.CharField(required=False, allow_blank=True, help_text="What it does, as an order to somebody.")
    licence = s.CharField(required=False, allow_blank=True)
    base_model = s.CharField(required=False, allow_blank=True, allow_null=True)
    tags = s.ListField(child=s.CharField(), required=False)


class UploadCompression(schemas.StrictSerializer):
    """The compressed form that the pipeline makes; what is left out follows from the base model's size."""

    preset = s.JSONField(required=False, allow_null=True, help_text="default, paper, hq or int4.")
    density = s.JSONField(required=False, allow_null=True, help_text="Share of values kept, above 0 and below 1.")
    scale_rule = s.JSONField(required=False, allow_null=True, help_text="A scale rule of the preset.")
    alpha = s.JSONField(required=False, allow_null=True, help_text="The factor of preset paper, rule sigma.")


class UploadRequest(schemas.StrictSerializer):
    expert = s.CharField(max_length=200, help_text="owner/name; made when the upload completes if there is none.")
    private = s.BooleanField(required=False, default=False)
    files = UploadClaim(many=True, allow_empty=True)
    message = s.CharField(required=False, allow_blank=True, max_length=300, default="")
    card = UploadCard(required=False)
    compression = UploadCompression(required=False)
    parent_commit = s.RegexField(r"^[0-9a-f]{40}$", required=False, help_text="Refuse when main is not here.")


class CompleteRequest(schemas.StrictSerializer):
    card = UploadCard(required=False)
    message = s.CharField(required=False, allow_blank=True, max_length=300, default="")


class UploadedFile(s.Serializer[Any]):
    path = s.CharField()
    url = s.CharField(help_text="PUT the bytes here, with Content-Range when not all at once.")
    offset = s.IntegerField(help_text="Bytes that have arrived.")
    size = s.IntegerField()
    sha256 = s.CharField()


class IgnoredFile(s.Serializer[Any]):
    path = s.CharField()
    reason = s.CharField()


class UploadRecord(s.Serializer[Any]):
    id = s.CharField()
    expert = s.CharField()
    state = s.ChoiceField(Upload.State.choices)
    expires_at = s.DateTimeField()
    files = UploadedFile(many=True)
    ignored = IgnoredFile(many=True, required=False, help_text="Leftovers of training that need not be sent.")
    revision = s.CharField(allow_null=True)


class ReceivedRecord(s.Serializer[Any]):
    path = s.CharField()
    offset = s.IntegerField()
    size = s.IntegerField()
    complete = s.BooleanField()


class CompletedJob(s.Serializer[Any]):
    id = s.CharField()
    kind = s.CharField()
    state = s.CharField()


class CompletedRecord(s.Serializer[Any]):
    expert = s.CharField()
    revision = s.CharField()
    state = s.CharField()
    jobs = CompletedJob(many=True)
    warnings = s.ListField(child=s.CharField())


class RawParser(BaseParser):
    """Takes any body and leaves it unread: the view reads the stream."""

    media_type = "*/*"

    def parse(self, stream: Any, media_type: Any = None, parser_context: Any = None) -> dict[str, Any]:  # noqa: ARG002
        return {}


class Uploads(View):
    """POST the promise of files."""

    @extend_schema(
        operation_id="uploads_start",
        request=UploadRequest,
        responses={201: UploadRecord, **schemas.problems(400, 403, 413, 415, 422)},
    )
    def post(self, request: Request) -> Response:
        user = require(request, "write")
        body = UploadRequest(data=request.data)
        body.is_valid(raise_exception=True)
        data = body.validated_data
        started = uploads.start(
            user=user,
            expert=data["expert"],
            private=data["private"],
            claims=[Claim(file["path"], file["size"], file["sha256"].lower()) for file in data["files"]],
            message=data["message"],
            card=data.get("card"),
            compression=data.get("compression"),
            parent_commit=data.get("parent_commit", ""),
        )
        record = upload_record(started.upload, [(row, row.offset) for row in started.files], request)
        record["ignored"] = [{"path": path, "reason": reason} for path, reason in started.ignored]
        return Response(record, status=201)


class OneUpload(View):
    """GET how far each file is, DELETE to give up."""

    @extend_schema(operation_id="uploads_read", responses={200: UploadRecord, **schemas.problems(403, 404)})
    def get(self, request: Request, upload_id: str) -> Response:
        upload = uploads.find(user=require(request, "write"), upload_id=upload_id)
        return Response(upload_record(upload, uploads.offsets(upload), request))

    @extend_schema(
        operation_id="uploads_abort",
        responses={204: OpenApiResponse(description="Given up."), **schemas.problems(403, 404, 409)},
    )
    def delete(self, request: Request, upload_id: str) -> Response:
        uploads.abort(user=require(request, "write"), upload_id=upload_id)
        return Response(status=204)


class UploadContent(View):
    """PUT bytes of one file."""

    parser_classes = (RawParser,)

    @extend_schema(
        operation_id="uploads_put",
        parameters=[
            OpenApiParameter(
                "Content-Range",
                str,
                OpenApiParameter.HEADER,
                description="bytes first-last/size; without it, all bytes.",
            )
        ],
        request={"application/octet-stream": OpenApiTypes.BINARY},
        responses={200: ReceivedRecord, **schemas.problems(400, 403, 404, 409, 413, 416, 422)},
    )
    def put(self, request: Request, upload_id: str, file_path: str) -> Response:
        user = require(request, "write")
        plain = request._request  # noqa: SLF001 - the framework's own request would read the whole body
        row, offset = uploads.put_chunk(
            user=user, upload_id=upload_id, path=file_path, stream=plain, where=place_of(request)
        )
        return Response(
            {"path": row.path, "offset": offset, "size": row.size_bytes, "complete": offset == row.size_bytes},
            headers={"Upload-Offset": str(offset)},
        )


class CompleteUpload(View):
    """POST to make a revision of what was sent."""

    @extend_schema(
        operation_id="uploads_complete",
        request=CompleteRequest,
        responses={200: CompletedRecord, **schemas.problems(400, 403, 404, 409, 412, 413, 415, 422)},
    )
    def post(self, request: Request, upload_id: str) -> Response:
        user = require(request, "write")
        body = CompleteRequest(data=request.data)
        body.is_valid(raise_exception=True)
        _, revision = uploads.complete(
            user=user,
            upload_id=upload_id,
            card=body.validated_data.get("card"),
            message=body.validated_data["message"],
        )
        return Response(completed_record(revision))


def place_of(request: Request) -> Range:
    """Which bytes the body of a PUT is: by Content-Range, else all of them. Raises RequestMalformed."""
    # Without a length there is no body, unless it is sent in pieces of unknown number.
    length = request.headers.get("Content-Length") or "0"
    if not length.isdigit() or "Transfer-Encoding" in request.headers:
        raise RequestMalformed(
            "The length of the body is not known.",
            faults=[Fault("Content-Length", length, "the number of bytes", "Send a Content-Length header.")],
        )
    header = request.headers.get("Content-Range")
    if header is None:
        return Range(0, int(length))
    found = CONTENT_RANGE.fullmatch(header.strip())
    wanted = "bytes first-last/size"
    if found is None or found[1] is None:
        raise RequestMalformed("Content-Range cannot be read.", faults=[Fault("Content-Range", header[:100], wanted)])
    first, last, size = int(found[1]), int(found[2]), int(found[3])
    if last < first or last >= size or last + 1 - first != int(length):
        raise RequestMalformed(
            "Content-Range and the body do not fit.",
            faults=[
                Fault(
                    "Content-Range",
                    f"{header[:100]} with {length} bytes",
                    wanted,
                    "last counts from 0 and is sent too.",
                )
            ],
        )
    return Range(first, last + 1)


def upload_record(upload: Upload, rows: list[tuple[UploadFile, int]], request: Request) -> dict[str, Any]:
    return {
        "id": upload.pk,
        "expert": upload.expert_name,
        "state": upload.state,
        "expires_at": upload.expires_at.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "files": [
            {
                "path": row.path,
                "url": request.build_absolute_uri(f"/api/v1/uploads/{upload.pk}/files/{quote(row.path)}"),
                "offset": offset,
                "size": row.size_bytes,
                "sha256": row.sha256,
            }
            for row, offset in rows
        ],
        "revision": upload.revision.commit if upload.revision else None,
    }


def completed_record(revision: Revision) -> dict[str, Any]:
    assert revision.expert is not None
    return {
        "expert": revision.expert.full_name,
        "revision": revision.commit,
        "state": revision.state,
        "jobs": [{"id": job.pk, "kind": job.kind, "state": job.state} for job in revision.jobs.all()],
        "warnings": revision.facts.get("warnings", []),
    }
