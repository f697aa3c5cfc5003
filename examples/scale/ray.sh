#!/bin/bash
# A Ray of two nodes on this machine, and featcli on it: examples/scale/ray.sh PHOTOS DUMP
# On a real cluster the first `ray start` runs on the head node and the second on every other, with its own address.
# Ray asks for a token where it is not told otherwise: the same ~/.ray/auth_token has to be on every node.
set -u
export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
port=${PORT:-6399}
ray start --head --port "$port" --num-cpus 0 --include-dashboard=false
address=$(hostname -i | cut -d ' ' -f 1):$port
ray start --address "$address" --node-ip-address 127.0.0.2 --num-cpus 1
ray start --address "$address" --node-ip-address 127.0.0.3 --num-cpus 1
featcli extract "$1" -c "${CHECKPOINT:-resnet50}" -o "$2" --engine ray --ray-address "$address" ${OPTIONS:-}
code=$?
echo "ray stop ends every Ray of this user; this one goes on at $address"
exit $code
