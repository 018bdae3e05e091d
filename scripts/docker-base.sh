#!/bin/sh
# Build the image `posttrain-base` from the Debian mirror this machine is configured with, for machines that cannot
# pull images. Nothing is done when the image exists and is of this kind; `--force` builds it again.
set -eu

IMAGE=posttrain-base
SUITE=bookworm

fail() { echo "docker-base: $1" >&2; exit 1; }

[ "$(id -u)" = 0 ] || fail "must run as root (debootstrap makes device nodes); try: sudo $0"
command -v docker >/dev/null || fail "docker is missing; run scripts/start-docker.sh"
command -v debootstrap >/dev/null || fail "debootstrap is missing; run: apt-get install debootstrap"
docker info >/dev/null 2>&1 || fail "the Docker daemon does not answer; run scripts/start-docker.sh"

have=$(docker image inspect --format '{{index .Config.Labels "posttrain.gate"}}' "$IMAGE" 2>/dev/null || true)
if [ "${1:-}" != --force ] && [ "$have" = 1 ]; then
    echo "docker-base: image $IMAGE exists"
    exit 0
fi

# The first archive that apt itself fetches $SUITE's main component from; empty leaves debootstrap's own default.
mirror=$(apt-get indextargets --format '$(CREATED_BY) $(CODENAME) $(COMPONENT) $(REPO_URI)' 2>/dev/null |
    awk -v suite="$SUITE" '$1 == "Packages" && $2 == suite && $3 == "main" { print $4; exit }')

root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
trap 'exit 130' INT TERM

echo "docker-base: installing Debian $SUITE with python3 into $root (about a minute)"
# Extra packages that a shell task expects: python3 for the code, procps and coreutils are small. The last two are the
# way out of a sandbox that may have one (envs/sandbox/docker_gate.py).
debootstrap --variant=minbase --include=python3-minimal,python3,procps,tinyproxy-bin,socat "$SUITE" "$root" ${mirror:+"$mirror"} \
    >"$root.log" 2>&1 || { tail -n 20 "$root.log" >&2; fail "debootstrap failed; its whole log is $root.log"; }
rm -f "$root.log"

# An image needs neither the package cache nor the documentation, and must not name the mirror it was built from.
rm -rf "$root"/var/cache/apt/* "$root"/var/lib/apt/lists/* "$root"/usr/share/doc/* "$root"/usr/share/man/* \
    "$root"/usr/share/locale/* "$root"/var/log/* "$root"/etc/apt/sources.list "$root"/etc/apt/apt.conf.d/*proxy*
# Settings of the building machine that debootstrap copies.
echo localhost >"$root/etc/hostname"
: >"$root/etc/resolv.conf"
mkdir -p "$root/work"

echo "docker-base: importing as $IMAGE"
tar -C "$root" --numeric-owner -c . |
    docker import --change 'WORKDIR /work' --change 'ENV LANG=C.UTF-8' --change 'CMD ["/bin/sh"]' \
        --change 'LABEL posttrain.gate=1' - "$IMAGE" >/dev/null
docker image inspect --format 'docker-base: image {{index .RepoTags 0}}, {{.Size}} bytes' "$IMAGE"
