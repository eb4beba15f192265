"""Say how an attempt at a job ended: to the user in lines, to the shell as an exit status. Pure functions."""
import signal
from types import MappingProxyType
from typing import Any, List, Mapping, NamedTuple, Sequence, Tuple

from mxsimmim.cluster.logs import log_path
from mxsimmim.cluster.spec import Process

LAST_LINES = ', its last lines:'  # after what is said in a line


class Exit(NamedTuple):
    """Tell of a process that ended; `code` is minus the number of the signal that killed it, `time` is ours."""
    process: Process
    host: str
    code: int
    time: float
    tail: Sequence[str] = ()  # the last lines of its log
    crash: str = ''  # in native code: where Python was
    report: Mapping[str, Any] = MappingProxyType({})  # what it told, see `runtime.report`


class Outcome(NamedTuple):
    """Tell how an attempt ended; with all defaults, well."""
    signal: int = 0  # that stopped the launcher
    failed: Sequence[Exit] = ()  # by themselves, the first one first
    lost: Sequence[Tuple[str, str]] = ()  # host, last words of its agent
    checkpoint: int = -1  # step of the newest that a process told of; -1: none
    notify: Tuple[str, str] = ('', '')  # who is to be told of this, and of what run: a command and a folder
    planned: bool = False  # the launcher itself had it stop at a checkpoint, to start it again
    stopped: Sequence[Tuple[Process, str]] = ()  # process, host: neither running nor ended then


def exit_status(outcome: Outcome) -> int:
    """Choose the launcher's exit status: as a shell would give it to the process that failed first."""
    if outcome.signal:
        return 128 + outcome.signal
    if not outcome.failed:
        return 1 if outcome.lost else 0
    code = outcome.failed[0].code
    return code if code > 0 else 128 - code


def summary(outcome: Outcome) -> List[str]:
    """Say what went wrong, in lines for the user; none if nothing did."""
    if outcome.signal:
        return [f'stopped by {signal.Signals(outcome.signal).name}']
    lines = [f"host {host} was lost: {last or 'its agent ended without a word'}" for host, last in outcome.lost]
    lines += [f'{process} on {host} was stopped, by a signal such as SIGSTOP or by a debugger: all wait for it'
              for process, host in outcome.stopped]
    if not outcome.failed:
        return lines
    first, *others = outcome.failed
    if 'stalled' in first.report:
        lines.append(f'{first.process} ended itself: {first.report["stalled"]}; the stack of each of its threads is in '
                     f'{log_path(first.process)}')
    else:
        lines.append(f'{first.process} on {first.host} {describe_code(first.code)}; its log is '
                     + log_path(first.process) + (LAST_LINES if first.tail else ', and empty'))
        lines += [f'  | {line}' for line in first.tail]
    if first.crash:
        lines.append(f'{first.process} crashed {first.crash}')
    if first.code in (-signal.SIGKILL, 128 + signal.SIGKILL):  # the launcher had killed nothing yet
        lines.append(f'if nobody sent that signal, {first.host} ran out of memory (`dmesg` there says so): start '
                     'fewer processes a host, or lower train.batch_size')
    if others:
        lines.append('after it: ' + ', '.join(f'{other.process} {describe_code(other.code)}' for other in others))
    return lines


def describe_code(code: int) -> str:
    """Say an exit status in words."""
    if code >= 0:
        return f'failed with exit code {code}'
    known = {int(number): number.name for number in signal.Signals}
    return f'was killed by {known.get(-code, f"signal {-code}")}'
