"""Where Python was when native code crashed, from what its `faulthandler` wrote. Part of what is sent to every host."""
import re
from typing import Iterator, List, NamedTuple, Sequence, Tuple

WINDOW = 1 << 18  # last bytes of a log that a report is looked for in: one of many threads is long
BEGIN = 'Fatal Python error: '
# What the report of Python 3.8 to 3.11 has after its first line. A file's name is what it likes, in ASCII: é is \xe9.
LINE = re.compile(r'(?:Current t|T)hread 0x\w+ .*:|  File ".*", line .*|  <no Python frame>|  Garbage-collecting|'
                  r'  \.\.\.|Python runtime state: .*|Extension modules: .*|')
FRAME = re.compile(r'  File "(.*)", line (\d+|\?\?\?) in (.*)')
NO_FILE = re.compile(r'<(?!string>|stdin>)')  # such as <frozen importlib._bootstrap>
# Files of Python itself and of installed packages other than this one.
LIBRARY = re.compile(r'/(?:lib(?:64)?/python\d[\d.]*|(?:site|dist)-packages)/(?!(?:site-packages/)?mxsimmim/)')


class Frame(NamedTuple):
    """A line of Python that is being run; `line` is ??? where Python does not know it."""
    file: str
    line: str
    function: str

    def __str__(self) -> str:
        return f'{self.file}:{self.line} in {self.function}'


def split(lines: Sequence[str]) -> Tuple[List[str], List[str]]:
    """A log's lines without its last report, of which the first line stays, and that report's other lines."""
    lines = list(lines)
    begin = next((number for number in range(len(lines), 0, -1) if BEGIN in lines[number - 1]), len(lines))
    end = next((number for number in range(begin, len(lines)) if not LINE.fullmatch(lines[number])), len(lines))
    return lines[:begin] + lines[end:], lines[begin:end]


def place(lines: Sequence[str]) -> str:
    """Where a process crashed, by the lines of its log: ``in native code at FILE:LINE in FUNCTION``, or ''.

    That is the newest call. Where it is in a file of Python's own or of an installed package, the newest in any other
    is named as well. A thread that native code started has no line: then it is where Python's first thread was.
    """
    threads = list(_threads(split(lines)[1]))
    if not threads:
        return ''
    calls = next((calls for current, calls in threads if current), threads[-1][1])
    calls = [call for call in calls if not NO_FILE.match(call.file)] or calls
    ours = next((call for call in calls if not LIBRARY.search(call.file)), calls[0])
    where = f'{calls[0]}' + (f', called at {ours}' if ours != calls[0] else '')
    if any(current for current, _ in threads):
        return f'in native code at {where}'
    return f'in a thread of native code, while Python was at {where}'


def _threads(report: Sequence[str]) -> Iterator[Tuple[bool, List[Frame]]]:
    """(whether it crashed, its calls, the newest first) of each thread that has any; the first thread comes last."""
    found: List[Tuple[bool, List[Frame]]] = []
    for line in report:
        call = FRAME.fullmatch(line)
        if call and found:
            found[-1][1].append(Frame(*call.groups()))
        elif not line.startswith(' ') and 'hread 0x' in line:
            found.append((line.startswith('Current'), []))
    return (thread for thread in found if thread[1])
