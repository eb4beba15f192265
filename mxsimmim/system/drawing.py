"""Figures of matplotlib as PNG files, without a display, a home to write to or a font for every letter."""
import atexit
import os
import shutil
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any, Tuple

from .text import drawn


def figure(size: Tuple[float, float]) -> Any:
    """Makes a figure of matplotlib's, inches; without pyplot: no display, no state.

    Where there is no home to keep its fonts in, it gets a folder that goes when the process ends: it would end itself,
    or complain.

    Raises:
        ValueError: matplotlib does not load.
    """
    try:
        if 'matplotlib' not in sys.modules and not os.environ.get('MPLCONFIGDIR'):
            home = os.path.expanduser('~')  # stays as it is where nobody knows
            places = [os.environ.get(f'XDG_{kind}_HOME') or os.path.join(home, f'.{kind.lower()}')
                      for kind in ('CONFIG', 'CACHE')]
            if not all(place.startswith('/') and _writable(Path(place, 'matplotlib')) for place in places):
                os.environ['MPLCONFIGDIR'] = tempfile.mkdtemp(prefix='mxsimmim-matplotlib-')
                atexit.register(shutil.rmtree, os.environ['MPLCONFIGDIR'], ignore_errors=True)
        from matplotlib.figure import Figure
    except Exception as error:
        way_out = 'install it again' if isinstance(error, ImportError) else 'set MPLCONFIGDIR to a folder of your own'
        raise ValueError(f'matplotlib, which draws, does not load here ({error}): {way_out}') from error
    return Figure(figsize=size, layout='constrained')


def _writable(folder: Path) -> bool:
    """Whether there is such a folder to write to, or it can be made."""
    return os.access(next(place for place in (folder, *folder.parents) if place.exists()), os.W_OK | os.X_OK)


def escape(name: str) -> str:
    """What a font can draw, of which matplotlib takes no part for mathematics."""
    return drawn(name).replace('$', r'\$')


def save(figure: Any, out: Path) -> None:
    """Writes a figure as the PNG file `out`; ValueError where it cannot."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings('ignore', 'Glyph')  # which its font does not have: a box is drawn
            figure.savefig(out, format='png', dpi=110)
    except OSError as error:
        raise ValueError(f'{out}: cannot be written: {error.strerror or error}; choose another place') from error
