#!/usr/bin/env bash
# Fetch what `make gpu` can use and a bare machine with a GPU lacks, as wheels, into .wheels/.
# benchmarks/gpu.py unpacks those whose packages are missing there; nothing is installed.
#
#     tools/gpu_wheels.sh            # with network; PYTHON=python3 names a Python that has pip
set -euo pipefail
cd "$(dirname "$0")/.."
wheels=(
    trl==1.16.0 liger-kernel==0.8.5      # baselines
    # what trl imports, and what that imports
    datasets==5.0.1 dill==0.4.1 multiprocess==0.70.19 xxhash==3.8.1
    requests==2.32.5 urllib3==2.5.0 idna==3.10 certifi charset-normalizer==3.4.3
    math-verify==0.9.0 latex2sympy2-extended==1.11.0 antlr4-python3-runtime==4.13.2
    ninja==1.13.0 pybind11==3.1.0        # what the build needs
    nvidia-cuda-sanitizer-api==13.0.85   # compute-sanitizer
)
fetch=("${PYTHON:-python3}" -m pip download --quiet --no-deps --only-binary=:all: --dest .wheels
    --python-version 3.12 --implementation cp --abi cp312 --abi abi3 --abi none
    --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64
    --platform manylinux_2_25_x86_64 --platform manylinux2014_x86_64 --platform any)
"${fetch[@]}" "${wheels[@]}"
du -sh .wheels
