"""A small HTTP service: an image in; its classes, those of its pixels, or its reconstruction out."""
import asyncio
import io
import logging
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Awaitable, Callable, Dict

from ..system import web as http
from ..system.guards import unusable

try:
    import prometheus_client
    from aiohttp import ClientError, web
    from aiohttp.http_exceptions import HttpProcessingError
    from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
except Exception as _error:  # a broken package raises anything
    raise unusable('serving', _error) from None

from ..data.transforms import BrokenImage
from ..runtime.memory import ran_out
from ..tasks.registry import TASKS
from .batching import Batcher
from .engine import Engine, Prepared
from .trained import load_for_inference

QUEUE = 4  # batches' worth of requests that may be under way; more are turned away
DECODERS = 4  # threads; what they hold together is bounded by engine.ROOM
UPLOAD_SECONDS = 30  # an upload may take
SHUTDOWN_SECONDS = 60  # uploads under way may take at the end
ANSWERS = sorted({f'/{task.predictor.command}' for task in TASKS.values()})
PATHS = (*ANSWERS, '/healthz', '/metrics')

log = logging.getLogger(__name__)


class Service:
    """The routes and what they share. Threads decode, one computes, the event loop only passes on."""

    def __init__(self, engine: Engine, max_batch: int, max_bytes: int):
        """Start the thread that computes.

        Args:
            engine: what answers.
            max_batch: images computed at once at most.
            max_bytes: of the body of a request.
        """
        self._engine, self._max_bytes, self._limit = engine, max_bytes, QUEUE * max_batch
        self._open, self._ending = 0, False  # uploads under way; whether new ones are turned away
        self._threads = ThreadPoolExecutor(min(DECODERS, len(os.sched_getaffinity(0))), 'decoder')
        self._registry = registry = CollectorRegistry()
        self._requests = Counter('mxsimmim_requests', 'Requests answered.', ['path', 'status'], registry=registry)
        self._seconds = Histogram('mxsimmim_request_seconds', 'Time from headers to answer.', ['path'],
                                  registry=registry)
        batches = Histogram('mxsimmim_batch_size', 'Images computed at once.', registry=registry,
                            buckets=sorted({2 ** k for k in range(max_batch.bit_length())} | {max_batch}))
        self._batcher = Batcher(engine.answer, max_batch, batches.observe)
        Gauge('mxsimmim_queue_length', 'Images that wait.', registry=registry).set_function(self._batcher.__len__)

    def app(self) -> web.Application:
        """Builds the application, for a server or a test."""
        app = web.Application(middlewares=[self._count])
        app.add_routes([*(web.post(path, self._show) for path in ANSWERS),
                        web.get('/healthz', self._healthy), web.get('/metrics', self._metrics)])
        app.on_cleanup.append(self._close)
        return app

    async def finish(self) -> None:
        """Takes nothing new and waits for the uploads under way."""
        self._ending, deadline = True, time.monotonic() + SHUTDOWN_SECONDS
        while self._open and time.monotonic() < deadline:
            await asyncio.sleep(0.01)

    async def _close(self, _: web.Application) -> None:
        self._batcher.close()
        self._threads.shutdown()

    @web.middleware
    async def _count(self, request: web.Request, handler: Callable[..., Awaitable[Any]]) -> web.StreamResponse:
        """Counts, times, and says errors in JSON."""
        began, path = time.perf_counter(), request.path if request.path in PATHS else 'other'
        try:
            response = await handler(request)
        except web.HTTPNotFound:
            response = _problem(404, f'there is no {request.path} here, only {", ".join(PATHS)}')
        except web.HTTPMethodNotAllowed as error:
            response = _problem(405, f'{request.path} takes {", ".join(sorted(error.allowed_methods))}, not '
                                f'{request.method}', error.headers)
        except web.HTTPException as error:
            response = _problem(error.status, error.text or error.reason, error.headers)
        except Exception:
            log.exception('%s %s failed', request.method, request.path)
            response = _problem(500, 'the service failed; its log says how')
        self._requests.labels(path, response.status).inc()
        self._seconds.labels(path).observe(time.perf_counter() - began)
        return response

    async def _show(self, request: web.Request) -> web.Response:
        """Answers about the image in the request, if this run does what its path says."""
        predictor = self._engine.predictor
        if request.path != f'/{predictor.command}':
            raise web.HTTPConflict(text=f'this run is {predictor.kind}: POST to /{predictor.command}')
        item, answer = await self._answer(request)
        media, body = await asyncio.get_running_loop().run_in_executor(
            self._threads, self._engine.body, item, answer, request.headers.get('Accept', ''))
        return web.Response(body=body, headers={'Content-Type': media})

    async def _answer(self, request: web.Request) -> Any:
        """(the prepared upload, the network's answer)."""
        if self._ending:
            raise web.HTTPServiceUnavailable(text='the service is ending: try again later')
        if self._open >= self._limit:
            raise web.HTTPServiceUnavailable(text=f'{self._limit} images are in work already: try again in a moment',
                                             headers={'Retry-After': '1'})
        self._open += 1
        try:
            try:
                data = await asyncio.wait_for(self._upload(request), UPLOAD_SECONDS)
            except asyncio.TimeoutError:
                raise web.HTTPRequestTimeout(text=f'the upload took more than {UPLOAD_SECONDS} seconds') from None
            except (ConnectionError, ClientError, HttpProcessingError):  # nobody may be there to read this
                raise web.HTTPBadRequest(text='the upload broke off') from None
            loop = asyncio.get_running_loop()
            try:
                item = await loop.run_in_executor(self._threads, self._engine.prepare, data, 'the upload')
            except (BrokenImage, MemoryError) as error:
                if ran_out(error):
                    raise web.HTTPServiceUnavailable(text='the service has no memory for this image now: send a '
                                                     'smaller one') from error
                raise web.HTTPBadRequest(text=str(error)) from None
            return item, await asyncio.wrap_future(self._batcher.put(item))
        finally:
            self._open -= 1

    async def _upload(self, request: web.Request) -> bytes:
        """The image: the body, or the part called image of a multipart body."""
        self._check_size(request.content_length or 0)
        if not request.content_type.startswith('multipart/'):
            return await self._read(request.content.readany)
        try:
            reader = await request.multipart()
            part: Any = await reader.next()
            while part is not None and getattr(part, 'name', None) != 'image':
                await self._read(part.read_chunk)
                part = await reader.next()
            if part is not None:
                return await self._read(part.read_chunk)
        except (ValueError, AssertionError, AttributeError) as error:  # aiohttp's reader, of what is not multipart
            raise web.HTTPBadRequest(text=f'the body is not the multipart it says it is: {error}') from None
        raise web.HTTPBadRequest(text="the multipart body has no part called 'image'")

    async def _read(self, chunk: Callable[[], Awaitable[bytes]]) -> bytes:
        data = bytearray()
        while True:
            part = await chunk()
            if not part:
                return bytes(data)
            data += part
            self._check_size(len(data))

    def _check_size(self, size: int) -> None:
        if size > self._max_bytes:
            raise web.HTTPRequestEntityTooLarge(self._max_bytes, size, text='the upload is larger than the '
                                                f'{self._max_bytes:,} bytes that this service takes')

    async def _healthy(self, _: web.Request) -> web.Response:
        return web.json_response({'status': 'ok'})

    async def _metrics(self, _: web.Request) -> web.Response:
        return web.Response(body=prometheus_client.generate_latest(self._registry),
                            headers={'Content-Type': prometheus_client.CONTENT_TYPE_LATEST})


