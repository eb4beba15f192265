"""The ``mxsimmim`` command, also as ``python -m mxsimmim``: it sees to its process before it imports the command."""
import os
import platform
import sys
from typing import List, Optional

from .runtime import watchdog
from .runtime.mxnet_private import light_import
from .system.guards import alone, name_crashes


def main(argv: Optional[List[str]] = None) -> int:
    """Runs the command; its exit status."""
    name_crashes()
    with alone(), light_import():
        with watchdog.Watch(f'process {os.getpid()} on {platform.node()}', 0.0), watchdog.doing('the command to load'):
            from .cli import main as command
        return command(argv)


if __name__ == '__main__':
    sys.exit(main())
