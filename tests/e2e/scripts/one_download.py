"""Stock huggingface_hub fetches one file: prints its SHA-256 as JSON.

python one_download.py REPO PATH
"""

import hashlib
import json
import sys
from pathlib import Path

from huggingface_hub import hf_hub_download

data = Path(hf_hub_download(sys.argv[1], sys.argv[2])).read_bytes()
print(json.dumps({"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}))  # noqa: T201 - the answer to the test
