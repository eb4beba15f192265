"""`mxsimmim dashboard`: a page that shows the runs in a folder while they train, from the files that they write.

It polls `/api/runs`, all runs in short, and `/api/runs/NAME`, one of them with its curves. Nothing but what a run's
folder holds is read: status.json, metrics.jsonl and pictures/.
"""
import asyncio
import base64
import contextlib
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, List, Sequence, Tuple

from ..system import web as http
from ..system.guards import unusable

try:
    from aiohttp import web
except Exception as _error:  # a broken package raises anything
    raise unusable('the dashboard', _error) from None

from .run_logger import METRICS
from .status import FILE, look

PAGE = Path(__file__).with_name('dashboard.html')
DRAWN = ('loss', 'val_loss', 'lr', 'images_per_second', 'grad_norm')
POINTS, EVENTS = 2000, 100  # of a curve, and of what happened, that are sent at once


def names(runs: Path) -> List[str]:
    """Return the names of the runs in a folder, sorted; what has another encoding than UTF-8 is left out."""
    found = []
    for path in runs.iterdir():
        with contextlib.suppress(OSError, UnicodeError):
            path.name.encode()
            if (path / FILE).is_file():
                found.append(path.name)
    return sorted(found)


def folder_of(runs: Path, name: str) -> Path:
    """Return the folder of a run; of no other, as a name with a slash or dots is none of `names`.

    Raises:
        HTTPNotFound: there is no such run.
    """
    if name not in names(runs):
        raise web.HTTPNotFound(text=f'no run has this name: {name}')
    return runs / name


def summary(run: Path) -> Dict[str, Any]:
    """Return a run's name and how it is doing, as `status.look`; of a status file that cannot be read, the error."""
    try:
        return {'name': run.name, **look(run)}
    except (ValueError, KeyError, TypeError) as error:
        return {'name': run.name, 'state': 'unreadable', 'error': str(error), 'workers': [], 'restarts': []}


def tail(file: Path, seen: str) -> Tuple[List[Dict[str, Any]], str, bool]:
    """Read what was added to metrics.jsonl since the last time.

    Args:
        seen: what the last call returned as such; '' for everything.

    Returns:
        the new records, of each `step` and what is drawn, of an event all of it; where this ends; whether it begins
        anew, since the file was replaced, as a run does that goes on. A torn last line comes the next time.
    """
    try:
        with open(file, 'rb') as stream:
            inode, size = os.fstat(stream.fileno()).st_ino, stream.seek(0, 2)
            known, _, offset = seen.partition('-')
            new = known != str(inode) or not offset.isdecimal() or int(offset) > size
            stream.seek(0 if new else int(offset))
            data = stream.read(size - stream.tell())
            end = stream.tell() - len(data) + data.rfind(b'\n') + 1
    except FileNotFoundError:
        return [], '', True
    records = []
    for line in data[:data.rfind(b'\n') + 1].splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError):  # not ours
            row = json.loads(line.decode())
            drawn = {name: row[name] for name in DRAWN if name in row}
            records.append({'step': row['step'], **(row if 'event' in row else drawn)})
    return records, f'{inode}-{end}', new


def curves(records: Iterable[Dict[str, Any]]) -> List[Dict[str, Any]]:
    """Return, thinned, the records that have something to draw."""
    return thinned([record for record in records if 'event' not in record and len(record) > 1])


def events(records: Iterable[Dict[str, Any]]) -> List[Dict[str, Any]]:
    """Return the records of what happened, such as skipped updates, the latest `EVENTS` of them."""
    return [record for record in records if 'event' in record][-EVENTS:]


