"""The storage that HUB_STORAGE names."""

import importlib

from django.conf import settings

from registry.storage.base import Storage

__all__ = ["Storage", "current"]


def current() -> Storage:
    """The configured storage: registry/storage/<HUB_STORAGE>.py, class <Name>Storage."""
    name: str = settings.HUB_STORAGE
    module = importlib.import_module(f"registry.storage.{name}")
    storage: Storage = getattr(module, f"{name.capitalize()}Storage")(settings.HUB_BLOBS_DIR)
    return storage
