#!/bin/sh
# Whether framestride-candle and the example with cust work on this machine's GPU, in a minute or two. The GPU machine needs no Rust,
# only a folder with the four programs, and libcublas and libcurand of the CUDA that candle was built with (PyTorch has both):
#
#     cargo test --release --no-run --manifest-path engines/candle/Cargo.toml --features cuda,emulator   # where nvcc is, with CUDA_COMPUTE_CAP=90
#     cargo build --manifest-path engines/cust/Cargo.toml
#     bench/rust_engines_gpu.sh FOLDER       # with bad_calls, results, cuda (target/release/deps/*-*), framestride-with-cust
#
# nvcc from PyPI works too: nvidia-cuda-nvcc, nvidia-cuda-crt, nvidia-cuda-cccl, nvidia-nvvm, nvidia-cuda-runtime, nvidia-cublas and
# nvidia-curand of one version, with links lib64 -> lib and libX.so -> libX.so.N, and a libcuda.so to link with. CUDA_HOME, NVCC,
# CUDA_LIBRARY_PATH (cust) and LIBRARY_PATH tell where they are.
set -u
folder=${1:?"the folder with the programs"}
wheels=$(python3 -c 'import importlib.util as u; print(*u.find_spec("nvidia.cu13").submodule_search_locations)' 2>/dev/null)
LD_LIBRARY_PATH=${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}/usr/local/cuda/lib64${wheels:+:$wheels/lib}
export LD_LIBRARY_PATH
failed=0
for program in bad_calls results cuda framestride-with-cust; do
    echo "==> $program"
    # One test after another, so that no other one's work stands between that of two streams.
    RUST_TEST_THREADS=1 "$folder/$program" || failed=1
done
if command -v compute-sanitizer >/dev/null; then
    for program in results framestride-with-cust; do
        echo "==> memcheck, $program"
        compute-sanitizer --error-exitcode 1 --tool memcheck "$folder/$program" || failed=1
    done
fi
exit $failed