def thinned(records: Sequence[Dict[str, Any]]) -> List[Dict[str, Any]]:
    """Return at most `POINTS` records with a loss and as many of validations, evenly chosen, with the last of each."""
    kept = []
    for kind in ('loss', 'val_loss'):
        own = [record for record in records if kind in record]
        every = -(-len(own) // POINTS) or 1
        kept += own[::-1][::every]
    return sorted(kept, key=lambda record: record['step'])


def newest_picture(run: Path) -> str:
    """Return the name of the picture of the latest step; '' if there is none."""
    found = [(int(match[1]), path.name) for path in (run / 'pictures').glob('*.png')
             for match in [re.search(r'-(\d+)\.png$', path.name)] if match]
    return max(found)[1] if found else ''


def picture_of(run: Path, name: str) -> Path:
    """Return the file of a picture.

    Raises:
        HTTPNotFound: there is none of this name in the run's folder `pictures`.
    """
    folder = (run / 'pictures').resolve()
    path = (folder / name).resolve()
    if path.parent != folder or path.suffix != '.png' or not path.is_file():
        raise web.HTTPNotFound(text=f'no picture has this name: {name}')
    return path


class Dashboard:
    """The routes. Files are read in threads, so that a disk that hangs holds up nobody else."""

    def __init__(self, runs: Path):
        self.runs, self.page = runs, PAGE.read_text(encoding='utf-8')

    def app(self) -> web.Application:
        """Build the application, for a server or a test."""
        app = web.Application()
        app.add_routes([web.get('/', self._page), web.get('/api/runs', self._all),
                        web.get('/api/runs/{name}', self._one),
                        web.get('/api/runs/{name}/pictures/{picture}', self._picture)])
        return app

    async def _page(self, _: web.Request) -> web.Response:
        return web.Response(text=self.page, content_type='text/html', headers={
            'Content-Security-Policy': policy(self.page), 'X-Content-Type-Options': 'nosniff'})

    async def _all(self, _: web.Request) -> web.Response:
        return await _json(lambda: [summary(self.runs / name) for name in names(self.runs)])

    async def _one(self, request: web.Request) -> web.Response:
        def read() -> Dict[str, Any]:
            run = folder_of(self.runs, request.match_info['name'])
            records, seen, anew = tail(run / METRICS, request.query.get('seen', ''))
            return {**summary(run), 'records': curves(records), 'events': events(records), 'seen': seen, 'anew': anew,
                    'picture': newest_picture(run)}
        return await _json(read)

    async def _picture(self, request: web.Request) -> web.Response:
        def read() -> bytes:
            run = folder_of(self.runs, request.match_info['name'])
            return picture_of(run, request.match_info['picture']).read_bytes()
        body = await asyncio.get_running_loop().run_in_executor(None, read)
        return web.Response(body=body, content_type='image/png', headers={'X-Content-Type-Options': 'nosniff'})


async def _json(make: Callable[[], Any]) -> web.Response:
    made = await asyncio.get_running_loop().run_in_executor(None, make)
    return web.json_response(made, headers={'Cache-Control': 'no-store'})


def policy(page: str) -> str:
    """Return the content security policy of a page: its own script and style, and nothing of other servers."""
    def own(kind: str) -> str:
        text = page.partition(f'<{kind}>')[2].partition(f'</{kind}>')[0]
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
    return (f"default-src 'none'; script-src {own('script')}; style-src {own('style')}; connect-src 'self'; "
            "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")


def serve(runs: Path, host: str, port: int) -> None:
    """Show the runs in a folder until SIGTERM or SIGINT.

    Raises:
        ValueError: there is no such folder, it is a run itself, or the address cannot be had.
    """
    if not runs.is_dir():
        raise ValueError(f'{runs} is not a folder: give the one that runs are written to, such as runs')
    if (runs / FILE).is_file():
        raise ValueError(f'{runs} is a run: give the folder that holds it, {runs.parent}')
    listener = http.listen(host, port)
    http.warn_of_strangers(listener, host, 'look at these runs')
    print(f'{runs}: {len(names(runs))} runs, on {http.address(listener)}', flush=True)
    asyncio.run(http.serve(Dashboard(runs).app(), listener))
