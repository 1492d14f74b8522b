"""The rating page over HTTP, for a browser on this machine alone.

Three things keep others out: it listens on 127.0.0.1; a request whose Host is another name (a web site that lets its
name point here) or whose Origin is another page is refused; and every request for a text needs the token, which the
page has from the fragment of its URL, a part that browsers send to nobody, and gives in a header, not in a cookie,
which the browser would send to other ports of this machine too.
"""

import json
import secrets
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvicorn  # pyright: ignore[reportMissingImports], an optional extra, as the next ones
from starlette.applications import Starlette  # pyright: ignore[reportMissingImports]
from starlette.requests import Request  # pyright: ignore[reportMissingImports]
from starlette.responses import JSONResponse, Response  # pyright: ignore[reportMissingImports]
from starlette.routing import Route  # pyright: ignore[reportMissingImports]

from ppo_jax.errors import UserError
from ppo_jax.review.session import Refused, Session

ADDRESS = "127.0.0.1"
NAMES = ("127.0.0.1", "localhost")  # of this machine; the port may be another one behind `ssh -L`
TOKEN_HEADER = "x-review-token"
LARGEST_BODY = 10_000
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-store",
}
FILES = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}


def make_app(session: Session, token: str) -> Any:
    """The ASGI application: three files, and three calls that take and give JSON."""
    routes = [Route(path, _file(*file), methods=["GET"]) for path, file in FILES.items()]
    calls: dict[str, Callable[[dict[str, Any]], None]] = {
        "view": lambda asked: None,
        "rate": lambda asked: session.rate(asked["rater"], asked["pair"], asked["choice"]),
        "undo": lambda asked: session.undo(asked["rater"]),
    }
    routes += [Route(f"/api/{name}", _call(act, session, token), methods=["POST"]) for name, act in calls.items()]
    return _Guarded(Starlette(routes=routes))


def _file(name: str, media_type: str) -> Callable[[Request], Response]:
    content = (Path(__file__).parent / name).read_bytes()
    return lambda request: Response(content, media_type=media_type)


def _call(act: Callable[[dict[str, Any]], None], session: Session, token: str):
    """Do something for a rater, then answer with what the rater sees next."""

    async def endpoint(request: Request) -> Response:
        given = request.headers.get(TOKEN_HEADER, "")
        if not secrets.compare_digest(given.encode(), token.encode()):
            return _refusal(403, "the token is not that of this server: open the URL that it printed")
        try:
            asked = _body(await request.body())
            act(asked)
            return JSONResponse(session.view(asked["rater"]))
        except Refused as refused:
            return _refusal(409, str(refused))
        except (ValueError, KeyError):
            return _refusal(400, "the request is not what the page sends")
        except OSError as error:
            return _refusal(507, f"the rating could not be stored: {error.strerror or error}")

    return endpoint


def _body(content: bytes) -> dict[str, Any]:
    asked = json.loads(content) if len(content) <= LARGEST_BODY else None
    if not isinstance(asked, dict) or not all(isinstance(value, str) for value in asked.values()):
        raise ValueError("no object of texts")
    return asked


def _refusal(status: int, message: str) -> Response:
    return JSONResponse({"error": message}, status_code=status)


class _Guarded:
    """An application that answers only its own page under its own names, and sends `HEADERS` with everything."""

    def __init__(self, app: Any):
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                added = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message = message | {"headers": [*message["headers"], *added]}
            await send(message)

        is_foreign = scope["type"] == "http" and not _is_own(scope)
        answer = _refusal(403, "not from here") if is_foreign else self._app
        await answer(scope, receive, send_with_headers)


def _is_own(scope: Any) -> bool:
    headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]]
    hosts = [value for name, value in headers if name == "host"]
    origins = [value for name, value in headers if name == "origin"]
    return (
        len(hosts) == 1
        and hosts[0].partition(":")[0] in NAMES
        and all(origin == f"http://{hosts[0]}" for origin in origins)
    )


def listen(port: int) -> socket.socket:
    """A socket on the loopback, on a free port where `port` is 0."""
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((ADDRESS, port))
    except OSError as error:
        listening.close()
        raise UserError(
            f"--port: {port} on {ADDRESS} cannot be used: {error.strerror}; leave it out for a free one"
        ) from error
    return listening


def serve(session: Session, listening: socket.socket) -> None:
    """Serve until Ctrl-C or SIGTERM; the URL is printed once requests are taken."""
    token = secrets.token_urlsafe(24)
    config = uvicorn.Config(
        make_app(session, token), log_level="warning", lifespan="off", ws="none", http="h11", server_header=False
    )
    listening.listen()
    print(
        f"Rate at http://{ADDRESS}:{listening.getsockname()[1]}/#{token}\nCtrl-C ends it; nothing is lost.", flush=True
    )
    uvicorn.Server(config).run(sockets=[listening])
