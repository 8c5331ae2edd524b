#!/usr/bin/env bash
# Build docker/Dockerfile without an engine or a registry of images, and try the image as its user. buildah does the
# Dockerfile's own steps; a folder with a clean Debian stands for its base image. As root; 20 GB, some 10 minutes.
#   apt-get install buildah debootstrap
#   debootstrap --variant=minbase --include=ca-certificates,python3-dev,python3-pip,python3-venv trixie ROOT
#   tools/container.sh ROOT
# One line per claim; 0: all hold, 1: one does not, 77: cannot run here.
set -uo pipefail
root=$(realpath "${1:?give the folder that debootstrap made}") || exit
cd "$(dirname "$0")/.." || exit
[[ $EUID == 0 ]] || { echo "skipped: a foreign root needs root"; exit 77; }
command -v buildah >/dev/null || { echo "skipped: buildah is not installed"; exit 77; }

folder=$(mktemp -d) failed=0
export TMPDIR=$folder # of buildah's layers, which a build that is killed would leave in /var/tmp
# A store of its own, and neither network nor devices but the machine's: no daemon, no settings.
store() { local verb=$1; shift; buildah --root "$folder/store" --runroot "$folder/run" "$verb" "$@"; }
finish() {
  [[ $failed == 0 ]] || { echo "see $folder"; return; }
  store rm --all >/dev/null
  store rmi --all --force >/dev/null
  umount "$folder/store/overlay" 2>/dev/null
  rm -r "$folder"
}
trap 'exit 1' INT TERM
trap finish EXIT
claim() { # TEXT COMMAND...: run it, print a line, and remember a failure
  local text=$1 status; shift
  "$@" >"$folder/log" 2>&1; status=$?
  if [[ $status == 0 ]]; then echo "ok      $text"; else tail -n 20 "$folder/log"; echo "FAILED  $text"; failed=1; fi
  return $status
}
name_base() { # the root, under the name that the Dockerfile has for its base
  local base container
  base=$(awk '/^FROM/ { print $2; exit }' docker/Dockerfile)
  container=$(store from scratch) && store add --quiet "$container" "$root" / &&
    store config --env "SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt" "$container" &&
    store commit --quiet "$container" "docker.io/library/$base"
}
run() { store run --isolation chroot "$container" -- "$@"; }
train() { # of the demo's pictures, as a user, in a folder of the user's
  store run --isolation chroot --user "$1" "$container" -- sh -c 'cd "$(mktemp -d)" &&
    resnest-data demo out=demo train_per_class=8 val_per_class=4 &&
    resnest-train +experiment=demo data.root=demo train.epochs=2 loader=dali loader.workers=2 &&
    resnest-eval ckpt=runs/demo data.root=demo && resnest-predict ckpt=runs/demo images=demo/val/disk'
}

claim "a root stands for the base" name_base || exit
claim "the Dockerfile's steps run" store build --isolation chroot --network host --pull-never --ignorefile .dockerignore \
  --file docker/Dockerfile --tag resnest . || exit
container=$(store from --pull-never resnest)
claim "the image's command runs" run resnest-train --help
claim "its user is not root, and owns no code" run sh -c 'test $(id -u) = 1001 && ! test -w /opt/resnest/bin/python'
claim "it has the versions of constraints.txt" run sh -c \
  'for name in torch torchvision timm; do grep -q "^$name==$(python -c "import importlib.metadata as m; print(m.version(\"$name\"))")" /wheels/constraints.txt || exit; done'
claim "a run that DALI feeds, its evaluation and a prediction" train 1001
claim "the same as a user that the image does not have" train 4321:4321
exit $failed
