"""Who is calling: a Bearer key from scripts, the session from pages; and what the key allows."""

from django.contrib.auth.models import AnonymousUser
from drf_spectacular.extensions import OpenApiAuthenticationExtension
from rest_framework.authentication import BaseAuthentication
from rest_framework.request import Request

from registry.errors import Fault, ScopeMissing, Unauthenticated
from registry.models import ApiKey, User
from registry.services import keys

INVALID = "Invalid credentials in Authorization header"


def key_of(header: str) -> ApiKey | None:
    """The key in an Authorization header; None without one. Raises Unauthenticated for a key that is not valid."""
    scheme, _, secret = header.partition(" ")
    if not header or scheme.lower() not in {"bearer", "basic"}:
        return None
    if scheme.lower() == "basic":
        return None
    key = keys.check(secret.strip())
    if key is None:
        raise Unauthenticated(
            INVALID,
            faults=[
                Fault(
                    "Authorization",
                    "a key that is unknown, expired or revoked",
                    "Bearer <key>",
                    "Make a new key under Settings → API keys.",
                )
            ],
        )
    return key


class KeyAuthentication(BaseAuthentication):
    """Authorization: Bearer <key>."""

    def authenticate(self, request: Request) -> tuple[User, ApiKey] | None:
        key = key_of(request.headers.get("Authorization", ""))
        return None if key is None else (key.user, key)

    def authenticate_header(self, _request: Request) -> str:
        return 'Bearer realm="moerge"'


class KeyScheme(OpenApiAuthenticationExtension):  # type: ignore[no-untyped-call]
    """How the key appears in the OpenAPI file."""

    target_class = "api.authentication.KeyAuthentication"
    name = "apiKey"

    def get_security_definition(self, auto_schema: object) -> dict[str, str]:  # noqa: ARG002 - the extension's signature
        return {"type": "http", "scheme": "bearer", "description": "An API key with the scope the operation names."}


def require(request: Request, scope: str) -> User:
    """The caller, who must be known and whose key must carry `scope`; a signed-in session carries all scopes but admin.

    Raises Unauthenticated or ScopeMissing.
    """
    return allow(request.user, request.auth if isinstance(request.auth, ApiKey) else None, scope)


def viewer_of(request: Request) -> User | AnonymousUser:
    """Whose eyes a read has: a key without scope read sees what everybody sees."""
    if isinstance(request.auth, ApiKey) and "read" not in request.auth.scopes:
        return AnonymousUser()
    return request.user


def allow(user: User | AnonymousUser, key: ApiKey | None, scope: str) -> User:
    if not isinstance(user, User) or not user.is_active:
        raise Unauthenticated(
            "This needs an API key.",
            faults=[
                Fault("Authorization", "nothing", "Bearer <key>", "Make a key under Settings → API keys and send it.")
            ],
        )
    if isinstance(key, ApiKey) and scope not in key.scopes:
        raise ScopeMissing(
            f"The key {key.prefix}… may not do this.",
            faults=[Fault("Authorization", key.scopes, f"a key with scope {scope}", f"Make a key with scope {scope}.")],
        )
    return user
