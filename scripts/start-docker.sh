#!/bin/sh
# Bring up the sandboxes on a Debian machine without a service manager (a bare container or VM): install what is missing,
# bubblewrap included, start dockerd in the background, wait for it, build the base image. Safe to run again.
set -eu

LOG=${DOCKERD_LOG:-/var/log/dockerd.log}
WAIT_S=60

fail() { echo "start-docker: $1" >&2; exit 1; }

[ "$(id -u)" = 0 ] || fail "must run as root; try: sudo $0"

missing=
command -v dockerd >/dev/null || missing="docker.io"
command -v debootstrap >/dev/null || missing="$missing debootstrap"
command -v bwrap >/dev/null || missing="$missing bubblewrap"
if [ -n "$missing" ]; then
    command -v apt-get >/dev/null || fail "not a Debian system: install $missing yourself"
    echo "start-docker: installing $missing"
    apt-get update -qq || fail "apt-get update failed: no package mirror within reach"
    # shellcheck disable=SC2086  # a list of words
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $missing >/dev/null || fail "apt-get could not install $missing"
fi

if docker info >/dev/null 2>&1; then
    echo "start-docker: the daemon already answers"
else
    echo "start-docker: starting dockerd, log in $LOG"
    # Its own session, so that it outlives this shell.
    setsid dockerd >"$LOG" 2>&1 </dev/null &
    pid=$!
    waited=0
    until docker info >/dev/null 2>&1; do
        kill -0 "$pid" 2>/dev/null || { tail -n 20 "$LOG" >&2; fail "dockerd ended; see $LOG"; }
        [ "$waited" -lt "$WAIT_S" ] || { tail -n 20 "$LOG" >&2; fail "no answer from dockerd within $WAIT_S s; see $LOG"; }
        sleep 1
        waited=$((waited + 1))
    done
    echo "start-docker: the daemon answers after $waited s"
fi

exec "$(dirname "$0")/docker-base.sh"
