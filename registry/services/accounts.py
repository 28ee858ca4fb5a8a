"""People and the namespaces they publish under."""

from django.contrib.auth import password_validation
from django.core.exceptions import ValidationError
from django.db import IntegrityError, transaction

from registry.checks import names
from registry.errors import Fault, NameInvalid, NameTaken, RequestInvalid
from registry.models import Membership, Namespace, User
from registry.services import audit


def create_user(*, name: str, password: str, email: str = "", is_admin: bool = False) -> User:
    """Make a user and the namespace of the same name, which the user owns.

    Raises NameInvalid, NameTaken (also for look-alikes), RequestInvalid for a weak password.
    """
    # Administrators are made on the machine itself and may carry names that are reserved for the public.
    if is_admin:
        names.check_part(name, pointer="/name")
    else:
        names.check_owner(name, pointer="/name")
    if len(name) > 96:
        raise NameInvalid(f"{name!r} is too long.", faults=[Fault("/name", len(name), "at most 96 characters")])
    try:
        password_validation.validate_password(password)
    except ValidationError as error:
        raise RequestInvalid(
            "The password is too weak.",
            faults=[
                Fault("/password", "a weak password", " ".join(error.messages), "Choose a longer, less common one.")
            ],
        ) from error
    try:
        with transaction.atomic():
            namespace = create_namespace(name, kind=Namespace.Kind.USER)
            user = User.objects.create_user(username=name, password=password, email=email, is_staff=is_admin)
            user.is_superuser = is_admin
            user.save(update_fields=["is_superuser"])
            Membership.objects.create(namespace=namespace, user=user, role=Membership.Role.OWNER)
            audit.record(user, "user.create", name)
    except IntegrityError as error:
        raise taken(name) from error
    return user


def create_namespace(name: str, *, kind: str) -> Namespace:
    """Claim an owner name inside the caller's transaction. Raises NameTaken for equal and look-alike names."""
    key = names.strict_key(name)
    if Namespace.objects.filter(key=key).exists():
        raise taken(name)
    return Namespace.objects.create(name=name, key=key, kind=kind)


def taken(name: str) -> NameTaken:
    fault = Fault("/name", name, "a name that nobody has, nor one that looks like it", "Choose another name.", "N2")
    return NameTaken(f"{name!r} is taken, or looks like a name that is.", faults=[fault])
