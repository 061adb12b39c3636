#!/usr/bin/env bash
# The peers' environments: FOLDER for all but GPTQ, FOLDER-gptq for llm-compressor, which pins another transformers.
#   benchmarks/quality/peers/setup.sh [FOLDER, default .venv-peers at the root of the repository] [PYTHON]
# On Linux, tell pip where PyTorch's CPU builds are (PIP_EXTRA_INDEX_URL), or it fetches gigabytes of CUDA.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
folder=${1:-$(cd "$here/../../.." && pwd)/.venv-peers}
python=${2:-python3.11}

install() { # ENVIRONMENT REQUIREMENTS
    [ -x "$1/bin/python" ] || "$python" -m venv "$1"
    # torch comes first and alone, and then stays as it is, its build included, whatever the others would like.
    "$1/bin/python" -m pip install --requirement "$here/requirements-torch.txt"
    "$1/bin/python" -m pip freeze | grep '^torch==' >"$1/torch.txt"
    "$1/bin/python" -m pip install --constraint "$1/torch.txt" --requirement "$2"
}

install "$folder" "$here/requirements.txt"
install "$folder-gptq" "$here/requirements-gptq.txt"
echo "ready: $folder/bin/python"
