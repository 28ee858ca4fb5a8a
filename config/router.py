"""The router process: gunicorn config.router:application, one worker, several threads, nothing preloaded.

Importing this file starts the threads that load the encoder and follow the index, so only that process does it.
"""

import os

import django

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "config.settings")
django.setup()

from config.router_views import Application  # noqa: E402  # Models can be imported only after the set-up.
from registry.services.router import Router  # noqa: E402

application = Application(Router().start())
