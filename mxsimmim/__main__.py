"""``python -m mxsimmim`` is the ``mxsimmim`` command."""
import sys

from .cli import main

sys.exit(main())
