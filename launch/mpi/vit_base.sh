#!/bin/sh
# Pre-trains ViT-B as 4 ranks of Horovod that Open MPI starts, where it finds itself: in the allocation of a resource
# manager, or on this machine. With -H FILE before the --, on the hosts of that file.
# Usage: launch/mpi/vit_base.sh /path/of/the/images/on/every/host [key=value ...]
cd "$(dirname "$0")/../.." || exit 1
images=${1:?usage: launch/mpi/vit_base.sh IMAGES [key=value ...]}
shift
exec tools/launch.py --launcher mpi --horovod -n 4 -- mxsimmim pretrain conf/vit_base.yaml data.path="$images" "$@"
