#!/bin/sh
# Adds up a ledger that came with the tests: the one that the agent had is not trusted.
mkdir -p /logs/verifier
if python3 -I /tests/check.py; then echo 1; else echo 0; fi >/logs/verifier/reward.txt
