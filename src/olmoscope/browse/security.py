"""Who may send requests to the page's server: this machine's browser, under this machine's name, and no other site.

A page of another site could otherwise send requests to a server on loopback (cross-origin writes), or read from it
after pointing its own host name here (DNS rebinding). Source: the Fetch Metadata and Origin headers that browsers send.
"""

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

CONTENT_POLICY = ("default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
                  "base-uri 'none'; form-action 'none'; require-trusted-types-for 'script'; trusted-types 'none'")
"""Only files of this server run or load, and no text can become markup or script (trusted types)."""
HEADERS = {
    "content-security-policy": CONTENT_POLICY + "; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-cache",
}
LARGEST_BODY = 64 * 1024 * 1024
"""The most bytes of a request; the largest is an import of labels."""


class OnlyThisMachine:
    """Middleware: refuses requests to other names and writes from other origins; adds the headers to all answers."""

    def __init__(self, app: App, port: int) -> None:
        self.app = app
        self.hosts = {f"{name}:{port}" for name in ("127.0.0.1", "localhost", "[::1]")}
        if port == 80:
            self.hosts |= {"127.0.0.1", "localhost", "[::1]"}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        assert scope["type"] == "http", "no route is a web socket"

        async def send_guarded(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                given = {name for name, _ in message["headers"]}
                added = [(name.encode(), text.encode()) for name, text in HEADERS.items()]
                message["headers"] = [*message["headers"], *(pair for pair in added if pair[0] not in given)]
            await send(message)

        refusal = self._refusal(scope)
        if refusal is None:
            await self.app(scope, receive, send_guarded)
            return
        status, reason = refusal
        await send_guarded({"type": "http.response.start", "status": status,
                            "headers": [(b"content-type", b"text/plain; charset=utf-8")]})
        await send_guarded({"type": "http.response.body", "body": reason.encode()})

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        """Status and reason if the request is refused."""
        headers: dict[str, list[str]] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name.decode("latin-1"), []).append(value.decode("latin-1"))
        hosts = headers.get("host", [])
        if len(hosts) != 1 or hosts[0].lower() not in self.hosts:
            return 421, "this server answers only to its own name on this machine"
        length = headers.get("content-length", ["0"])[0]
        if not length.isdigit() or int(length) > LARGEST_BODY:
            return 413, "the request is too large"
        if scope["method"] in ("GET", "HEAD"):
            return None
        origins, sites = headers.get("origin", []), headers.get("sec-fetch-site", [])
        if (origins and origins != [f"http://{hosts[0].lower()}"]) or (sites and sites != ["same-origin"]):
            return 403, "only this server's own page may change anything"
        # A form of another site cannot send JSON without asking first (CORS), and this server never agrees.
        if headers.get("content-type", [""])[0].split(";")[0].strip() != "application/json":
            return 415, "send application/json"
        return None
