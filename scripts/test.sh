#!/usr/bin/env bash
# Sets up everything sag needs, builds it and runs the tests.
#
#   scripts/test.sh [--all] [<argument of ctest>...]      scripts/test.sh -L unit
#
# --all also runs the tests with the label "long".
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/bootstrap.sh"

arguments=()
exclude=(--label-exclude '^long$')
for argument in "$@"; do
  case $argument in
    --all) exclude=() ;;
    # ctest leaves out what matches every --label-exclude, so the caller's own must be the only one.
    -LE | --label-exclude | --label-exclude=*) exclude=() arguments+=("$argument") ;;
    *) arguments+=("$argument") ;;
  esac
done

sag_bootstrap tests
sag_build
say "running the tests"
cd "$sag_root"
# In this script's place, so that nothing is printed after ctest's own summary.
exec "$sag_ctest" --preset release --parallel "$CMAKE_BUILD_PARALLEL_LEVEL" "${exclude[@]}" "${arguments[@]}"
