"""The page of ``firefly chat --web``, which needs the extra ``web``, and nothing from any network.

The browser keeps the conversation and sends all of it with every question; the server keeps none.
"""

import asyncio
import contextlib
import ipaddress
import json
import socket
import sys
import traceback
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import uvicorn
import yaml
from starlette.applications import Starlette
from starlette.concurrency import iterate_in_threadpool, run_in_threadpool
from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from transformers import GenerationConfig

from firefly_lightning.chat.questions import read_question, sliders
from firefly_lightning.errors import FireflyError, reason
from firefly_lightning.evaluation.generation import change_decoding
from firefly_lightning.preparation.templates.reader import TEMPLATE_FOLDER
from firefly_lightning.prompt import Turn

Answer = Callable[[Sequence[Turn], str, GenerationConfig], Iterator[str]]
"""Streams the answer to a question after some turns."""

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")

HEADERS = {
    # A browser fetches nothing from elsewhere, whatever an answer holds, and no other page shows this one in a frame.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Frame-Options": "DENY",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # files of two releases are not mixed
}
"""Headers of every response, refusals included."""


def examples() -> list[dict[str, str]]:
    """An example question ``{"kind", "description", "input"}`` of every kind that has templates in this package."""
    contents = (yaml.safe_load(path.read_text("utf-8")) for path in sorted(TEMPLATE_FOLDER.glob("*.yaml")))
    return [
        {"kind": content["kind"], "description": content["description"], "input": content["example"]["input"]}
        for content in contents
    ]


def make_app(answer: Answer, config: GenerationConfig, name: str, hosts: Sequence[str] = LOOPBACK) -> ASGIApp:
    """The web application that serves the page and answers its requests.

    ``POST /answer`` takes ``{"turns": [[question, answer], …], "question", "decoding"}`` and streams JSON lines:
    ``{"piece"}`` for the next characters, then ``{"done"}``, or ``{"error"}`` where generation failed. One answer is
    generated at a time, the others wait. Generation ends when the browser no longer listens.

    Args:
        answer: Streams the answer to a question; it is called with the settings of the sliders.
        config: Settings of generation: the sliders begin with these, and settings without a slider keep them.
        name: Name of the model, shown at the top of the page.
        hosts: Host names by which the page may be asked for. Others are refused: otherwise a foreign page whose host
            name is made to lead to this machine could speak to the model.
    """
    offered, generating = sliders(config), asyncio.Lock()

    async def settings(request: Request) -> Response:
        ranges = {name: slider._asdict() for name, slider in offered.items()}
        shown = name.encode(errors="replace").decode()  # a name of a folder need not be UTF-8
        return JSONResponse({"model": shown, "sliders": ranges, "examples": examples()})

    async def post_answer(request: Request) -> Response:
        turns, question, decoding = await read_question(request, offered)
        pieces = answer(turns, question, change_decoding(config, decoding))
        return _Stream(_lines(request, pieces, generating), media_type="application/x-ndjson")

    app = Starlette(
        routes=[
            Route("/settings", settings),
            Route("/answer", post_answer, methods=["POST"]),
            Mount("/", StaticFiles(directory=Path(__file__).with_name("page"), html=True)),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))],
    )
    return _with_headers(app)


def _with_headers(app: ASGIApp) -> ASGIApp:
    async def answered(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        await app(scope, receive, send_with_headers)

    return answered


def serve(answer: Answer, config: GenerationConfig, name: str, host: str = "127.0.0.1", port: int = 7860) -> None:
    """Serves the page until Ctrl-C.

    Args:
        answer: Streams the answer to a question; it is called with the settings of the sliders.
        config: Settings of generation: the sliders begin with these, and settings without a slider keep them.
        name: Name of the model, shown at the top of the page.
        host: Address to listen on. Where it is not a loopback address, whoever reaches this machine may use the model.
        port: Port to listen on; 0 takes any that is free.

    Raises:
        FireflyError: If nothing can listen at this address and port.
    """
    with _listen(host, port) as listening:
        address, port = listening.getsockname()[:2]
        shown = f"[{address}]" if ":" in address else address
        local = ipaddress.ip_address(address).is_loopback
        app = make_app(answer, config, name, [*LOOPBACK, shown] if local else ["*"])
        if not local:
            print(f"note: whoever reaches this machine on port {port} may use the model", file=sys.stderr)
        print(f"http://{shown}:{port} is the chat page; Ctrl-C ends it", file=sys.stderr, flush=True)
        # An answer that is under way when the server ends is cut off after a second.
        settings = uvicorn.Config(app, log_level="warning", lifespan="off", ws="none", timeout_graceful_shutdown=1)
        with contextlib.suppress(KeyboardInterrupt):
            uvicorn.Server(settings).run([listening])


def _listen(host: str, port: int) -> socket.socket:
    if not 0 <= port < 1 << 16:  # getaddrinfo would take the number modulo 65536
        raise FireflyError(f"--port {port}: no port has that number; choose one up to 65535")
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address, family=family)
    except OSError as error:
        raise FireflyError(
            f"--host {host} --port {port}: nothing can listen there ({reason(error)}); choose another"
        ) from error


async def _lines(request: Request, pieces: Iterator[str], generating: asyncio.Lock) -> AsyncIterator[str]:
    async with generating:
        try:
            if await request.is_disconnected():
                return
            async for piece in iterate_in_threadpool(pieces):
                if await request.is_disconnected():
                    return
                yield _line(piece=piece)
            yield _line(done=True)
        except Exception as error:
            traceback.print_exc()
            yield _line(error=reason(error))
        finally:
            await run_in_threadpool(pieces.close)  # type: ignore[attr-defined]  # closing the generator ends generation


def _line(**content: object) -> str:
    return json.dumps(content, ensure_ascii=False) + "\n"


class _Stream(StreamingResponse):
    """A response whose lines see for themselves that nobody listens any more, and are closed when the server ends.

    Whether Starlette sees it depends on the release of uvicorn. Starlette does not close the lines either, so that an
    answer would be generated on.
    """

    body_iterator: Any

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self.stream_response(send)
        finally:
            await self.body_iterator.aclose()
