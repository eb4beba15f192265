"""`mxsimmim` on a machine that seems to have so much memory: little_memory.py BYTES ARGUMENTS OF MXSIMMIM."""
import sys

import mxsimmim.cli
from mxsimmim.runtime import facts

size, *arguments = sys.argv[1:]
facts._memory = lambda: (float(size) / facts.GIB,) * 2
sys.argv[1:] = arguments
sys.exit(mxsimmim.cli.main())
