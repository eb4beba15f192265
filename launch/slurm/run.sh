#!/bin/sh
# What the batch scripts beside this one run: tools/launch.py in their allocation. Stopped before the time limit, by
# their --signal=B:TERM@120, it saves a checkpoint; then Slurm is told to start the job again, which goes on from there.
tools/launch.py --launcher slurm "$@" &
launcher=$!
trap 'kill -TERM $launcher' TERM
wait $launcher
status=$?
while kill -0 $launcher 2> /dev/null; do  # the signal ended the wait, not the launcher
    wait $launcher
    status=$?
done
# 143: by SIGTERM. After scancel the job no longer runs.
if [ $status = 143 ] && [ "$(squeue -h -j "$SLURM_JOB_ID" -o %T)" = RUNNING ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $status
