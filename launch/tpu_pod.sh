#!/bin/bash
# Trains on all hosts of a TPU pod slice:  launch/tpu_pod.sh NAME ZONE CONFIG RUN_DIR [FLAGS of pi0 train ...]
# The repository is copied to each host and installed there; RUN_DIR and the demonstrations have to be on a disk that
# all hosts share (a Filestore or a bucket mounted by gcsfuse). Run it again with --resume after a stop.
# To stop with a checkpoint: launch/tpu_pod.sh NAME ZONE stop
set -eu
name=$1 zone=$2 config=$3
shift 3
on_all() { gcloud compute tpus tpu-vm ssh "$name" --zone "$zone" --worker all --command "$1"; }

if [ "$config" = stop ]; then
    on_all "pkill -TERM -o -f '[p]i0 train' || true"
    exit
fi
run=$1
shift
archive=$(mktemp)
git archive --format tar.gz --output "$archive" HEAD
gcloud compute tpus tpu-vm scp "$archive" "$name:/tmp/pi0.tar.gz" --zone "$zone" --worker all
rm "$archive"
on_all "mkdir -p pi0 && tar -xzf /tmp/pi0.tar.gz -C pi0 && cd pi0 && python3 -m venv .venv && .venv/bin/pip install -q '.[tpu]'"
on_all "cd pi0 && exec .venv/bin/pi0 train '$config' --run-dir '$run' --hosts.cluster gcetpu $*"
