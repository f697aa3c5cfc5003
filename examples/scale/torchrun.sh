#!/bin/bash
# examples/scale/torchrun.sh PHOTOS DUMP [options of torchrun]: a part for each process that torchrun starts.
# Without torchrun's own cares: featcli needs no process group, and one part that fails need not end the others, but
# torchrun ends all when one does. So exit code 3 (some images failed, and are recorded) is made 0.
set -u
photos=$1 dump=$2
shift 2
exec torchrun --no-python "$@" bash -c \
  'featcli extract "$0" -c "${CHECKPOINT:-resnet50}" -o "$1" --part auto ${OPTIONS:-}; code=$?
   [ $code -eq 3 ] && exit 0; exit $code' "$photos" "$dump"
