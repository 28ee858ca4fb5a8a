"""Many stock clients at once download one repository, each into a cache of its own: prints what they got, as JSON.

python many_clients.py REPO COUNT FOLDER
"""

import hashlib
import json
import sys
import threading
from pathlib import Path

from huggingface_hub import snapshot_download

REPO, COUNT, FOLDER = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
start, digests, errors = threading.Barrier(COUNT), [], []


def download(number: int) -> None:
    start.wait()
    try:
        place = Path(snapshot_download(REPO, cache_dir=FOLDER / str(number), max_workers=2))
    except Exception as error:  # noqa: BLE001 - whatever it is, the test wants to know
        errors.append(f"{type(error).__name__}: {error}"[:500])
        return
    digests.append({path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(place.iterdir())})


threads = [threading.Thread(target=download, args=(number,)) for number in range(COUNT)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(json.dumps({"digests": digests, "errors": errors}))  # noqa: T201 - the answer to the test
