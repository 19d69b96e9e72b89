#!/usr/bin/env bash
# The engines that bench/peers.py and bench/serve.py hold ours against, for this processor, in a folder of its own: QWEN2_PEERS, or
# .peers in this checkout. peers.py looks for them there; serve.py takes --llama-server .peers/build/bin/llama-server. A step that is
# done is not done again.
#
#     bench/setup_peers.sh                    # everything: about 20 minutes of compiling, 5 GB
#     bench/setup_peers.sh --dry-run          # the commands alone
#     bench/setup_peers.sh source configure   # some of the steps: source configure build llama others weights
#
# source      llama-cpp-python's sdist, which carries llama.cpp, and an environment with what builds it
# configure   llama.cpp as its own build would be on this machine: every instruction set that the processor has (GGML_NATIVE)
# build       its libraries and llama-server
# llama       llama-cpp-python around these libraries
# others      OpenVINO GenAI and CTranslate2; torch and transformers are those of .venv (make install-dev)
# weights     the 0.5B as these two read it: Q8_0 blocks, and CTranslate2's int8
#
# Left out: builds for a part of the instruction sets (peers.py --isa); its docstring says how.
set -euo pipefail
cd "$(dirname "$0")/.."
peers=$(realpath -m "${QWEN2_PEERS:-.peers}")
version=0.3.36 # of llama-cpp-python
sdist=$peers/llama_cpp_python-$version
model=qwen2.5-coder:0.5b
steps=(source configure build llama others weights)
dry=
if [ "${1:-}" = --dry-run ]; then dry=1; shift; fi
if [ $# -eq 0 ]; then set -- "${steps[@]}"; fi

run() {
    printf '+ %s\n' "$*" >&2
    [ -n "$dry" ] || "$@"
}

here() { # whether a step left this behind already
    if [ -n "$dry" ] || [ ! -e "$1" ]; then return 1; fi
    echo "setup_peers: $1 is there" >&2
}

need() { # what an earlier step leaves behind
    if [ -n "$dry" ] || [ -e "$1" ]; then return 0; fi
    echo "setup_peers: $1 is missing; first: bench/setup_peers.sh $2" >&2
    exit 1
}

do_source() {
    if here "$sdist/vendor/llama.cpp"; then return; fi
    run mkdir -p "$peers"
    run python3 -m venv "$peers/llama"
    run "$peers/llama/bin/pip" install -q "scikit-build-core[pyproject]" hatchling setuptools cmake ninja numpy typing-extensions diskcache jinja2
    run "$peers/llama/bin/pip" download -q --no-deps --no-binary :all: --no-build-isolation -d "$peers" "llama-cpp-python==$version"
    run tar -xzf "$sdist.tar.gz" -C "$peers"
}

do_configure() {
    if here "$peers/build/build.ninja"; then return; fi
    need "$sdist/vendor/llama.cpp" source
    run "$peers/llama/bin/cmake" -S "$sdist/vendor/llama.cpp" -B "$peers/build" -G Ninja \
        "-DCMAKE_MAKE_PROGRAM=$peers/llama/bin/ninja" -DCMAKE_BUILD_TYPE=Release \
        -DGGML_NATIVE=ON -DLLAMA_CURL=OFF -DLLAMA_BUILD_TESTS=OFF -DBUILD_SHARED_LIBS=ON
}

do_build() {
    if here "$peers/build/bin/llama-server"; then return; fi
    need "$peers/build/build.ninja" configure
    run "$peers/llama/bin/cmake" --build "$peers/build" --target llama-server
}

do_llama() {
    need "$peers/build/bin/llama-server" build
    run env CMAKE_ARGS=-DLLAMA_BUILD=OFF "$peers/llama/bin/pip" install -q --no-build-isolation --no-deps "$sdist.tar.gz"
    local packages=$peers/llama/lib/python/site-packages
    if [ -z "$dry" ]; then packages=$("$peers/llama/bin/python" -c "import sysconfig; print(sysconfig.get_paths()['purelib'])"); fi
    run mkdir -p "$packages/llama_cpp/lib"
    for library in "$peers"/build/bin/*.so*; do
        run ln -sf "$library" "$packages/llama_cpp/lib/"
    done
    run "$peers/llama/bin/python" -c "import llama_cpp; print('llama.cpp', llama_cpp.llama_print_system_info().decode())"
}

do_others() {
    need .venv/bin/python "others, after make install-dev"
    run .venv/bin/python -m venv "$peers/others"
    run "$peers/others/bin/pip" install -q --no-deps openvino-genai openvino-tokenizers openvino openvino-telemetry ctranslate2 numpy pyyaml
    # torch and transformers, which CTranslate2's converter imports, are not installed twice
    run .venv/bin/python -c "import sys, sysconfig, pathlib
ours, theirs = sysconfig.get_paths()['purelib'], sysconfig.get_paths(vars={'base': sys.argv[1], 'platbase': sys.argv[1]})['purelib']
pathlib.Path(theirs, 'checkout.pth').write_text(ours + '\n')" "$peers/others"
}

do_weights() {
    need "$peers/others/bin/python" others
    if ! here "$peers/q8_0.gguf"; then run .venv/bin/qwen2 quantize "$model" "$peers/q8_0.gguf" --to q8_0; fi
    if here "$peers/int8"; then return; fi
    run .venv/bin/qwen2 export "$model" "$peers/hf" --to f32
    run "$peers/others/bin/ct2-transformers-converter" --model "$peers/hf" --quantization int8 --output_dir "$peers/int8"
    run rm -r "$peers/hf"
}

for step in "$@"; do
    case " ${steps[*]} " in
        *" $step "*) ;;
        *) echo "setup_peers: $step: unknown; the steps are ${steps[*]}" >&2; exit 2 ;;
    esac
done
for step in "$@"; do
    echo "setup_peers: $step" >&2
    "do_$step"
done
