#!/bin/sh
cd /app && python3 - <<'END'
import csv
from collections import defaultdict
from decimal import Decimal
totals = defaultdict(Decimal)
for row in csv.DictReader(open("ledger.csv")):
    totals[row["account"]] += Decimal(row["amount"])
with open("totals.csv", "w") as out:
    out.write("account,total\n")
    for name, total in sorted(totals.items(), key=lambda item: (-item[1], item[0])):
        out.write(f"{name},{total:.2f}\n")
END
