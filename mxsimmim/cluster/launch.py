"""The launcher's command: from its words to its exit status."""
import sys
from typing import Sequence

from mxsimmim.cluster import options
from mxsimmim.cluster.backends import BACKENDS
from mxsimmim.cluster.prepare import ConfigurationError
from mxsimmim.cluster.supervisor import Supervisor
from mxsimmim.cluster.terminal import Terminal
from mxsimmim.system import guards, text


def main(argv: Sequence[str]) -> int:
    """Launch the job of a command line, and return the exit status."""
    guards.name_crashes()
    text.open_streams()
    terminal = Terminal()
    try:
        given = options.parse(argv)
        backend = BACKENDS[given.launcher]
        status = backend.instead(given)
        return Supervisor(backend, terminal).run(options.job_spec(given)) if status is None else status
    except ConfigurationError as error:
        terminal.put(1, f'{error}\n'.encode(errors='replace'))
        return 2
    except ValueError as error:
        if isinstance(error, UnicodeError):
            raise
        terminal.say(*(f'error: {line}' for line in str(error).splitlines()))
        return 2
    finally:
        terminal.flush()
        sys.stdout.flush()


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
