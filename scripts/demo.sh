#!/usr/bin/env bash
# Sets up everything sag needs, builds the sag-sample command and draws demo.png with it: no argument needed.
# A CPU is enough; a GPU is used when there is one.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/bootstrap.sh"

# A handful of prompts, and pictures of no prompt, where guidance shows most; each unguided, guided, and its mask.
# A strong guidance and seeds on which it shows: what it does on average is measured in models/emoji/README.md.
# Threads that wait without spinning: five times as fast on a machine that is busy with something else.
draw_sheet() {
  OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive} "$sag_build_dir/command/sag-sample" --model "$sag_root/models/emoji" --compare --columns 2 --out "$1" \
    --prompt "red heart" --prompt "rocket" --prompt "cat face" --prompt "panda" --unconditional 4 \
    --seed 7 --sag-scale 3
}

sheet=$sag_root/demo.png
sag_bootstrap
sag_build sag-sample
say "drawing $sheet"
draw_sheet "$sheet" || die "sag-sample failed; its message is above"
say "done: $sheet"
