#!/bin/sh
# The counts are known: the texts that the agent may have changed are not read.
mkdir -p /logs/verifier
if python3 -I /tests/check.py; then echo 1; else echo 0; fi >/logs/verifier/reward.txt
