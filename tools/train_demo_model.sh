#!/usr/bin/env bash
# Makes models/emoji from nothing but the font: render, judge, train, export, measure. A quarter of an hour on one H200.
#
#   tools/train_demo_model.sh [--smoke] [--build DIR] [--out DIR] [--stages "render train measure"]
#
# --smoke runs every stage on a few glyphs in a minute or two of CPU time and writes under DIR/model. Needs tools/emoji/requirements.txt
# and Debian's fonts-noto-color-emoji (or FONT=/path/to/NotoColorEmoji.ttf). MINUTES caps the training's wall time, MEASURE_MINUTES the
# measuring's.
set -euo pipefail
cd "$(dirname "$0")/.."

build=build/emoji out="" smoke="" stages="render train measure"
while (($#)); do
  case $1 in
    --smoke) smoke=1 ;;
    --build) build=$2; shift ;;
    --out) out=$2; shift ;;
    --stages) stages=$2; shift ;;
    *) echo "unknown option $1" >&2; exit 2 ;;
  esac
  shift
done
font=${FONT:-/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf}
python=${PYTHON:-python3}
mkdir -p "$build"

glyphs=$build/glyphs.npz
judge_options=() train_options=() measure_options=() sheet_options=()
if [[ $smoke ]]; then
  out=${out:-$build/model}
  judge_options=(--limit 24 --steps 40 --batch 32)
  train_options=(--limit 24 --steps 6 --batch 4 --report 2)
  measure_options=(--limit 24 --sets 2 --pictures 8 --real 1000 --steps 2)
  sheet_options=(--each 1 --steps 2)
  [[ ${COMPILE:-} ]] || { train_options+=(--no-compile); measure_options+=(--no-compile); }
fi
out=${out:-models/emoji}
judge_options+=(${MINUTES:+--minutes "$MINUTES"})
train_options+=(${MINUTES:+--minutes "$MINUTES"})
measure_options+=(${MEASURE_MINUTES:+--minutes "$MEASURE_MINUTES"})

run() { echo "== $1"; "$python" "tools/emoji/$1.py" "${@:2}"; }

for stage in $stages; do
  case $stage in
    render)
      run render --font "$font" --out "$glyphs" ;;
    train)
      # The judge trains while the UNet compiles; each has its own seed and process, so neither changes the other.
      run judge --glyphs "$glyphs" --out "$build/judge.pt" "${judge_options[@]}" & judge=$!
      run train --glyphs "$glyphs" --out "$build/weights.pt" "${train_options[@]}"
      wait "$judge"
      run export --glyphs "$glyphs" --weights "$build/weights.pt" --out "$out" ;;
    measure)
      run sheet --model "$out" --out "$build" "${sheet_options[@]}"
      run evaluate --glyphs "$glyphs" --judge "$build/judge.pt" --model "$out" --out "$out/measured.json" "${measure_options[@]}"
      run report --measured "$out/measured.json" --readme "$out/README.md" ;;
    *) echo "unknown stage $stage" >&2; exit 2 ;;
  esac
done
