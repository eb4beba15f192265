#!/bin/sh
# Pre-trains a small ViT on handwritten digits: 2 workers and 1 parameter server on this machine, about 2 minutes.
cd "$(dirname "$0")/../.." || exit 1
exec tools/launch.py -n 2 -s 1 -- mxsimmim pretrain conf/digits.yaml "$@"
