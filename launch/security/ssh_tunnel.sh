#!/bin/sh
# A private, encrypted network for a job where there is nothing but ssh: a tunnel from this machine, 10.99.0.1, to each
# host; the first is 10.99.0.2. The interface is `mxjob` everywhere.
# Usage: launch/security/ssh_tunnel.sh up|down HOST [HOST ...]
# Needs root here and on each host, and there `PermitTunnel yes` in /etc/ssh/sshd_config.
set -eu
usage='usage: ssh_tunnel.sh up|down HOST [HOST ...]'
action=${1:?$usage}; shift; : "${1:?$usage}"
case $action in up|down) ;; *) echo "$usage" >&2; exit 2;; esac
if [ "$action" = down ]; then
    n=1 status=0
    for host; do n=$((n + 1)); ssh -S "/run/mxjob-$n" -O exit "$host" || status=1; done
    ip link del mxjob
    exit $status
fi
ip link add mxjob type bridge
ip addr add 10.99.0.1/24 dev mxjob
ip link set mxjob up
n=1
for host; do
    n=$((n + 1))
    ssh -f -N -M -S "/run/mxjob-$n" -o Tunnel=ethernet -w $n:$n -o ExitOnForwardFailure=yes \
        -o ServerAliveInterval=3 "$host"
    ip link set tap$n master mxjob up
    ssh -S "/run/mxjob-$n" "$host" "ip link set tap$n name mxjob && ip addr add 10.99.0.$n/24 dev mxjob &&
                                    ip link set mxjob up"
done
