#!/bin/sh
# Whether the backends for xfuser, vllm-omni and SGLang and the node for ComfyUI work on this machine's Hopper, in a minute or two: their
# tests, which compare dense heads with PyTorch's attention and sparse ones with framestride's own call, or with attention in f64. The GPU machine needs no Rust and no network, only PyTorch,
# diffusers 0.42.1 with transformers (xfuser), pytest, psutil (SGLang), and the packages of engines/requirements.txt without what they
# need. Their wheels are 48 MB, 39 of them SGLang's:
#
#     pip download --no-deps -r engines/requirements.txt -d wheels          # anywhere, Python 3.10 to 3.14 as on the GPU machine
#     pip install --no-deps --no-index --find-links wheels -r engines/requirements.txt
#     cargo build --release -p framestride-capi                             # anywhere, or the wheel of the Python package
#     bench/python_engines_gpu.sh [ENGINE...]                               # xfuser, vllm_omni, sglang, comfyui; by default all
set -u
cd "$(dirname "$0")/.." || exit 2
export FRAMESTRIDE_TEST_DEVICE=cuda PYTHONPATH="$PWD/python${PYTHONPATH:+:$PYTHONPATH}"
export FRAMESTRIDE_LIBRARY="${FRAMESTRIDE_LIBRARY:-$PWD/target/release/libframestride.so}"
failed=0
for engine in ${*:-xfuser vllm_omni sglang comfyui}; do
    echo "==> $engine"
    python3 -W ignore -m pytest --quiet -p no:cacheprovider "engines/$engine/tests" || failed=1
done
exit $failed
