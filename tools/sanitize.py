#!/usr/bin/env python3
"""sanitize.py PYTEST-ARGUMENTS: tests of the native operators under AddressSanitizer and UndefinedBehaviorSanitizer.

Compiles the library anew, into build/sanitize. Its status is pytest's; 77 where the compiler has no sanitizers.
"""
import os
import subprocess
import sys
from pathlib import Path
from typing import List

from mxsimmim.ops.build import NotBuilt, build, find_compiler

ROOT = Path(__file__).resolve().parents[1]
LACKING = 77


def runtimes(compiler: str) -> List[str]:
    """The sanitizers' libraries, which must be in the process before Python is.

    Raises:
        NotBuilt: the compiler has none.
    """
    found = []
    for name in ('libasan.so', 'libubsan.so'):
        path = subprocess.run([compiler, f'-print-file-name={name}'], stdout=subprocess.PIPE, check=True,
                              universal_newlines=True).stdout.strip()
        if not os.path.isabs(path):  # the bare name: it is nowhere
            raise NotBuilt(f'{compiler} has no {name}', 'install the one of GCC')
        found.append(os.path.realpath(path))
    return found


def main(arguments: List[str]) -> int:
    library = ROOT / 'build/sanitize/libmxsimmim.so'
    try:
        preloaded = runtimes(find_compiler())
        build(library, library.parent / 'objects', sanitize=True)
    except NotBuilt as error:
        print(f'sanitize: {error}', file=sys.stderr)
        return LACKING
    # Python, NumPy and MXNet keep memory until the end by design; what they leak is not the matter here.
    env = {**os.environ, 'MXSIMMIM_LIBRARY': str(library), 'LD_PRELOAD': ' '.join(preloaded),
           'ASAN_OPTIONS': 'detect_leaks=0', 'UBSAN_OPTIONS': 'print_stacktrace=1'}
    # A sanitizer ends the process at once: what it says must not be in pytest's hands.
    tests = [sys.executable, '-m', 'pytest', '--capture=sys', *arguments]
    return subprocess.run(tests, cwd=str(ROOT), env=env).returncode


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
