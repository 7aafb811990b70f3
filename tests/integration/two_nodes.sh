#!/usr/bin/env bash
# two_nodes.sh COMMAND…: runs a command twice at once, on two simulated nodes: network namespaces joined by a virtual cable,
# each with its own loopback, interface and address. NODE_RANK, MASTER_ADDR, MASTER_PORT are set as a cluster would.
set -euo pipefail

if [ "${TWO_NODES:-}" != inside ]; then  # namespaces of one's own: needs no root, and nothing is left behind
  TWO_NODES=inside exec unshare --user --map-root-user --net "$0" "$@"
fi

unshare --net sleep infinity &
other=$!
trap 'kill "$other"; wait "$other" || true' EXIT
until [ "$(readlink /proc/$other/ns/net)" != "$(readlink /proc/self/ns/net)" ]; do sleep 0.05; done
node1() { nsenter --net --target "$other" "$@"; }

ip link set lo up
ip link add node0 type veth peer name node1
ip link set node1 netns "$other"
ip addr add 10.77.0.1/24 dev node0
ip link set node0 up
node1 ip link set lo up
node1 ip addr add 10.77.0.2/24 dev node1
node1 ip link set node1 up

export MASTER_ADDR=10.77.0.1 MASTER_PORT=29500
NODE_RANK=0 GLOO_SOCKET_IFNAME=node0 "$@" & first=$!
NODE_RANK=1 GLOO_SOCKET_IFNAME=node1 node1 "$@" & second=$!
status=0
wait "$first" || status=$?
wait "$second" || status=$?
exit "$status"
