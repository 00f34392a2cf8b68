#!/usr/bin/env bash
# Pretrains under mpirun, one process per rank: Open MPI, MPICH, Intel MPI and their kin.
#
#   bash launch/mpirun.sh -n 4 -- --config configs/tiny_cpu.yaml
#   bash launch/mpirun.sh -n 16 --hostfile hosts -- --config configs/llama3_8b_tp8.yaml
#
# What stands before `--` goes to mpirun, what stands after it to launch.pretrain (or to ENTRY).
# Ranks and the address of the rendezvous come from MPI through mpi4py (the extra `mpi`); all else
# goes over NCCL or gloo. mpirun does not start a failed job again: give it
# 'megatron.load=${run_dir}/checkpoints' to go on by hand, or use launch/torchrun.sh.
#
#   MPIRUN       the launcher (default: mpirun)
#   MASTER_ADDR  address of rank 0 for the others (default: its host name)
#   ENTRY        Python module (default: launch.pretrain; also: launch.pretrain_gpt)
#   PYTHON       interpreter (default: python3)
set -euo pipefail

fail() {
    printf 'launch/mpirun.sh: %s\n' "$*" >&2
    exit 2
}

launcher=()
while (($#)) && [[ $1 != -- ]]; do
    launcher+=("$1")
    shift
done
(($# > 1)) || fail "expected arguments of mpirun, --, and those of the run, got no --"
shift
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH=$here${PYTHONPATH:+:$PYTHONPATH}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
mpirun=${MPIRUN:-mpirun}
command -v "$mpirun" >/dev/null || fail "MPIRUN: expected a command, got '$mpirun'"

# What other nodes need of this environment, in the words of the MPI at hand.
shared=(PYTHONPATH OMP_NUM_THREADS)
if [[ -n ${MASTER_ADDR:-} ]]; then shared+=(MASTER_ADDR); fi
options=()
if version=$("$mpirun" --version 2>&1) && [[ $version == *"Open MPI"* || $version == *PRRTE* ]]; then
    for name in "${shared[@]}"; do options+=(-x "$name"); done
    # One core per rank would also hold the threads that feed a GPU.
    options+=(--bind-to none)
else
    options+=(-genvlist "$(IFS=,; printf '%s' "${shared[*]}")")
fi

exec "$mpirun" "${options[@]}" "${launcher[@]}" \
    "${PYTHON:-python3}" -m "${ENTRY:-launch.pretrain}" "$@"
