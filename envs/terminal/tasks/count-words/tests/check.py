"""Exit status 0 if the counts are right."""

import sys
from pathlib import Path

WANT = [("a.txt", 4), ("b.txt", 3), ("empty.txt", 0), ("long.txt", 250)]
try:
    lines = Path("/app/counts.tsv").read_text().splitlines()
except (OSError, ValueError):
    sys.exit(1)
sys.exit(lines != [f"{name}\t{count}" for name, count in WANT])
