"""Exit status 0 if the totals are those of the ledger beside this file."""

import csv
import sys
from collections import defaultdict
from decimal import Decimal
from pathlib import Path

totals: defaultdict[str, Decimal] = defaultdict(Decimal)
with open("/tests/ledger.csv", newline="") as file:
    for row in csv.DictReader(file):
        totals[row["account"]] += Decimal(row["amount"])
want = [f"{name},{total:.2f}" for name, total in sorted(totals.items(), key=lambda item: (-item[1], item[0]))]
try:
    lines = Path("/app/totals.csv").read_text().splitlines()
except (OSError, ValueError):
    sys.exit(1)
sys.exit(lines != ["account,total", *want])
