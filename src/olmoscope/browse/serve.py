"""`olmoscope browse`: serve the page to this machine's browser until Ctrl-C."""

import contextlib
import socket
import threading
import webbrowser
from pathlib import Path

from olmoscope.errors import UserError

HOST = "127.0.0.1"
PREFERRED_PORT = 8100
"""The default port, so that links stay valid from one session to the next."""


def serve(folder: Path, model: str | None, port: int | None, open_browser: bool) -> None:
    """Open all indexes of a folder and serve them until interrupted.

    Args:
        model: the model to use in place of those that the indexes name.
        port: 0 takes any free port; None takes the default port if it is free, else any free one.

    Raises:
        UserError: there is no index, one is damaged, or the port is taken.
    """
    import uvicorn

    from olmoscope.browse.app import build_app
    from olmoscope.browse.collection import open_collection

    collection = open_collection(folder, model)
    with _listen(port) as listener:
        address = f"http://{HOST}:{listener.getsockname()[1]}/"
        print(f"{len(collection)} SAE{'s' if len(collection) > 1 else ''} at {address}  (Ctrl-C ends)", flush=True)
        if open_browser:
            threading.Timer(0.3, webbrowser.open, [address]).start()
        config = uvicorn.Config(build_app(collection, listener.getsockname()[1]), log_level="warning", ws="none",
                                lifespan="off", access_log=False, timeout_graceful_shutdown=2, server_header=False)
        with contextlib.suppress(KeyboardInterrupt):  # uvicorn shuts down in order, then raises this again
            uvicorn.Server(config).run(sockets=[listener])


def require_extra() -> None:
    """Raises UserError: a package that the page needs is not installed."""
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError(f"the page needs {error.name}, which is not installed: pip install 'olmoscope[browse]'"
                        ) from error


def _listen(port: int | None) -> socket.socket:
    """A socket on loopback."""
    for wanted in ([PREFERRED_PORT, 0] if port is None else [port]):
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((HOST, wanted))
        except OSError as error:
            listener.close()
            if port is not None:
                raise UserError(f"port {port} cannot be used ({error.strerror}); choose another with --port, or leave "
                                "it out") from error
            continue
        listener.listen(128)
        return listener
    raise AssertionError("no free port on loopback")
