"""The ``mxsimmim`` command: reads its line, runs what that says, and ends with a status and a line for each error."""
import argparse
import atexit
import contextlib
import opcode
import os
import sys
import threading
import time
import traceback
from typing import List, Optional

from . import commands
from .config import Config, ConfigError, configfile, foreign_names
from .runtime import memory, mxnet_private, report
from .system import paths, text

LEAVING = 10.0  # seconds that a command which has failed may take to end
TRAINING = ('-h', '--help', '--check', '--check-config', '--eval')  # options of pretrain and finetune


def arguments(argv: Optional[List[str]]) -> argparse.Namespace:
    """Parses the command line, of this process where `argv` is None; a wrong one ends it with status 2.

    Raises:
        ConfigError: options of other tools, with ours.
    """
    parser = commands.parser()
    words = sys.argv[1:] if argv is None else argv
    if words[:1] in (['pretrain'], ['finetune']):
        foreign = foreign_names.options(words[1:], TRAINING, configfile.known_keys())
        if foreign:
            raise ConfigError('\n'.join(foreign))
    args, late = parser.parse_known_args(argv)
    # argparse takes no key=value that comes after an option.
    if late and (not hasattr(args, 'overrides') or any(word.startswith('-') for word in late)):
        parser.error(f'unrecognized arguments: {" ".join(late)}')
    if late:
        args.overrides += late
    for name in ('run', 'file', 'output', 'picture', 'images', 'config', 'classes'):  # --output=~/x is no shell's ~
        value = getattr(args, name, None)
        if value:
            setattr(args, name, paths.home(value) if isinstance(value, str) else list(map(paths.home, value)))
    return args


def main(argv: Optional[List[str]] = None) -> int:
    """Runs a command; returns the exit status: 2 for what the user wrote, 1 for what went wrong later.

    Without `argv` the process is the command's own, and where that fails it ends here: see `leave`.
    """
    if argv is None:
        text.restart_in_utf8()
        text.open_streams()
    args = None
    try:
        text.needs_output(True)
        try:
            args = arguments(argv)
        finally:
            print(end='', flush=True)  # help
        text.needs_output(args.function in commands.PRINTING)
        status = args.function(args)
        print(end='', flush=True)
        return status
    except BrokenPipeError:
        return 1
    except Exception as error:
        # In a job with parameter servers, too, this must be the end while the exception is still held: with it goes the
        # kvstore, and MXNet then waits for the other workers, which wait for this one.
        ends = argv is None or 'DMLC_ROLE' in os.environ
        report.tell_error(error)
        if args and memory.ran_out(error):
            status = fail(1, memory.explain(error, args.command, _config_of(args)))
        elif speaks_to_the_user(error):
            status = fail(2 if isinstance(error, ConfigError) else 1, str(error))
        elif ends:
            status = fail(1, traceback.format_exc())
        else:
            raise
        if ends:
            leave(status)
        return status


def _config_of(args: argparse.Namespace) -> Optional[Config]:
    """The configuration that a command works with, if it comes so far."""
    with contextlib.suppress(Exception):
        if args.command in memory.TRAINING:
            return configfile.load(args.config, args.overrides)
        from .training import run_folder
        return run_folder.read_config(args.run)
    return None


def speaks_to_the_user(error: Exception) -> bool:
    """By the rule of the house a ValueError does, if it comes from a `raise` of ours: Python's own is a bug of ours."""
    if not isinstance(error, ValueError) or isinstance(error, UnicodeError):
        return False
    last = error.__traceback__
    assert last is not None
    while last.tb_next:
        last = last.tb_next
    name, code = last.tb_frame.f_globals.get('__name__', ''), last.tb_frame.f_code.co_code
    return name.partition('.')[0] == __package__ and opcode.opname[code[last.tb_lasti]] == 'RAISE_VARARGS'


def fail(status: int, message: str) -> int:
    """Says what went wrong; returns the status."""
    for line in text.shown(message).splitlines():
        text.show(f'mxsimmim: error: {line}', sys.stderr)
    return status


def leave(status: int) -> None:
    """Ends the process after a failure, within `LEAVING` seconds.

    What an ordinary end of the interpreter waits for has no limit: threads that are not daemons, MXNet's operators
    under way and, in its destructors, its threads. Here functions registered with atexit are still called (temporary
    folders are removed, Horovod tells the other ranks, coverage is written), and destructors are not.
    """
    def watch() -> None:
        time.sleep(LEAVING)
        os._exit(status)

    def flush() -> None:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(AttributeError, OSError, ValueError):  # none, a full disk, closed
                stream.flush()

    flush()
    with contextlib.suppress(RuntimeError):  # no memory for a thread
        threading.Thread(target=watch, daemon=True).start()
    mxnet_private.forget_shutdown()  # MXNet would wait for operators, and say once more what went wrong in them
    with contextlib.suppress(BaseException):
        atexit._run_exitfuncs()
    flush()
    os._exit(status)


if __name__ == '__main__':
    sys.exit(main())
