"""The web application: OpenAI's routes, what the page needs, health and figures."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import HTTPException
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, ProcessCollector, generate_latest

from persona_vectors.data.errors import InputError
from persona_vectors.serving.asked import ChatAsked, TextAsked, read_request
from persona_vectors.serving.cards import model_card
from persona_vectors.serving.engine import Engine, Full
from persona_vectors.serving.figures import Figures
from persona_vectors.serving.guard import TooLong, fault
from persona_vectors.serving.plan import Plan, Served, make_plan
from persona_vectors.serving.replies import Event, Failed, Replies
from persona_vectors.serving.rows import End, Token

_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
_POLL = 0.5
"""Seconds between looks at whether a client that waits is still there."""


class _Gone(Exception):
    """The client has gone away."""


def make_app(served: Served, *, rows: int = 16, waiting: int = 64, framed: bool = False) -> FastAPI:
    """Return the application; its engine is started with it, and ends what it has begun when it is shut down.

    `framed`: whether a page elsewhere may hold this one in a frame; there has to be a key then, which it does not know.
    """
    engine = Engine(served.model, served.tokenizer, list(served.vectors.values()), rows=rows, waiting=waiting)
    figures = Figures(engine)
    registry = CollectorRegistry()
    registry.register(figures)
    ProcessCollector(registry=registry)  # memory, processor time and open files, where the system tells them

    @asynccontextmanager
    async def life(_app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(engine.close)

    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, lifespan=life)
    app.state.engine = engine
    _add_faults(app, figures)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await _answer(served, engine, figures, request, read_request(ChatAsked, await request.body()))

    @app.post("/v1/completions")
    async def complete(request: Request) -> Response:
        return await _answer(served, engine, figures, request, read_request(TextAsked, await request.body()))

    @app.get("/v1/models")
    async def models() -> Any:
        return {"object": "list", "data": [model_card(served)]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Any:
        if name != served.name:
            raise HTTPException(404, "there is no such model here: see /v1/models")
        return model_card(served)

    @app.get("/health")
    async def health() -> Any:
        return JSONResponse({"status": "ok" if engine.alive else "dead"}, 200 if engine.alive else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    headers = dict(_PAGE_HEADERS)
    if not framed:
        headers["Content-Security-Policy"] += "; frame-ancestors 'none'"
    page = files("persona_vectors").joinpath("data/shipped/serve.html").read_text("utf-8")

    @app.get("/")
    async def show() -> Response:
        return HTMLResponse(page, headers=headers)

    return app


def _add_faults(app: FastAPI, figures: Figures) -> None:
    """Have every error told in OpenAI's form, in one line, and nothing of the request written anywhere."""

    def told(status: int, message: str, **headers: str) -> Response:
        figures.count(status)
        kind = "invalid_request_error" if status < 429 else "server_error"
        return JSONResponse(fault(status, message, kind)[1], status, headers=headers)

    cases: dict[type[Exception], Callable[[Any], Response]] = {
        InputError: lambda error: told(400, str(error)),
        RecursionError: lambda _: told(400, "the body is nested too deeply"),
        TooLong: lambda _: told(413, "the body is too long"),
        Full: lambda _: told(429, "the queue is full: ask again later", **{"Retry-After": "2"}),
        Failed: lambda error: told(504 if "time limit" in str(error) else 500, str(error)),
        _Gone: lambda _: Response(status_code=499),
        HTTPException: lambda error: told(error.status_code, str(error.detail)),
    }
    for kind, tell in cases.items():

        async def handle(_request: Request, error: Exception, tell: Callable[[Any], Response] = tell) -> Response:
            return tell(error)

        app.add_exception_handler(kind, handle)


async def _answer(
    served: Served, engine: Engine, figures: Figures, request: Request, asked: ChatAsked | TextAsked
) -> Response:
    if engine.room < 1:  # before its prompt is put into tokens, which takes time from those that are answered
        raise Full
    loop, told = asyncio.get_running_loop(), asyncio.Queue[Event]()

    def put(number: int) -> Callable[[Token | End], object]:
        return lambda event: loop.call_soon_threadsafe(told.put_nowait, (number, event))

    plan = await asyncio.to_thread(make_plan, served, asked, put)
    engine.submit(plan.jobs)
    replies, events = Replies(served, asked, plan), _events(request, plan, told)
    if asked.stream:
        figures.count(200)
        return StreamingResponse(_stream(replies, events), media_type="text/event-stream", headers=_NO_CACHE)
    try:
        found = [event async for event in events]
    finally:
        plan.cancel()
    reply = replies.whole(found)
    figures.count(200)
    return JSONResponse(reply)


_NO_CACHE = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


async def _events(request: Request, plan: Plan, told: asyncio.Queue[Event]) -> AsyncIterator[Event]:
    """Yield what the answers tell until all have ended; raises _Gone where nobody listens any more."""
    left = len(plan.jobs)
    while left:
        try:
            event = await asyncio.wait_for(told.get(), _POLL)
        except asyncio.TimeoutError:
            if await request.is_disconnected():
                raise _Gone from None
            continue
        if not told.qsize() and await request.is_disconnected():
            raise _Gone
        left -= isinstance(event[1], End)
        yield event


async def _stream(replies: Replies, events: AsyncIterator[Event]) -> AsyncIterator[str]:
    """Write server-sent events: JSON, which holds no line break."""

    def line(content: Any) -> str:
        return f"data: {json.dumps(content)}\n\n"

    try:
        for chunk in replies.opening():
            yield line(chunk)
        async for event in events:
            yield line(replies.piece(event))
        for chunk in replies.closing():
            yield line(chunk)
        yield "data: [DONE]\n\n"
    except Failed as error:
        yield line(fault(500, str(error), "server_error")[1])
    except _Gone:
        return
    finally:  # also where the client has gone, and this is cancelled
        replies.plan.cancel()
