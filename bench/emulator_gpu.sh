#!/bin/sh
# Whether the emulator adds products as this machine's GPU does: `mma.sync` on a GPU since Ampere, and `wgmma` too on a Hopper. It takes
# seconds. The probes come from `cargo build --release -p ptx-emulator --examples` on any machine, and need only the driver.
#
#     bench/emulator_gpu.sh [PROBE ...]     # mma_probe wgmma_probe; $PROBES: their folder; $RESULTS: a folder for what the GPU computed
set -u
probes=${PROBES:-target/release/examples}
results=${RESULTS:-$(mktemp -d)} || exit 2
if [ $# -eq 0 ]; then set -- mma_probe wgmma_probe; fi
failed=0
for probe in "$@"; do
    if ! "$probes/$probe" gpu "$results/$probe.bin"; then
        failed=1
        echo "FAILED  $probe did not run"
    elif "$probes/$probe" compare "$results/$probe.bin" >"$results/$probe.txt"; then
        echo "ok      $probe: every bit of $(grep -c '^ok' "$results/$probe.txt") cases"
    else
        failed=1
        echo "FAILED  $probe: $(grep -c '^DIFF' "$results/$probe.txt") cases differ; the results are in $results"
        grep -A 3 '^DIFF' "$results/$probe.txt" | head -40
    fi
done
exit $failed
