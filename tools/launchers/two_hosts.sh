#!/usr/bin/env bash
# Two hosts on one machine: network namespaces with an address each and a cable between them, and a torchrun in each.
# Hosts die and the cable is pulled; the same commands must resume, and end as the run that was left alone, bit for bit.
# As root; some 7 minutes on 2 cores.
# One line per claim; 0: all hold, 1: one does not, 77: cannot run here.
set -uo pipefail
cd "$(dirname "$0")/../.." || exit
PATH=$PWD/.venv/bin:/usr/sbin:/sbin:$PATH
[[ $EUID == 0 ]] || { echo "skipped: network namespaces need root"; exit 77; }
for tool in ip torchrun resnest-data; do
  command -v $tool >/dev/null || { echo "skipped: $tool is not installed"; exit 77; }
done

folder=$(mktemp -d) failed=0 run="" start=0 again=""
declare -A space=([a]=hosts-$$-a [b]=hosts-$$-b) address=([a]=10.77.0.1 [b]=10.77.0.2) launcher=() read=()
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

finish() {
  for host in a b; do
    kill_host $host
    ip netns delete "${space[$host]}" 2>/dev/null
  done
  if [[ $failed == 0 ]]; then rm -r "$folder"; else echo "see $folder"; fi
}
kill_host() { # HOST: all of its processes at once, as when its power fails
  local processes
  processes=$(ip netns pids "${space[$1]}" 2>/dev/null)
  [[ $processes ]] && kill -KILL $processes
  wait $processes 2>/dev/null
}
trap 'exit 1' INT TERM
trap finish EXIT

claim() { # STATUS TEXT: print a line, and remember a failure
  if [[ $1 == 0 ]]; then echo "ok      $2"; else echo "FAILED  $2" && failed=1; fi
}
now() { date +%s.%N; }
since() { awk "BEGIN {printf \"%.1f s\", $(now) - $1}"; }
await() { # SECONDS COMMAND...: until it succeeds
  local end=$((SECONDS + $1))
  until "${@:2}"; do ((SECONDS < end)) || return; sleep 0.1; done
}

refused=$({ for host in a b; do ip netns add "${space[$host]}" && ip netns exec "${space[$host]}" true || exit; done &&
  ip link add cable netns "${space[a]}" type veth peer name cable netns "${space[b]}"; } 2>&1) ||
  { echo "skipped: no network namespaces here: $refused"; exit 77; }
for host in a b; do
  ip -n "${space[$host]}" address add "${address[$host]}/24" dev cable
  ip -n "${space[$host]}" link set lo up
  ip -n "${space[$host]}" link set cable up
done
cable() { ip -n "${space[b]}" link set cable "$1"; }

resnest-data demo out="$folder/data" train_per_class=44 val_per_class=4 >/dev/null
options=(+experiment=demo device=cpu data.root="$folder/data" loader=torchvision loader.workers=1 log.every_steps=1
  train.crop=64 train.batch_size=16 train.epochs=16 train.ema_decay=0.9 train.policy=resnest train.mixup_alpha=0.2
  checkpoint.every_steps=5 timeout_seconds=20)

start_host() { # HOST: always the same command; the rendezvous is on host a
  GLOO_SOCKET_IFNAME=cable ip netns exec "${space[$1]}" torchrun --nnodes 2 --nproc-per-node 1 --max-restarts 3 \
    --rdzv-backend c10d --rdzv-endpoint "${address[a]}:29500" --rdzv-id "$run" --local-addr "${address[$1]}" \
    --rdzv-conf "is_host=$([[ $1 == a ]] && echo 1 || echo 0)" \
    -m resnest_imagenet.commands.train "${options[@]}" run_dir="$folder/$run" >>"$folder/$run.$1.log" 2>&1 &
  launcher[$1]=$!
}
line() { grep -h "$2" "$folder/$run.$1.log" | tail -1; } # HOST PATTERN
begin() { # note the time, and how far the logs are
  start=$(now)
  for host in a b; do read[$host]=$(wc -l <"$folder/$run.$host.log"); done
}
says() { # HOST PATTERN: since `begin`
  tail --lines +$((read[$1] + 1)) "$folder/$run.$1.log" | grep -q "$2"
}
is_in_epoch() { [[ $(tail --lines 1 "$folder/$run.a.log" 2>/dev/null) =~ ^epoch\ ([2-9]|1.)/16\ [3-9]/ ]]; }
has_ended() { ! kill -0 "${launcher[$1]}" 2>/dev/null; }
finished() { wait "${launcher[a]}" && wait "${launcher[b]}" && grep -q finished "$folder/$run/status.json"; }
has_resumed() { # a torchrun that has ended is started again, by the same command
  for host in a b; do
    has_ended $host && start_host $host && again+=" $host"
  done
  says a "^resuming after step"
}
resumes() { # TEXT: claim it
  again=""
  await 300 has_resumed
  claim $? "$1, and resumes after $(since "$start")${again:+ (started again:$again)}"
  await 60 is_in_epoch
}

run=whole start=$(now)
start_host a
start_host b
finished
claim $? "two hosts train to the end, in $(since "$start")"

run=disturbed
start_host a
start_host b
await 120 is_in_epoch

begin
cable down
sleep 6
cable up
await 60 says a "^epoch"
claim $? "the cable is pulled for 6 s: the run stands, and continues after $(since "$start")"
! says a "resuming after" && ! says b "resuming after"
claim $? "nobody has started again for that"

await 60 is_in_epoch
begin
kill_host b
await 60 says a "rank 1"
claim $? "host b dies: host a says so after $(since "$start"): $(line a "rank 1")"
start_host b
resumes "the same command on b: the run has waited for it"

begin
kill_host a
await 120 has_ended b
claim $? "host a dies, with rank 0 and the rendezvous: b ends after $(since "$start"): $(line b "train: ")"
start_host a
start_host b
resumes "the same commands on both: they meet"

begin
kill -KILL "${launcher[b]}"
wait "${launcher[b]}" 2>/dev/null
sleep 3
is_in_epoch || await 10 is_in_epoch
claim $? "b's torchrun dies, its rank does not: the run continues"
start_host b
await 60 says a "stopped after step"
claim $? "the same command on b: the ranks stop with a checkpoint after $(since "$start")"
resumes "b's rank makes room for a new one"

begin
cable down
await 120 says a "rank 1 hangs"
claim $? "the cable is pulled: a says so after $(since "$start"): $(line a "rank 1 hangs")"
await 60 says b "train: "
claim $? "b says so, too, while the cable is out: after $(since "$start")"
begin
cable up
resumes "the cable is back: the hosts find each other"

finished
claim $? "both end with 0"
PYTHONPATH=tests python - "$folder/whole" "$folder/disturbed" <<'EOF'
import sys
from pathlib import Path
from faults.harness import require_equal_runs
require_equal_runs(*map(Path, sys.argv[1:]))
EOF
claim $? "weights, average, optimiser, counters and metrics of both runs are equal, bit for bit"
exit $failed
