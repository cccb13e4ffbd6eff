#!/usr/bin/env bash
# Measures sag on this machine: the attention map beside SDPA, the step with and without guidance, the UNet alone.
#
#   scripts/bench.sh                      full-size UNets of random weights (SD1.5 and SDXL; a GPU is needed)
#   scripts/bench.sh UNET.ts [OPTION...]  your own file; the options are step_benchmark's: --height=64 --width=64 ...
#
# Tables go to the terminal, JSON to build/bench. The random UNets are written by tools/make_benchmark_unet.py, for which
# diffusers is installed into build/bench (from PyPI; PYTHON names a Python that has PyTorch, default: the downloaded one).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/bootstrap.sh"

out=$sag_root/build/bench

measure() { # <name> <program> <arguments>...
  local name=$1 program=$2
  shift 2
  say "$name"
  "$sag_build_dir/benchmarks/$program" --benchmark_out="$out/$name.json" --benchmark_out_format=json "$@"
}

make_unet() { # <shape>
  [[ ! -e $out/$1.ts ]] || return 0
  local python=${PYTHON:-$sag_cache/torch-$sag_torch_version/bin/python}
  [[ -x $(command -v "$python") ]] || die "set PYTHON to a Python that has PyTorch: $python is none"
  [[ -d $out/python ]] || {
    "$python" -m pip install -q --target "$out/python.partial" -r "$sag_root/tools/requirements.txt" ||
      die "pip could not install what tools/requirements.txt names"
    mv "$out/python.partial" "$out/python"
  }
  PYTHONPATH=$out/python "$python" "$sag_root/tools/make_benchmark_unet.py" --shape "$1" --out "$out/$1.ts.partial"
  mv "$out/$1.ts.partial" "$out/$1.ts"
}

sag_bootstrap
missing=()
sag_look_for_header benchmark/benchmark.h libbenchmark-dev
((${#missing[@]} == 0)) || die "Google Benchmark is missing: apt-get install ${missing[*]}"
sag_configure_args+=(-DSAG_BUILD_BENCHMARKS=ON)
sag_build attention_map_benchmark step_benchmark
mkdir -p "$out"

if (($#)); then
  unet=$1
  shift
  measure "$(basename "$unet" .ts)" step_benchmark --unet="$unet" "$@"
  exit
fi
measure attention_map attention_map_benchmark
make_unet sd15
measure sd15_512px step_benchmark --unet="$out/sd15.ts" --height=64 --width=64 --context_width=768
make_unet sdxl
sdxl=(step_benchmark --unet="$out/sdxl.ts" --context_width=2048 --y=1286)
measure sdxl_1024px "${sdxl[@]}" --height=128 --width=128
measure sdxl_2048px "${sdxl[@]}" --height=256 --width=256 --steps=5 --benchmark_filter=step/graph/
say "done; the JSON is in $out"
