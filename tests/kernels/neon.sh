#!/usr/bin/env bash
# The kernels for Arm (NEON) on a processor of another kind: cross-compiled into build/neon, then the tests that are given, or all
# that say something about kernels, with the library in an emulator (remote.py). Needs g++-aarch64-linux-gnu, qemu-user and cmake.
#
#     tests/kernels/neon.sh                                    # everything, in about two minutes
#     tests/kernels/neon.sh tests/kernels/test_products.py -x  # whatever pytest takes
set -euo pipefail
cd "$(dirname "$0")/../.."
cross=aarch64-linux-gnu-g++
python=${PYTHON:-.venv/bin/python}
for tool in "$cross" qemu-aarch64 cmake; do
    command -v "$tool" >/dev/null || { echo "neon: $tool is missing; on Debian: apt-get install g++-aarch64-linux-gnu qemu-user cmake" >&2; exit 1; }
done

cmake -S . -B build/neon -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER="$cross" >/dev/null
cmake --build build/neon -j 2 >/dev/null
"$cross" -std=c++17 -O2 -Wall -Wextra tests/kernels/neon_main.cpp -ldl -o build/neon/neon_main

# The longest sequences are left out, and most of the whole models: they say what the others say, in a quarter of an hour.
if [ $# -eq 0 ]; then
    bits=tests/engine/test_same_bits.py
    set -- -n 2 tests/kernels/test_products.py tests/kernels/test_mixture.py tests/kernels/test_attention.py tests/model/test_packed_network.py \
        tests/quant/test_pack.py::test_no_trial_is_better_than_the_line_found \
        "$bits::test_layers_one_by_one_give_the_bits_of_all_in_one_call" \
        "$bits::test_alone_in_a_batch_in_pieces_and_after_others[Q8_0-moe-16]" -k "not spans"
fi
system=$(dirname "$(dirname "$("$cross" -print-file-name=libc.so.6)")")
OMP_NUM_THREADS=1 exec "$python" -m pytest -q "$@" \
    --remote "qemu-aarch64 -L $(realpath "$system") build/neon/neon_main build/neon/libqwen2_kernels.so"
