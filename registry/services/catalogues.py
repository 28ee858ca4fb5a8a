"""What the library can do, written into rows, so that web processes check requests without loading the maths."""

from dataclasses import asdict
from typing import Any

from django.db import transaction

from moerge import compression, merging, routing
from registry.models import Method


def sync() -> int:
    """Write every merge method, codec and route strategy; forget those that are gone. Returns how many there are."""
    wanted: dict[tuple[str, str], dict[str, Any]] = {}
    for spec in merging.catalogue().values():
        wanted[Method.Family.MERGE, spec.name] = asdict(spec)
    for module in compression.catalogue().values():
        wanted[Method.Family.CODEC, module.SPEC.name] = module.SPEC.describe()
    for module in routing.catalogue().values():
        wanted[Method.Family.STRATEGY, module.SPEC.name] = asdict(module.SPEC)
    with transaction.atomic():
        for (family, name), spec_fields in wanted.items():
            Method.objects.update_or_create(
                family=family, name=name, defaults={"version": str(spec_fields.get("version", 1)), "spec": spec_fields}
            )
        for row in Method.objects.all():
            if (row.family, row.name) not in wanted:
                row.delete()
    return len(wanted)
