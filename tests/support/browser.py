"""A headless Chromium, spoken to over its DevTools protocol: opens a page, evaluates JavaScript, takes pictures."""
import asyncio
import base64
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import aiohttp

from .programs import needed

START = 60  # seconds that Chromium may take to start on a busy machine


class Browser:
    """A page at `url`; `complaints` are its errors and what its content security policy has refused."""

    def __init__(self, url):
        self.complaints, self._number, self._loop = [], 0, asyncio.new_event_loop()
        self._folder = Path(tempfile.mkdtemp(prefix='chromium-'))  # a short name, as there will be a socket below it
        self._log = open(self._folder / 'log', 'wb')
        self._process = subprocess.Popen(
            [needed('chromium', 'chromium'), '--headless', '--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage',
             '--no-first-run', '--disable-background-networking', '--disable-component-update', '--hide-scrollbars',
             f'--user-data-dir={self._folder}/user', '--remote-debugging-port=0', 'about:blank'],
            stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log, start_new_session=True,
            env={**os.environ, 'TMPDIR': str(self._folder), 'HOME': str(self._folder)})
        self._do(self._connect(self._folder / 'user' / 'DevToolsActivePort'))
        for domain in ('Runtime', 'Log', 'Page'):
            self.call(f'{domain}.enable')
        self.call('Page.navigate', url=url)

    def call(self, method, **parameters):
        """The result of a DevTools command."""
        return self._do(self._call(method, parameters))

    def evaluate(self, expression):
        """The value of a JavaScript expression; None where it throws, as before the page is there."""
        return self.call('Runtime.evaluate', expression=expression, returnByValue=True)['result'].get('value')

    def until(self, expression, seconds, otherwise=lambda: ''):
        """The value of an expression as soon as it is true; `otherwise` says more if it never is."""
        end = time.monotonic() + seconds
        while True:
            found = self.evaluate(expression)
            if found:
                return found
            if time.monotonic() > end:
                text = self.evaluate('document.body.innerText')
                raise AssertionError(f'not within {seconds} s: {expression}\n{text}\n{self.complaints}\n{otherwise()}')
            time.sleep(0.1)

    def size(self, width, height, dark=False):
        """Sets the size of the window, and which colours the user prefers."""
        self.call('Emulation.setDeviceMetricsOverride', width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.call('Emulation.setEmulatedMedia',
                  features=[{'name': 'prefers-color-scheme', 'value': 'dark' if dark else 'light'}])

    def picture(self, path, whole=True):
        """Writes what the window shows as a PNG, with `whole` all of the page."""
        data = self.call('Page.captureScreenshot', captureBeyondViewport=whole)['data']
        path.write_bytes(base64.b64decode(data))

    def close(self):
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._do(self._session.close())
        self._loop.close()
        self._log.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _do(self, what):
        return self._loop.run_until_complete(asyncio.wait_for(what, START + 10))

    async def _connect(self, told):
        end = time.monotonic() + START
        while not (told.exists() and told.read_text().strip()):
            assert self._process.poll() is None and time.monotonic() < end, (self._folder / 'log').read_text()
            await asyncio.sleep(0.05)
        port = told.read_text().split()[0]
        self._session = aiohttp.ClientSession()
        async with self._session.get(f'http://127.0.0.1:{port}/json/list') as answer:
            page = next(each for each in await answer.json() if each['type'] == 'page')
        self._socket = await self._session.ws_connect(page['webSocketDebuggerUrl'], max_msg_size=0)

    async def _call(self, method, parameters):
        self._number += 1
        await self._socket.send_json({'id': self._number, 'method': method, 'params': parameters})
        while True:
            message = await self._socket.receive_json()
            if message.get('id') == self._number:
                assert 'error' not in message, message
                return message['result']
            if message.get('method') in ('Runtime.exceptionThrown', 'Log.entryAdded'):
                self.complaints.append(message['params'])
