"""The web process: gunicorn config.wsgi:application."""

import os

from django.conf import settings
from django.core.wsgi import get_wsgi_application

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "config.settings")
if not settings.DEBUG and settings.SECRET_KEY == settings.DEVELOPMENT_SECRET:
    raise SystemExit("HUB_SECRET_KEY is not set: sessions signed with the development default could be forged.")
application = get_wsgi_application()
