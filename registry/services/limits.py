"""Settings as the records that the library takes."""

from django.conf import settings

from moerge.tensors.header import Limits


def header_limits() -> Limits:
    """What the header of an uploaded weights file may claim."""
    return Limits(header_bytes=settings.HUB_HEADER_MAX_BYTES, tensor_count=settings.HUB_TENSORS_MAX_COUNT)
