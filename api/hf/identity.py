"""Who the key belongs to, and small questions that clients ask beside the real ones."""

from django.http import HttpRequest, HttpResponse, HttpResponseBase, JsonResponse

from api.hf import shapes
from api.hf.door import Caller, endpoint, json_of, refusal, text_of
from registry.checks import cards
from registry.errors import NotFound, UploadInvalid
from registry.models import Membership, Namespace

ROLES = {Membership.Role.OWNER: "admin", Membership.Role.WRITER: "write", Membership.Role.READER: "read"}


@endpoint("GET", "HEAD")
def whoami(_request: HttpRequest, caller: Caller) -> HttpResponseBase:
    """The user behind the key. Any scope will do."""
    user = caller.require(caller.key.scopes[0] if caller.key else "read")
    rows = Membership.objects.filter(user=user, namespace__kind=Namespace.Kind.ORGANISATION)
    organisations = [
        {
            "type": "org",
            "name": row.namespace.name,
            "fullname": row.namespace.name,
            "roleInOrg": ROLES[Membership.Role(row.role)],
            "isEnterprise": False,
        }
        for row in rows.select_related("namespace").order_by("namespace__name")
    ]
    answer = {
        "type": "user",
        "id": f"{user.pk:024x}",
        "name": user.username,
        "fullname": user.get_full_name() or user.username,
        "email": user.email,
        "emailVerified": False,
        "isPro": False,
        "canPay": False,
        "orgs": organisations,
    }
    if caller.key is not None:
        role = "write" if "write" in caller.key.scopes else "read"
        token = {"displayName": caller.key.name, "role": role, "createdAt": shapes.moment(caller.key.created_at)}
        answer["auth"] = {"type": "access_token", "accessToken": token}
    return JsonResponse(answer)


@endpoint("POST")
def validate_yaml(request: HttpRequest, _caller: Caller) -> HttpResponseBase:
    """Whether the front matter of a README.md would be taken; the answer is JSON whatever the verdict."""
    try:
        card = cards.parse(text_of(json_of(request), "content"))
    except UploadInvalid as error:
        body = {"errors": [{"message": error.detail}], "warnings": [], "error": error.detail}
        return JsonResponse(body, status=400)
    warnings = []
    if not card.data:
        warnings.append({"message": "The card has no front matter; licence, base model and tags are unknown."})
    return JsonResponse({"errors": [], "warnings": warnings})


@endpoint("GET", "HEAD")
def agent_harnesses(_request: HttpRequest, _caller: Caller) -> HttpResponseBase:
    """Asked by every client process, to tell programs from people in its user agent; the hub does not want to know."""
    return JsonResponse({"standardEnvVars": [], "harnesses": {}})


@endpoint("GET", "HEAD", "POST", "PUT", "DELETE", "PATCH")
def nowhere(_request: HttpRequest, _caller: Caller, /, **_parts: str) -> HttpResponseBase:
    """An address below /api that this hub does not serve."""
    raise NotFound("There is nothing at this address.")


@endpoint("GET", "HEAD", "POST", "PUT", "DELETE", "PATCH")
def not_implemented(_request: HttpRequest, _caller: Caller, /, **_parts: str) -> HttpResponseBase:
    """A call of the Hub protocol that has no meaning here."""
    return unavailable("This hub has no discussions, pull requests, squashing or LFS transfers.")


def unavailable(message: str) -> HttpResponse:
    return refusal(message, status=501, code="not-implemented")
