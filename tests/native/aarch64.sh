#!/usr/bin/env bash
# Builds the CPU kernels for aarch64 and runs them in qemu's user mode. On Debian:
#
#     apt install g++-aarch64-linux-gnu qemu-user
#     tests/native/aarch64.sh [SEED]
set -eu
cd "$(dirname "$0")/../.."
cmake -S . -B build/aarch64 -DDISTIL_SELF_TEST=ON -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
  -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++
cmake --build build/aarch64
qemu-aarch64 -L /usr/aarch64-linux-gnu build/aarch64/self_test "$@"
