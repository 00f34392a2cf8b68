#!/usr/bin/env bash
# Sets up a real Slurm with two nodes on this machine, runs launch/slurm.sbatch on it, kills a
# rank, sends the time limit's SIGTERM, and takes everything down again. Needs root and Debian's
# packages:
#
#   apt-get install slurmctld slurmd slurm-client munge
#   PYTHON=/path/to/python bash tests/slurm_two_nodes.sh
#
# Ends with "slurm: all checks passed" and status 0, or with what was wrong.
set -euo pipefail
cd "$(dirname -- "${BASH_SOURCE[0]}")/.."

say() {
    printf '== slurm: %s\n' "$*"
}
fail() {
    say "FAILED: $*"
    exit 1
}
for name in slurmctld slurmd sbatch scontrol munged; do
    command -v "$name" >/dev/null || { say "SKIPPED: $name is not installed"; exit 0; }
done
((EUID == 0)) || { say "SKIPPED: needs root"; exit 0; }

work=$(mktemp -d)
chmod 755 "$work" # the daemons of other users read in it
cores=$(nproc)
python=$(command -v "${PYTHON:-python3}")
daemons=()

# Ends only what this script has started.
down() {
    local pid
    for pid in "${daemons[@]}"; do
        kill "$pid" 2>/dev/null || true
        wait "$pid" 2>/dev/null || true
    done
    [[ -n ${KEEP:-} ]] || rm -rf "$work"
}
trap down EXIT

mkdir -p "$work"/{state,spool1,spool2,log,munge}
head -c 1024 /dev/urandom >"$work/munge/key"
chown -R munge:munge "$work/munge"
chmod 700 "$work/munge"
chmod 400 "$work/munge/key"
mkdir -p "$work/socket"
chown munge:munge "$work/socket"
chmod 755 "$work/socket"
runuser -u munge -- munged --foreground --key-file "$work/munge/key" \
    --socket "$work/socket/munge.socket" --pid-file "$work/munge/pid" \
    --log-file "$work/munge/log" --seed-file "$work/munge/seed" >/dev/null 2>&1 &
daemons+=($!)

# Two loopback addresses stand for two machines; all of it is thrown away afterwards.
cat >"$work/slurm.conf" <<CONF
ClusterName=two
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$work/socket/munge.socket
CredType=cred/munge
StateSaveLocation=$work/state
SlurmdSpoolDir=$work/spool-%n
SlurmctldPidFile=$work/slurmctld.pid
SlurmdPidFile=$work/slurmd-%n.pid
SlurmctldLogFile=$work/log/slurmctld
SlurmdLogFile=$work/log/slurmd-%n
SlurmctldPort=17817
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SchedulerType=sched/builtin
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SlurmdParameters=config_overrides
KillWait=20
ReturnToService=2
NodeName=node1 NodeHostname=$(hostname -s) NodeAddr=127.0.0.2 Port=17821 CPUs=$cores State=UNKNOWN
NodeName=node2 NodeHostname=$(hostname -s) NodeAddr=127.0.0.3 Port=17822 CPUs=$cores State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
export SLURM_CONF=$work/slurm.conf
slurmctld -D >"$work/log/ctld.out" 2>&1 &
daemons+=($!)
for node in node1 node2; do
    slurmd -D -N "$node" >"$work/log/$node.out" 2>&1 &
    daemons+=($!)
done
for ((i = 0; i < 60; i++)); do
    [[ $(sinfo -h -t idle -o %D 2>/dev/null) == 2 ]] && break
    sleep 1
done
sinfo || true
if [[ $(sinfo -h -t idle -o %D) != 2 ]]; then
    tail -n 20 "$work"/log/* || true
    fail "the nodes did not come up"
fi
say "two nodes are up: $(sinfo --version), $cores cores each, shared"

# node1 and node2 are names of Slurm only: torch is told the address.
tiny=(
    --config configs/tiny_cpu.yaml megatron.mock_data=true megatron.vocab_size=768
    megatron.num_layers=2 megatron.hidden_size=32 megatron.seq_length=32
    megatron.global_batch_size=32 megatron.lr_warmup_iters=2 megatron.hidden_dropout=0.1
    megatron.eval_interval=null megatron.save_interval=2 megatron.tensorboard_dir=null
    megatron.tensor_model_parallel_size=2 "megatron.data_cache_path=$work/cache"
)
export PYTHON=$python NPROC_PER_NODE=2 OMP_NUM_THREADS=1 LOCAL_ADDR=127.0.0.1
export RDZV_HOST=127.0.0.1 PYTHONPATH=$PWD/tests

# submit NAME ITERATIONS [VARIABLE=VALUE ...]: number of the job
submit() {
    local name=$1 iterations=$2
    shift 2
    env "$@" sbatch --parsable --nodes 2 --output "$work/$name.log" launch/slurm.sbatch \
        "${tiny[@]}" "run_dir=$work/$name" "megatron.train_iters=$iterations"
}
wait_for() {
    for ((i = 0; i < 300; i++)); do
        state=$(scontrol show job "$1" | sed -n 's/.*JobState=\(\S*\).*/\1/p')
        case $state in COMPLETED | FAILED | CANCELLED | TIMEOUT | NODE_FAIL) break ;; esac
        sleep 1
    done
    say "job $1: $state"
}
losses() {
    "$python" -c 'import json, sys
print([(r["iteration"], r["loss"]) for r in map(json.loads, open(sys.argv[1]))])' \
        "$work/$1/metrics.jsonl"
}

job=$(submit whole 6)
wait_for "$job"
grep -aE "launch/slurm.sbatch|topology|placement|last_loss" "$work/whole.log" || true
[[ $state == COMPLETED ]] || { tail -n 60 "$work/whole.log"; fail "the run did not complete"; }
grep -aq "4 ranks by torchrun on 2 node(s)" "$work/whole.log" || fail "no topology of two nodes"

say "a rank is killed in mid-step, torchrun starts all again"
job=$(submit killed 6 ENTRY=fault_runs FAULT_KILL_RANK=3 FAULT_KILL_ITERATION=5)
wait_for "$job"
grep -aE "exitcode: -9|from iteration" "$work/killed.log" || true
[[ $state == COMPLETED ]] || { tail -n 60 "$work/killed.log"; fail "it did not start again"; }
grep -aq "exitcode: -9" "$work/killed.log" || fail "no rank was killed"
[[ $(losses whole) == "$(losses killed)" ]] || fail "the losses are not those of the whole run"

say "SIGTERM, as before the time limit, and a requeue"
job=$(submit long 400)
for ((i = 0; i < 100; i++)); do
    grep -aq '"iteration": 5,' "$work/long/metrics.jsonl" 2>/dev/null && break
    sleep 1
done
scancel --signal=TERM "$job"
wait_for "$job"
last=$(cat "$work/long/checkpoints/latest_checkpointed_iteration.txt")
done_=$(tail -n 1 "$work/long/metrics.jsonl" | cut -c 1-18)
say "last checkpoint: iteration $last; last record: $done_"
[[ $done_ == *" $last,"* ]] || fail "the checkpoint is not of the last step"
say "all checks passed"
