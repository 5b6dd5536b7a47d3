#!/bin/sh
# The kernels of GPUs since Ampere (sm_80) on this machine's GPU: verified on the small specs and some large ones, then timed beside
# those that suit the GPU best, FlashAttention-2 (PyTorch's SDPA) and FlexAttention, in one run. On an H100 it takes ten minutes.
#
#     bench/sm80_gpu.sh          # $FRAMESTRIDE: the command. It needs PyTorch 2.11, safetensors, and what bench/README.md names.
set -u
folder=$(dirname "$0")
export FRAMESTRIDE="${FRAMESTRIDE:-$folder/../target/release/framestride}" FAMILY=sm_80
"$FRAMESTRIDE" doctor | grep GPU
"$folder/verify_gpu.sh" tiny_plain tiny_text_last tiny_layer_half tiny_text_rope tiny_heads_sinks demo ltx_video_512x704 \
    hunyuan_video_720p || exit 1
python3 "$folder/bench.py" --family $FAMILY --peers flash2,efficient,sage1,flex,compile --shapes ltx_video_512x704,hunyuan_video_720p \
    --rounds 5 --name sm80 --out "${OUT:-$folder/results}"
