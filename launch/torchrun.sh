#!/usr/bin/env bash
# Pretrains under torchrun, on one node or on many, and starts again after a failure.
#
#   bash launch/torchrun.sh --config configs/tiny_cpu.yaml megatron.lr=1e-3
#   RDZV_ENDPOINT=node0:29400 NNODES=16 bash launch/torchrun.sh --config ...    on every node
#
# Arguments go to launch.pretrain (or to ENTRY). When a rank fails, torchrun ends the others and
# starts all of them again, up to MAX_RESTARTS times; the job goes on from its last whole
# checkpoint in `megatron.save`. With NNODES=MIN:MAX it also goes on with fewer nodes. A job that
# is started under the RDZV_ID of an earlier one goes on from that one's checkpoints, too.
#
#   NPROC_PER_NODE   ranks of this node (default: one per CUDA device; without any, the
#                    tensor-parallel size cannot be guessed and is 2)
#   NNODES           nodes, or MIN:MAX (default: 1)
#   RDZV_ENDPOINT    host:port of the c10d rendezvous, which that host holds (default for one node:
#                    a free port)
#   RDZV_ID          name of this job, the same on all nodes and new for a new job (default: Slurm's
#                    number of the job, or for one node a name that is never used again)
#   LOCAL_ADDR       address by which other nodes reach this one (default: its host name)
#   MAX_RESTARTS     (default: 3)
#   ENTRY            Python module (default: launch.pretrain; also: launch.pretrain_gpt)
#   PYTHON           interpreter (default: python3)
set -euo pipefail

fail() {
    printf 'launch/torchrun.sh: %s\n' "$*" >&2
    exit 2
}

(($#)) || fail "expected arguments of the run, such as --config FILE, got none"
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH=$here${PYTHONPATH:+:$PYTHONPATH}
python=${PYTHON:-python3}
nodes=${NNODES:-1}
[[ $nodes =~ ^[1-9][0-9]*(:[1-9][0-9]*)?$ ]] || fail "NNODES: expected N or MIN:MAX, got '$nodes'"
ranks=${NPROC_PER_NODE:-$("$python" -c 'import torch; print(torch.cuda.device_count() or 2)')}
[[ $ranks =~ ^[1-9][0-9]*$ ]] || fail "NPROC_PER_NODE: expected a number, got '$ranks'"

rendezvous=(--standalone)
if [[ -n ${RDZV_ENDPOINT:-} ]]; then
    job=${RDZV_ID:-${SLURM_JOB_ID:-}}
    [[ -n $job ]] || fail "RDZV_ID: expected a name for this job with RDZV_ENDPOINT, got none"
    rendezvous=(
        --nnodes "$nodes"
        --rdzv-backend c10d
        --rdzv-endpoint "$RDZV_ENDPOINT"
        --rdzv-id "$job"
    )
    [[ -z ${LOCAL_ADDR:-} ]] || rendezvous+=(--local-addr "$LOCAL_ADDR")
elif [[ $nodes != 1 ]]; then
    fail "RDZV_ENDPOINT: expected host:port for NNODES=$nodes, got none"
fi
# A store of its own for every start: one that is kept still has the addresses of dead processes.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-1}
# Threads beside the ranks only get into each other's way.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

exec "$python" -m torch.distributed.run "${rendezvous[@]}" \
    --nproc-per-node "$ranks" --max-restarts "${MAX_RESTARTS:-3}" \
    -m "${ENTRY:-launch.pretrain}" "$@"
