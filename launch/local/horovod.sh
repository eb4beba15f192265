#!/bin/sh
# The same run as 2 ranks of Horovod, without servers.
cd "$(dirname "$0")/../.." || exit 1
exec tools/launch.py -n 2 --horovod -- mxsimmim pretrain conf/digits.yaml "$@"