def _problem(status: int, text: str, headers: Any = ()) -> web.Response:
    kept: Dict[str, str] = {key: value for key, value in dict(headers).items() if key in ('Allow', 'Retry-After')}
    return web.json_response({'error': text}, status=status, headers=kept)


def serve(run: Path, host: str, port: int, max_batch: int, max_bytes: int) -> None:
    """Serves a run's network until SIGTERM or SIGINT; then answers what is under way.

    Args:
        run: folder of a run; a pre-training answers /reconstruct, all others /predict.
        host, port: where to listen; port 0 takes a free one.
        max_batch: images computed at once at most.
        max_bytes: of an upload.

    Raises:
        ValueError: no such run, an address that cannot be had.
    """
    if max_batch < 1 or max_bytes < 1:
        raise ValueError(f'--max-batch={max_batch} and --max-bytes={max_bytes} must be positive')
    trained = load_for_inference(run)
    listener = http.listen(host, port)
    engine = Engine(trained)
    for count in (1, max_batch):  # the first of a shape is slow
        engine.answer([_blank(engine)] * count)
    service, predictor = Service(engine, max_batch, max_bytes), engine.predictor
    what = f'{predictor.summary}, POST /{predictor.command}'
    http.warn_of_strangers(listener, host, 'use this service')
    print(f'{run}, step {trained.step}: {what}, on {http.address(listener)}', flush=True)
    asyncio.run(http.serve(service.app(), listener, service.finish))


def _blank(engine: Engine) -> Prepared:
    file = io.BytesIO()
    from PIL import Image
    Image.new('RGB', (8, 8)).save(file, 'PNG')
    return engine.prepare(file.getvalue(), 'blank')
