#!/usr/bin/env bash
# Measures sag on this machine: the attention map against SDPA, the step with and without guidance, the UNet alone.
#
#   scripts/bench.sh                      full-size UNets of random weights (SD1.5 and SDXL; a GPU is needed)
#   scripts/bench.sh UNET [OPTION...]     your own file or folder of packages; the options are step_benchmark's:
#                                         --height=64 --width=64 ...
#
# Tables go to the terminal, JSON to build/bench. The random UNets are written by tools/make_benchmark_unet.py and traced
# and compiled by sag-export (some twenty minutes the first time).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/bootstrap.sh"

out=$sag_root/build/bench

measure() { # <name> <program> <arguments>...
  local name=$1 program=$2
  shift 2
  say "$name"
  "$sag_build_dir/benchmarks/$program" --benchmark_out="$out/$name.json" --benchmark_out_format=json "$@"
}

# A UNet of random weights, traced and compiled.
make_unet() { # <shape> <size>
  [[ -n $sag_python ]] || die "the Python that this LibTorch was installed for is needed, and there is none"
  export PYTHONPATH=$sag_root/exporter:$sag_python_path
  local exporter
  [[ -d $out/$1 ]] || "$sag_python" "$sag_root/tools/make_benchmark_unet.py" --shape "$1" --out "$out/$1"
  exporter=("$sag_python" -m sag_export "$out/$1" --prediction eps --device cuda --dtype fp16)
  [[ -d $out/$1.traced ]] || "${exporter[@]}" --out "$out/$1.traced"
  [[ -d $out/$1.compiled ]] || "${exporter[@]}" --out "$out/$1.compiled" --format aoti --rows 1,2,3 --size "$2"
  [[ -d $out/$1.any ]] || "${exporter[@]}" --out "$out/$1.any" --format aoti --rows 1-4
}

measure_unet() { # <name> <folder of make_unet> <arguments>...
  local name=$1 files=$out/$2
  shift 2
  measure "$name" step_benchmark --unet="$files.traced/unet.ts" --reference="$files/reference.pt" "$@"
  measure "${name}_compiled" step_benchmark --unet="$files.compiled/unet" --reference="$files/reference.pt" "$@"
  measure "${name}_compiled_for_any_size" step_benchmark --unet="$files.any/unet.pt2" --reference="$files/reference.pt" "$@"
}

sag_bootstrap tools
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
make_unet sd15 64x64
measure_unet sd15_512px sd15 --height=64 --width=64 --context_width=768
make_unet sdxl 128x128
sdxl=(--context_width=2048 --y=1286)
measure_unet sdxl_1024px sdxl --height=128 --width=128 "${sdxl[@]}"
measure sdxl_2048px step_benchmark --unet="$out/sdxl.traced/unet.ts" --height=256 --width=256 "${sdxl[@]}" \
  --steps=5 --benchmark_filter=step/graph/
say "done; the JSON is in $out"
