"""The page's own files, from memory: browsers ask for some twenty small ones at once, without waiting for a disk or a
thread."""

import hashlib
from importlib import resources

from starlette.requests import Request
from starlette.responses import Response

TYPES = {".html": "text/html; charset=utf-8", ".js": "text/javascript; charset=utf-8",
         ".css": "text/css; charset=utf-8", ".svg": "image/svg+xml"}


class PageFiles:
    """Answers `/` and `/NAME`; tells a browser if the file that it has is current."""

    def __init__(self) -> None:
        self._files: dict[str, tuple[bytes, str, str]] = {}
        for file in (resources.files("olmoscope") / "browse" / "static").iterdir():
            content, suffix = file.read_bytes(), file.name[file.name.rindex("."):]
            self._files[file.name] = (content, TYPES[suffix], f'"{hashlib.sha256(content).hexdigest()[:32]}"')

    async def answer(self, request: Request) -> Response:
        """Its type, or 404."""
        found = self._files.get(request.path_params.get("name", "index.html"))
        if found is None:
            return Response("there is no such file", status_code=404, media_type="text/plain")
        content, kind, tag = found
        headers = {"etag": tag, "cache-control": "no-cache"}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(content, headers={**headers, "content-type": kind})
