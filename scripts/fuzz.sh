#!/usr/bin/env bash
# Fuzzes everything that reads a downloaded file (safetensors, their indices, LoRAs, textual inversions) with libFuzzer and
# the address and undefined-behaviour sanitizers:
#
#   scripts/fuzz.sh [<seconds> [<argument of libFuzzer>...]]      default: 600 seconds
#
# Begins with tests/fuzz/corpus and with what earlier runs found (build/fuzz/corpus). An input that breaks something is
# left in build/fuzz; give it as an argument to run it alone. Needs clang with libFuzzer.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/bootstrap.sh"

seconds=${1:-600}
shift || true
sag_bootstrap
command -v clang++ >/dev/null || die "fuzzing needs clang++ with libFuzzer (Debian and Ubuntu: apt-get install clang)"
cd "$sag_root"
"$sag_cmake" --preset fuzz "${sag_configure_args[@]}"
"$sag_cmake" --build --preset fuzz
mkdir -p build/fuzz/corpus
export OMP_NUM_THREADS=1
# In this script's place, so that a signal reaches the fuzzer.
exec build/fuzz/tests/checkpoint_fuzz -max_total_time="$seconds" -max_len=4096 -timeout=10 -rss_limit_mb=4096 \
  -dict=tests/fuzz/checkpoint.dict -artifact_prefix=build/fuzz/ -print_final_stats=1 "$@" \
  build/fuzz/corpus tests/fuzz/corpus
