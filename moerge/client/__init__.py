"""Client of a hub: references, typed errors, downloads that resume and are verified. Needs no torch."""

from moerge.client.hub import Hub
from moerge.client.pulling import Pulled, pull
from moerge.client.records import File, Job, Snapshot
from moerge.client.references import Reference
from moerge.client.verifying import Verified, verify

__all__ = ["File", "Hub", "Job", "Pulled", "Reference", "Snapshot", "Verified", "pull", "verify"]
