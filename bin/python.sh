# Sourced by the scripts beside it: sets `root` (the checkout) and `python` (an interpreter that can start local/install.py).
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd -P)
python=
# The environment itself comes first; it fails to start when the interpreter it was made with is gone.
for candidate in "$root/.venv/bin/python" "${PYTHON:-}" python3.11 python3.12 python3 python; do
    [ -n "$candidate" ] || continue
    command -v "$candidate" >/dev/null 2>&1 || continue
    if "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null; then
        python=$candidate
        break
    fi
done
if [ -z "$python" ]; then
    met=$(python3 --version 2>/dev/null || echo "no python3 on PATH")
    echo "Moerge needs Python 3.11 or 3.12 (met: $met)." >&2
    echo "Install one of them, or name it: PYTHON=/path/to/python3.11 bin/$(basename -- "$0")" >&2
    exit 1
fi
# Modules of the checkout are found from every folder.
PYTHONPATH=$root
export PYTHONPATH
