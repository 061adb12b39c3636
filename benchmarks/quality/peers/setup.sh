#!/usr/bin/env bash
# The peers' environments: FOLDER for all but GPTQ, FOLDER-gptq for llm-compressor, which pins another transformers.
#   benchmarks/quality/peers/setup.sh [FOLDER, default .venv-peers at the root of the repository] [PYTHON]
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
folder=${1:-$here/../../../.venv-peers}
python=${2:-python3.11}
# Bounded and first, from PyTorch's CPU builds where the platform has two kinds: else pip fetches gigabytes of CUDA.
torch="torch>=2.10,<2.14"
index=()
if [ "$(uname)" = Linux ] && [ -z "${PEERS_TORCH_FROM_PYPI:-}" ]; then
    index=(--extra-index-url https://download.pytorch.org/whl/cpu)
fi

install() { # ENVIRONMENT REQUIREMENTS
    [ -x "$1/bin/python" ] || "$python" -m venv "$1"
    "$1/bin/python" -m pip install ${index[@]+"${index[@]}"} "$torch"
    # The torch that is there now stays, whatever the others would like.
    "$1/bin/python" -m pip freeze | grep '^torch==' >"$1/torch.txt"
    "$1/bin/python" -m pip install --constraint "$1/torch.txt" --requirement "$2"
}

install "$folder" "$here/requirements.txt"
install "$folder-gptq" "$here/requirements-gptq.txt"
echo "peers: $folder/bin/python"
