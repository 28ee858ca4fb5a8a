"""`python -m moerge`: the command without an installed script."""

import sys

from moerge.cli import main

sys.exit(main())
