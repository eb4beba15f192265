#!/bin/sh
# Pre-trains ViT-B over ssh: 4 workers and 2 parameter servers on the hosts of the file `hosts` beside this script.
# Usage: launch/ssh/vit_base.sh /path/of/the/images/on/every/host [key=value ...]
cd "$(dirname "$0")/../.." || exit 1
images=${1:?usage: launch/ssh/vit_base.sh IMAGES [key=value ...]}
shift
exec tools/launch.py -n 4 -s 2 -H launch/ssh/hosts -- mxsimmim pretrain conf/vit_base.yaml data.path="$images" "$@"
