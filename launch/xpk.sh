#!/bin/bash
# Trains on a GKE cluster that xpk made:  launch/xpk.sh CLUSTER TPU_TYPE NUM_SLICES CONFIG RUN_DIR NUM_STEPS [FLAGS ...]
# The image is launch/Dockerfile's with EXTRA=tpu, named in IMAGE. RUN_DIR lies on storage that the cluster mounts
# (xpk storage attach). A run that was stopped before its last step ends with 75, for which xpk restarts the workload.
set -eu
cluster=$1 type=$2 slices=$3 config=$4 run=$5 steps=$6
shift 6
xpk workload create --cluster "$cluster" --workload "pi0-$(date +%s)" --tpu-type "$type" --num-slices "$slices" \
    --docker-image "$IMAGE" --max-restarts 20 \
    --command "CONFIG=$config RUN_DIR=$run NUM_STEPS=$steps sh launch/k8s_train.sh --mesh.slices $slices --mesh.data 1 --mesh.fsdp -1 $*"
