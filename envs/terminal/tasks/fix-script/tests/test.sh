#!/bin/sh
# The agent's script runs as nobody, so that it cannot write what this one writes.
mkdir -p /logs/verifier
if python3 -I /tests/check.py; then echo 1; else echo 0; fi >/logs/verifier/reward.txt
