#!/usr/bin/env bash
# Try train.sbatch on a throw-away cluster: two SLURM nodes on this machine, in a temporary folder, as root. A run that
# is stopped in every way SLURM knows must end as the run that was left alone, bit for bit. Some 10 minutes on 2 cores.
#   apt-get install slurmctld slurmd slurm-client munge; tools/launchers/slurm/try.sh
# One line per claim; 0: all hold, 1: one does not, 77: cannot run here.
set -uo pipefail
cd "$(dirname "$0")/../../.." || exit
PATH=$PWD/.venv/bin:/usr/sbin:$PATH
missing=$(for tool in munged slurmctld slurmd sbatch resnest-train torchrun; do
  command -v $tool >/dev/null || echo -n " $tool"
done)
[[ $missing ]] && echo "skipped: not installed:$missing" && exit 77
[[ $EUID == 0 ]] || { echo "skipped: slurmd starts jobs as root only"; exit 77; }

folder=$(mktemp -d) host=$(hostname -s) port=$((26000 + RANDOM % 6000)) daemons=() failed=0
export SLURM_CONF=$folder/slurm.conf

finish() {
  # Jobs first, while there is somebody to end them.
  scancel $(squeue --noheader --format %i 2>/dev/null) 2>/dev/null
  until [[ -z $(squeue --noheader 2>/dev/null) ]]; do sleep 0.5; done
  kill "${daemons[@]}" 2>/dev/null
  wait
  if [[ $failed == 0 ]]; then rm -r "$folder"; else echo "see $folder"; fi
}
trap 'exit 1' INT TERM
trap finish EXIT

claim() { # STATUS TEXT: print a line, and remember a failure
  if [[ $1 == 0 ]]; then echo "ok      $2"; else echo "FAILED  $2" && failed=1; fi
}
start() { # NAME COMMAND...: a daemon in the foreground of a job of this shell
  "${@:2}" >"$folder/$1.log" 2>&1 &
  daemons+=($!)
}

cat >"$SLURM_CONF" <<EOF
ClusterName=try
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=root
AuthInfo=socket=$folder/munge.socket,cred_expire=5 # a job that was requeued waits as long: by default 120 seconds
StateSaveLocation=$folder/state
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/%n.pid
SlurmdSpoolDir=$folder/%n
ProctrackType=proctrack/linuxproc # cgroups may be read-only here
TaskPlugin=task/affinity
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=30 # when a silent node counts as dead: by default 300 seconds
MpiDefault=none
MailProg=/bin/true
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n1 NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 1)) CPUs=2 Gres=gpu:1
NodeName=n2 NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 2)) CPUs=2 Gres=gpu:1
PartitionName=grace Nodes=ALL Default=YES PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL PriorityTier=2
EOF
echo "NodeName=n[1-2] Name=gpu File=/dev/null" >"$folder/gres.conf" # counted, never opened
mkdir "$folder/state"
chmod 755 "$folder" # munge's socket must be reachable
head --bytes 128 /dev/urandom >"$folder/key" && chmod 400 "$folder/key"
start munged munged --foreground --force --key-file "$folder/key" --socket "$folder/munge.socket" \
  --pid-file "$folder/munge.pid" --log-file "$folder/munge.log" --seed-file "$folder/munge.seed"
until [[ -S $folder/munge.socket ]]; do sleep 0.1; done
start slurmctld slurmctld -D
start n1 slurmd -D -N n1
start n2 slurmd -D -N n2
is_up() { [[ $(sinfo --noheader --partition urgent --format %T 2>/dev/null) == idle ]]; }
for _ in {1..60}; do is_up && break || sleep 0.5; done
if ! is_up; then
  echo "skipped: the cluster does not come up:" "$(grep -h error: "$folder"/{slurmctld,n1,n2,munged}.log | tail -1)"
  exit 77
fi

resnest-data demo out="$folder/data" train_per_class=44 val_per_class=4 >/dev/null
options=(+experiment=demo device=cpu data.root="$folder/data" loader=torchvision loader.workers=1 log.every_steps=1
  train.crop=64 train.batch_size=16 train.epochs=24 train.ema_decay=0.9 train.policy=resnest train.mixup_alpha=0.2)

