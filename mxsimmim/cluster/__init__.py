"""Launch a job on this machine or on a cluster of some kind. Standard library only, here and on every host.

On the launching machine, each module knows those before it alone:

| module | what it does |
|---|---|
| `hostfile`, `spec`, `environment` | say what the job is, what runs where, and with which environment (pure) |
| `connections`, `callback` | start agents and speak to them |
| `backends` | know the kinds of clusters: a file each, listed in `BACKENDS` |
| `options`, `preflight` | read the command line; say what keeps a job from starting (pure) |
| `logs`, `terminal`, `outcome` | keep logs, show output, say how an attempt ended |
| `prepare`, `attempt` | begin one start of a job; follow it to its end |
| `restarts` | decide what follows a failure (pure) |
| `absence`, `supervisor` | look out for hosts that are away; run the job |
| `launch` | the command |
| `ray` | the same from a driver of Ray's, or a notebook |

Sent to every host: `agent`, which starts processes and reports their ends, and what it needs: `messages` (to and from
the launcher), `inspection` (of the host), `rendezvous` (of Horovod's ranks), `fault` (where a process crashed).
"""
