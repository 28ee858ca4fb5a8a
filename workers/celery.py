"""The Celery app: two queues, late acknowledgement, quick redelivery. Truth about a job is its row, not its message."""

import importlib
import os
import threading

from celery import Celery
from celery.schedules import crontab
from celery.signals import worker_process_init
from kombu import Queue

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "config.settings")

NICENESS = 5
# After the other processes of a hub that is just being started have loaded what they need.
WARM_AFTER_SECONDS = 20

app = Celery("moerge")
app.config_from_object("django.conf:settings", namespace="CELERY")
app.conf.update(
    task_queues=[Queue("light"), Queue("heavy")],
    task_default_queue="light",
    task_acks_late=True,
    task_reject_on_worker_lost=True,
    worker_prefetch_multiplier=1,
    task_ignore_result=True,
    worker_hijack_root_logger=False,
    worker_send_task_events=False,
    broker_connection_retry_on_startup=True,
    # Kombu looks for lost messages only every interval x throttle seconds; the defaults make that 100.
    broker_transport_options={
        "visibility_timeout": 4 * 3600,
        "unacked_restore_interval": 2,
        "unacked_restore_throttle": 1,
        "socket_timeout": 5,
        "socket_connect_timeout": 2,
        "socket_keepalive": True,
    },
    broker_connection_timeout=2,
    # The producer must give up quickly: the row is there, and the sweeper sends it later.
    task_publish_retry=False,
    imports=("workers.tasks",),
    beat_schedule={
        "sweep": {"task": "workers.sweep", "schedule": 10.0, "options": {"queue": "light", "expires": 30}},
        "clean": {"task": "workers.clean", "schedule": 600.0, "options": {"queue": "light", "expires": 600}},
        "snapshot": {"task": "workers.snapshots", "schedule": 30.0, "options": {"queue": "light", "expires": 30}},
        "snapshot-nightly": {
            "task": "workers.snapshots",
            "schedule": crontab(hour=3, minute=10),
            "kwargs": {"is_due": True},
            "options": {"queue": "light", "expires": 3600},
        },
    },
)


@worker_process_init.connect
def warm(**_: object) -> None:
    """Load in each child of a pool what every merge is checked by: that takes ten seconds, and readers may wait.

    In a thread, so that jobs which need none of it begin at once. The parent, which forks, never loads it. What is
    computed yields to what is answered where both share the processors.
    """
    os.nice(NICENESS)
    timer = threading.Timer(WARM_AFTER_SECONDS, importlib.import_module, args=("peft",))
    timer.daemon = True
    timer.start()