submit() { # RUN OPTION...: set job
  job=$(sbatch --parsable --nodes 2 --gpus-per-node 1 --output "$folder/%j.out" tools/launchers/slurm/train.sbatch \
    "${options[@]}" run_dir="$folder/$1" "${@:2}")
}
field() { scontrol --oneliner show job "${2:-$job}" | grep -oP "(?<= $1=)\S+"; }
now() { date +%s.%N; }
since() { awk "BEGIN {printf \"%.1f s\", $(now) - $1}"; }
await() { # SECONDS COMMAND...: until it succeeds
  local end=$((SECONDS + $1))
  until "${@:2}"; do ((SECONDS < end)) || return; sleep 0.1; done
}
is_amid_epoch() { [[ $(tail --lines 1 "$folder/$job.out" 2>/dev/null) =~ ^epoch\ [0-9/]+\ [3-9]/ ]]; }
is_in() { [[ " $* " == *" $(field JobState) "* ]]; }
has_left() { ! is_in RUNNING COMPLETING; }
has_ended() { ! is_in PENDING CONFIGURING RUNNING COMPLETING; }
step_on() { # NODE: print the processes of its steps, and the slurmstepd above them
  local process task=()
  for process in /proc/[0-9]*; do
    [[ $(tr '\0' '\n' <"$process/environ" | grep -cxF -e "SLURM_CONF=$SLURM_CONF" -e "SLURMD_NODENAME=$1") == 2 ]] &&
      task+=("${process##*/}")
  done 2>/dev/null
  echo "${task[@]}"
  ps -o ppid= -p "${task[*]}" | sort -u | while read -r process; do
    [[ $(<"/proc/$process/comm") == slurmstepd ]] && echo "$process"
  done
}
says() { grep -qF "$2" "$folder/$1/status.json" 2>/dev/null; }
goes_on() { # WHAT: the run was stopped by itself, and its job starts again; `start` is when it was asked
  local left
  await 90 has_left
  left=$(since "$start")
  says stopped '"exit_code": 75' && await 120 is_in RUNNING
  claim $? "$1: saved and left in $left, running again in $(since "$start") (restart $(field Restarts))"
  await 120 is_amid_epoch
}

submit whole
await 600 has_ended
[[ $(field ExitCode) == 0:0 ]] && says whole finished
claim $? "an undisturbed run ends with 0, after $(field RunTime)"

submit stopped
await 60 grep -q attempt "$folder/$job.out" 2>/dev/null
start=$(now)
scancel --signal=USR1 --batch "$job"
await 60 has_left && await 120 is_in RUNNING && [[ ! -e $folder/stopped/status.json ]]
claim $? "asked before it has begun, the job starts again: in $(since "$start")"
await 120 is_amid_epoch

start=$(now)
scancel --signal=USR1 --batch "$job"
goes_on "USR1, as --signal sends it"

start=$(now)
scontrol update JobId="$job" TimeLimit=2 # less than the 120 seconds of --signal are left
await 90 has_left
scontrol update JobId="$job" TimeLimit=60
goes_on "the time limit, which SLURM looks at twice a minute"

start=$(now)
urgent=$(sbatch --parsable --partition urgent --nodes 1 --exclusive --output /dev/null --wrap "sleep 1")
goes_on "preempted, with a grace time"
[[ $(field JobState "$urgent") == COMPLETED ]]
claim $? "the job that preempted it has run"

start=$(now)
scancel --signal=TERM "$job"
goes_on "TERM to the steps"

start=$(now)
scontrol requeue "$job"
goes_on "requeued by SLURM, without a grace time"

# All that runs on the second node dies: its daemon, its steps, their processes.
start=$(now)
disown "${daemons[3]}" # else bash reports its end
kill -KILL "${daemons[3]}" $(step_on n2)
await 90 has_left
left=$(since "$start")
start n2 slurmd -D -N n2
await 120 is_in RUNNING
claim $? "a node dies: SLURM requeues the job after $left, it runs again in $(since "$start"), with the node"

await 600 has_ended
[[ $(field ExitCode) == 0:0 && $(field Restarts) == 7 ]] && says stopped finished
claim $? "after $(field Restarts) restarts the run ends with 0"
PYTHONPATH=tests python - "$folder/whole" "$folder/stopped" <<'EOF'
import sys
from pathlib import Path
from faults.harness import require_equal_runs
require_equal_runs(*map(Path, sys.argv[1:]))
EOF
claim $? "weights, average, optimiser, counters and metrics of both runs are equal, bit for bit"

submit stopped seed=1
await 120 has_ended
[[ $(field ExitCode) == 4:0 && $(field Restarts) == 0 ]]
claim $? "a run that fails ends the job with its own code: $(field ExitCode)"

submit stopped data.root="$folder/nowhere"
await 120 has_ended
[[ $(field ExitCode) == 3:0 && $(field Restarts) == 0 ]]
claim $? "so does one without its data: $(field ExitCode)"

echo '{"state": "stopped", "exit_code": 75}' >"$folder/stopped/status.json"
submit stopped train.epochs=0
await 120 has_ended
[[ $(field JobState) == FAILED && $(field Restarts) == 0 ]]
claim $? "an earlier attempt's status does not count: $(field JobState) with $(field ExitCode)"

submit stopped trian.epochs=9
await 120 has_ended
[[ $(field ExitCode) == 2:0 ]]
claim $? "a misspelt option ends the job with $(field ExitCode) after $(field RunTime)"

submit cancelled
await 120 is_amid_epoch
start=$(now)
scancel "$job"
await 60 has_left
is_in CANCELLED && says cancelled '"exit_code": 75'
claim $? "scancel: saved and left in $(since "$start"), $(field JobState), not requeued"
exit $failed
