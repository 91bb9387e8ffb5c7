#!/bin/sh
# What a container of launch/jobset_*.yaml runs: CONFIG, RUN_DIR and NUM_STEPS come from its environment, further flags
# of `pi0 train` as arguments. Kubernetes signals this shell alone, which passes it on. A run that was stopped before its
# last step ends with 75 instead of 0, so that the JobSet starts it again.
resume=
if [ -d "$RUN_DIR/checkpoints" ]; then resume=--resume; fi
pi0 train "$CONFIG" --run-dir "$RUN_DIR" --num-steps "$NUM_STEPS" $resume "$@" &
child=$!
trap 'kill -TERM "$child"' TERM
wait "$child"
code=$?
while kill -0 "$child" 2>/dev/null; do
    wait "$child"
    code=$?
done
if [ "$code" -eq 0 ] && [ ! -d "$RUN_DIR/checkpoints/$NUM_STEPS" ]; then code=75; fi
exit "$code"
