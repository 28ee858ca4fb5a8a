"""JSON in the body of a request: what cannot be parsed is refused, however it is broken."""

from collections.abc import Mapping
from typing import IO, Any

from rest_framework import exceptions, parsers

from registry.errors import Fault, RequestMalformed


class JsonParser(parsers.JSONParser):
    """The framework's own, strict about NaN and infinity. Raises RequestMalformed."""

    def parse(
        self, stream: IO[bytes], media_type: str | None = None, parser_context: Mapping[str, Any] | None = None
    ) -> Any:
        try:
            return super().parse(stream, media_type, parser_context)
        except exceptions.ParseError as error:
            raise _malformed(str(error.detail).removeprefix("JSON parse error - ")) from error
        except RecursionError as error:
            raise _malformed("lists or objects in each other, too deep to be read") from error


def _malformed(met: str) -> RequestMalformed:
    fault = Fault("", met, "JSON as of RFC 8259, in UTF-8", "Correct the body.")
    return RequestMalformed(f"The body is not valid JSON: {met}", faults=[fault])
