"""Launching a job on this machine, over ssh or with mpirun. Standard library only, here and on every host.

Pure: `options` (the command line), `job` (what runs where, with which environment), `ssh` and `mpi` (commands),
`preflight` (what is wrong with the hosts), `fault` (where a process crashed). On the launching machine: `supervise`
(the job from beginning to end), `prepare` (its beginning), `seats` (agents as seen from there), `terminal`. Sent to
every host: `agent`, `probe`, `rendezvous`, `channel`, `fault`.
"""
