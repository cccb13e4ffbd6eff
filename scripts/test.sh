#!/usr/bin/env bash
# Sets up everything sag needs, builds it and runs every test. Arguments go to ctest: scripts/test.sh -L unit
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/bootstrap.sh"

sag_bootstrap tools
sag_build
say "running the tests"
cd "$sag_root"
# In this script's place, so that nothing is printed after ctest's own summary.
exec "$sag_ctest" --preset release --parallel "$CMAKE_BUILD_PARALLEL_LEVEL" "$@"
