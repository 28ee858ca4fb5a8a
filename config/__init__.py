"""The project: settings, URLs and process entry points. Importing it makes the Celery app current."""

from workers.celery import app as celery_app

__all__ = ["celery_app"]
