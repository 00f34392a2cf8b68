#!/usr/bin/env bash
# Pretrains a small GPT with Megatron-core and the fused loss, from nothing to a loss curve.
#
#   bash launch/quickstart.sh                         two CPU cores are enough: under 5 minutes
#   bash launch/quickstart.sh megatron.train_iters=50 arguments go to launch.pretrain
#   PYTHON=python3.12 bash launch/quickstart.sh       with another interpreter (3.10 or newer)
#
# Needs Python with venv and pip, a C compiler, and on the first call a package index. The first
# call makes .venv/quickstart; later calls use it again until pyproject.toml, the tested versions
# or the interpreter change. Tokenizer and text are made of the Python installation itself and
# kept in runs/data. Where there are CUDA devices they are used, with configs/h200_131k.yaml.
set -euo pipefail
cd "$(dirname -- "${BASH_SOURCE[0]}")/.."

fail() {
    printf 'launch/quickstart.sh: %s\n' "$*" >&2
    exit 1
}

python=${PYTHON:-python3}
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])') ||
    fail "cannot run the interpreter '$python'; set PYTHON to one that runs"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    fail "'$python' is Python $version, but 3.10 or newer is needed"

environment=$PWD/.venv/quickstart
constraints=tests/constraints-py$version.txt
stamp=$environment/stamp

# What the environment depends on, as one hash.
key=$("$python" - pyproject.toml "$constraints" <<'PYTHON'
import hashlib, os, sys

digest = hashlib.sha256(repr((1, sys.version, sys.base_prefix, os.getcwd())).encode())
for name in sys.argv[1:]:
    if os.path.exists(name):
        with open(name, "rb") as file:
            digest.update(file.read())
print(digest.hexdigest())
PYTHON
) || fail "could not read pyproject.toml"

# The stamp is removed first and written last: a half-made environment is never taken for whole.
make_environment() {
    echo "== environment: making .venv/quickstart (needs the package index, takes minutes)"
    rm -rf "$environment"
    "$python" -m venv "$environment" || fail "could not make a virtual environment"
    local options=(--quiet --disable-pip-version-check --editable '.[megatron,launch]')
    if [[ -e $constraints ]]; then
        options+=(--constraint "$constraints")
    fi
    "$environment/bin/python" -m pip install "${options[@]}" || fail "could not install the project"
    printf '%s\n' "$key" >"$stamp"
}

mkdir -p .venv
if command -v flock >/dev/null; then
    exec {lock}>"$environment.lock"
    flock "$lock"
fi
[[ -e $stamp && $(<"$stamp") == "$key" ]] || make_environment
[[ -z ${lock-} ]] || exec {lock}>&-

unset PYTHONPATH PYTHONHOME
bin=$environment/bin
start=$SECONDS
gpus=$("$bin/python" -c 'import torch; print(torch.cuda.device_count())')
if ((gpus >= 1)); then
    config=configs/h200_131k.yaml
    # Tensor parallel over the largest power of two of the GPUs, at most eight.
    ranks=1
    while ((ranks * 2 <= gpus && ranks < 8)); do ranks=$((ranks * 2)); done
else
    config=configs/tiny_cpu.yaml
    ranks=2
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
fi
echo "== training: $config on $ranks ranks ($gpus GPUs)"
"$bin/python" -m torch.distributed.run --standalone --nproc-per-node "$ranks" \
    -m launch.pretrain --cce --config "$config" \
    "megatron.tensor_model_parallel_size=$ranks" "run_dir=runs/quickstart" "$@"
echo "== done in $((SECONDS - start)) s, tokenizer and data included, installation not"
