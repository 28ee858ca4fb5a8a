"""Recipes as YAML in the body of a request, this hub's own or mergekit's."""

from collections.abc import Mapping
from typing import IO, Any

from rest_framework.parsers import BaseParser

from moerge.errors import MoergeError
from moerge.merging import documents
from registry.errors import RecipeInvalid, RequestMalformed


class YamlParser(BaseParser):
    """The values of a recipe, as from JSON. Raises RequestMalformed for what is no YAML, RecipeInvalid by field."""

    media_type = "application/yaml"

    def parse(
        self,
        stream: IO[bytes],
        media_type: str | None = None,  # noqa: ARG002 - the framework's signature
        parser_context: Mapping[str, Any] | None = None,  # noqa: ARG002
    ) -> dict[str, Any]:
        try:
            return documents.read(stream.read(documents.LARGEST_BYTES + 1), kind="yaml")
        except MoergeError as error:
            raise (RecipeInvalid if error.pointer else RequestMalformed).of(error) from error


class TextYamlParser(YamlParser):
    """The same under the older name of the media type."""

    media_type = "text/yaml"


PARSERS = (YamlParser, TextYamlParser)
