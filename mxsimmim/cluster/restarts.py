"""Decide whether a job that failed is started again, and when. Pure functions."""
from typing import Any, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from mxsimmim.cluster.outcome import LAST_LINES, Outcome, describe_code, exit_status, summary

SOONEST, LATEST = 1.0, 60.0  # seconds until the next attempt: twice as long after each failure without progress
OFTEN = 2  # failures in a row, for which one host is to blame, until the job goes on without it
LONGEST = 300  # characters of a line
USAGE = 2  # exit status of a command that refuses its words or its configuration


class Failure(NamedTuple):
    """Tell how an attempt failed."""
    status: int  # the launcher's exit status for it
    causes: Sequence[str]  # for the user, a line each
    checkpoint: int = -1  # step of the newest that it wrote; -1: it wrote none
    error: Optional[Tuple[str, int]] = None  # the exception that began it, and after how many steps; None: no exception
    reduced: bool = False  # the job had fewer workers than asked for, since hosts were away
    gone: Sequence[Mapping[str, Any]] = ()  # workers that ended by themselves: rank, host, why
    host: str = ''  # that is to blame, if it is one


class Decision(NamedTuple):
    """Tell what follows a failure."""
    seconds: Optional[float]  # until the next attempt; None: there is none
    why: str  # in words for the user


def failure_of(outcome: Outcome) -> Failure:
    """Sum up an attempt that neither ended well nor was stopped by the user."""
    first = outcome.failed[0] if outcome.failed else None
    report = first.report if first else {}
    error = (report['error'], report.get('step', 0)) if 'error' in report else None
    gone = tuple({'rank': exit.process.index, 'host': exit.host, 'why': describe_code(exit.code)}
                 for exit in outcome.failed if exit.process.role == 'worker')
    return Failure(exit_status(outcome), summary(outcome), outcome.checkpoint, error, gone=gone,
                   host=host_to_blame(outcome))


def host_to_blame(outcome: Outcome) -> str:
    """Name the one host that was lost, or that has a process which was stopped, was killed or met an error first.

    Returns:
        '' where that is none or several, or where the first process that ended speaks of others, or of what else may be
        mended, such as a full disk.
    """
    hosts = {host for host, _ in outcome.lost} or {host for _, host in outcome.stopped}
    first = outcome.failed[0] if outcome.failed else None
    if first and not hosts and (first.code < 0 or 'error' in first.report):
        hosts = {first.host}
    return hosts.pop() if len(hosts) == 1 else ''


def failing_host(failures: Sequence[Failure]) -> str:
    """Name the host that all of the last `OFTEN` failures, without progress in between, came from; '' if none."""
    hosts = {failure.host for failure in failures[-OFTEN:]}
    often = len(failures) >= OFTEN and without_progress(failures) >= OFTEN - 1
    return hosts.pop() if often and len(hosts) == 1 else ''


def decide(failures: Sequence[Failure], most: int) -> Decision:
    """Choose what follows the last of a job's failures, in their order.

    What a job refuses with fewer workers, such as a mesh that does not divide them, it may take with all.

    Args:
        most: restarts without progress, which is a newer checkpoint than any before.
    """
    *before, last = failures
    if most == 0:
        return Decision(None, '')
    if last.status == USAGE and not last.reduced:
        return Decision(None, 'no restart: the command refuses its words or its configuration, and would again')
    if before and last.error and last.error == before[-1].error and not last.reduced:
        return Decision(None, f'no restart: the same error after the same {last.error[1]} steps as the time before')
    spent = without_progress(failures)
    if spent > most:
        return Decision(None, f'no restart: {most} without progress were allowed (--max-restarts {most})')
    seconds = min(SOONEST * 2 ** max(spent - 1, 0), LATEST)
    counted = f'{spent} of {most}' if spent else 'not counted, as there was progress'
    return Decision(seconds, f'restart in {seconds:g} s, from the newest whole checkpoint ({counted})')


def without_progress(failures: Sequence[Failure]) -> int:
    """Count the failures since the last that had written a newer checkpoint than any before it."""
    newest, spent = -1, 0
    for failure in failures:
        spent = 0 if failure.checkpoint > newest else spent + 1
        newest = max(newest, failure.checkpoint)
    return spent


def history(failures: Sequence[Failure]) -> List[str]:
    """Say how each attempt failed, in lines for the user; nothing where there was one, of which all is said."""
    if len(failures) == 1:
        return []
    return [f'attempt {number}: {brief(failure)}' for number, failure in enumerate(failures, 1)]


def brief(failure: Failure) -> str:
    """Say in a line what a failure came from."""
    return failure.causes[0].split(LAST_LINES)[0][:LONGEST] if failure.causes else 'failed without a word'
