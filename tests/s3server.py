"""A local S3 server that counts what it is asked: moto's, on the loopback."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import fsspec

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_EC2_METADATA_DISABLED": "true",
}


class Server:
    """The endpoint, and the requests so far as ``(method, path, query, range)``."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.requests: list[tuple[str, str, str, str]] = []

    @contextlib.contextmanager
    def asked(self) -> Iterator[list[tuple[str, str, str, str]]]:
        """Requests of a block of code."""
        before, found = len(self.requests), []
        yield found
        found += self.requests[before:]


@contextlib.contextmanager
def s3_server() -> Iterator[Server]:
    """Serve until left; the caller names the endpoint to fsspec."""
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    application = DomainDispatcherApplication(create_backend_app)
    found: list[Server] = []

    def counted(environ: dict[str, Any], start_response: Any) -> Any:
        found[0].requests.append(
            (
                environ["REQUEST_METHOD"],
                environ["PATH_INFO"],
                environ["QUERY_STRING"],
                environ.get("HTTP_RANGE", ""),
            )
        )
        return application(environ, start_response)

    server = make_server("127.0.0.1", 0, counted, threaded=True)
    found.append(Server(f"http://127.0.0.1:{server.server_port}"))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield found[0]
    finally:
        server.shutdown()
        thread.join()
        fsspec.get_filesystem_class("s3").clear_instance_cache()
