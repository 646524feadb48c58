"""A W&B server that knows just enough for a run to begin, and can be stopped at any moment."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Handler(BaseHTTPRequestHandler):
    """Answers GraphQL and takes whatever is uploaded."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *words: Any) -> None:
        """Say nothing."""

    def do_POST(self) -> None:
        """GraphQL, or rows of metrics."""
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.server.is_hanging:
            self.server.released.wait()
            self.close_connection = True
            return
        query = json.loads(content) if self.path == "/graphql" else {}
        self.server.seen.append(query.get("operationName", self.path))
        if self.path.endswith("/file_stream"):
            self.server.streamed.append(json.loads(content))
        self.answer({"data": self.data(query)})

    def do_PUT(self) -> None:
        """An upload."""
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.answer({})

    def data(self, query: dict[str, Any]) -> dict[str, Any]:
        """What the client needs to know to go on."""
        given = query.get("variables", {})
        if query.get("operationName") == "UpsertBucket":
            project = {"id": "p", "name": given["project"], "entity": {"id": "e", "name": "us"}}
            bucket = {"id": "b", "name": given["name"], "displayName": "x", "project": project}
            return {"upsertBucket": {"bucket": bucket, "inserted": True}}
        if query.get("operationName") == "CreateRunFiles":
            here = f"http://127.0.0.1:{self.server.server_port}/upload"
            files = [{"name": name, "uploadUrl": f"{here}/{name}"} for name in given["files"]]
            created = {"runID": given["run"], "uploadHeaders": [], "files": files}
            return {"createRunFiles": created}
        return {}

    def answer(self, content: dict[str, Any]) -> None:
        """Send JSON."""
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class WandbServer(ThreadingHTTPServer):
    """A context that serves on a free port of this machine.

    Attributes:
        seen: Operations and paths that were asked for.
        streamed: Bodies with rows of metrics.
        is_hanging: Take requests and answer none.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.seen: list[str] = []
        self.streamed: list[dict[str, Any]] = []
        self.is_hanging = False
        self.released = threading.Event()
        self._thread = threading.Thread(target=self.serve_forever, daemon=True)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing: clients of a stopped server are cut off."""

    @property
    def url(self) -> str:
        """For WANDB_BASE_URL."""
        return f"http://127.0.0.1:{self.server_port}"

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.released.set()
        if self._thread.is_alive():
            self.stop()

    def stop(self) -> None:
        """Close the port: from now on connections are refused."""
        self.shutdown()
        self._thread.join()
        self.server_close()
