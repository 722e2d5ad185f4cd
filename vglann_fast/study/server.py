"""Serves the page of a study on this machine, takes its answers, and nothing else.

    GET /                    the page
    GET /videos/ID           one video, as MP4
    GET /answers/RATER       {trial: chosen video} of that rater, to continue after a reload
    POST /answers            {"rater", "trial", "chosen", "side"}; 204, or 400 with what is wrong in plain text

It listens on 127.0.0.1 alone and answers only requests to that name or localhost, so that a page of another site
that lets its name lead here gets nothing. The body must be JSON, which other sites' forms cannot send.
"""

import json
import socket
from pathlib import Path
from typing import TYPE_CHECKING

from vglann_fast.errors import VglannError
from vglann_fast.study.database import Answer, Study
from vglann_fast.study.page import policy, study_page

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

HOST = "127.0.0.1"
MAX_BYTES = 1024  # of an answer


def serve(folder: str | Path, port: int) -> None:
    """Serve the study in `folder` until interrupted; prints the page's address once it listens.

    port: 0 takes any that is free. Raises `VglannError` when it is taken, the study is damaged, or a needed
    package is missing.
    """
    try:
        import uvicorn
    except ImportError as error:
        raise VglannError("serving a study needs uvicorn: pip install 'vglann-fast[study]'") from error
    study = Study.open(folder)
    try:
        app = make_app(study)
        with listening(port) as server:
            print(f"http://{HOST}:{server.getsockname()[1]}/ (Ctrl-C ends it; answers are kept)", flush=True)
            uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False)).run([server])
    finally:
        study.close()


def listening(port: int) -> socket.socket:
    """A socket that listens on this machine alone. Raises `VglannError` when the port is taken or is none."""
    try:
        return socket.create_server((HOST, port))
    except (OSError, OverflowError) as error:
        raise VglannError(f"--port {port}: cannot be used ({error}); 0 takes any that is free") from error


def make_app(study: Study) -> "Starlette":
    """The application, for any ASGI server. Raises `VglannError` when Starlette or jinja2 is missing."""
    try:
        from starlette.applications import Starlette
        from starlette.middleware import Middleware
        from starlette.middleware.trustedhost import TrustedHostMiddleware
        from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
        from starlette.routing import Route
    except ImportError as error:
        raise VglannError("serving a study needs Starlette: pip install 'vglann-fast[study]'") from error
    page = study_page(study, static=False)
    headers = {
        "Content-Security-Policy": f"{policy(page)}; frame-ancestors 'none'",
        "Cross-Origin-Resource-Policy": "same-origin",
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-store",
    }

    async def index(request: "Request") -> Response:
        return HTMLResponse(page)

    async def video(request: "Request") -> Response:
        mp4 = study.video(request.path_params["id"])
        if mp4 is None:
            return PlainTextResponse("no such video", 404)
        return Response(mp4, media_type="video/mp4")

    async def answered(request: "Request") -> Response:
        return JSONResponse(study.answers_of(request.path_params["rater"]))

    async def answer(request: "Request") -> Response:
        if request.headers.get("content-type") != "application/json":
            return PlainTextResponse("expected application/json", 415)
        body = b""
        async for chunk in request.stream():
            body += chunk
            if len(body) > MAX_BYTES:
                return PlainTextResponse(f"an answer has at most {MAX_BYTES} bytes", 413)
        try:
            study.add(*_parse(body))
        except ValueError as error:
            return PlainTextResponse(str(error), 400)
        return Response(status_code=204)

    async def broken(request: "Request", error: Exception) -> Response:
        return PlainTextResponse(str(error), 503)  # the disk, as a rule: the rater can try again

    routes = [
        Route("/", index),
        Route("/videos/{id}", video),
        Route("/answers/{rater}", answered),
        Route("/answers", answer, methods=["POST"]),
    ]
    middleware = [
        Middleware(_WithHeaders, headers),
        Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"]),
    ]
    return Starlette(routes=routes, middleware=middleware, exception_handlers={VglannError: broken})


class _WithHeaders:
    """ASGI middleware: the same headers on every response, errors too."""

    def __init__(self, app: "ASGIApp", headers: dict[str, str]) -> None:
        self._app = app
        self._headers = [(name.lower().encode(), value.encode()) for name, value in headers.items()]

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        async def send_with_headers(message: "Message") -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *self._headers]
            await send(message)

        await self._app(scope, receive, send_with_headers)


def _parse(body: bytes) -> tuple[str, list[Answer]]:
    """The rater and the answer of a request. Raises ValueError."""
    try:
        value = json.loads(body)
    except RecursionError:
        value = None
    names = {"rater", "trial", "chosen", "side"}
    if not isinstance(value, dict) or value.keys() != names:
        raise ValueError(f"expected an object with {', '.join(sorted(names))}")
    if not all(isinstance(item, str) for item in value.values()):
        raise ValueError("expected texts only")
    return value["rater"], [Answer(value["trial"], value["chosen"], value["side"])]
