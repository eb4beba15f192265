#!/bin/sh
# A private, encrypted network for a job: WireGuard between all hosts, as interface `mxjob`; the first is 10.99.0.1.
# Usage: launch/security/wireguard.sh up|down HOST [HOST ...]
# HOST is its name for ssh and for the other hosts. Each needs wg and wg-quick (Debian: wireguard-tools), root, and UDP
# port 51820 open to the others. A private key never leaves its host.
set -eu
usage='usage: wireguard.sh up|down HOST [HOST ...]'
action=${1:?$usage}; shift; : "${1:?$usage}"
case $action in up|down) ;; *) echo "$usage" >&2; exit 2;; esac
if [ "$action" = down ]; then
    status=0
    for host; do ssh "$host" wg-quick down mxjob || status=1; done
    exit $status
fi
peers='' n=0
for host; do
    n=$((n + 1))
    key=$(ssh "$host" 'umask 077; mkdir -p /etc/wireguard; cd /etc/wireguard
                       [ -s mxjob.key ] || wg genkey > mxjob.key; wg pubkey < mxjob.key')
    peers="$peers
[Peer]
PublicKey = $key
AllowedIPs = 10.99.0.$n/32
Endpoint = ${host#*@}:51820
"
done
n=0
for host; do
    n=$((n + 1))
    echo "$peers" | ssh "$host" "umask 077; cd /etc/wireguard; wg-quick down mxjob 2> /dev/null
        { printf '[Interface]\nAddress = 10.99.0.$n/24\nListenPort = 51820\nPrivateKey = '
          cat mxjob.key -; } > mxjob.conf
        wg-quick up mxjob"
done
