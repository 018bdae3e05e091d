#!/bin/sh
cd /app/texts && for f in *; do printf '%s\t%d\n' "$f" "$(wc -w <"$f")"; done >/app/counts.tsv
