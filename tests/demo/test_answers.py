"""Answers of several models, over HTTP, as they came."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from loraplex.core.errors import Unavailable
from loraplex.demo.answers import answers, answers_table


class _Echo(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        known = body["model"] != "nosuch" and self.headers["authorization"] == "Bearer key"
        text = f"{body['model']} <{body['messages'][0]['content']}> {body['temperature']} {body['max_tokens']}"
        content = json.dumps({"choices": [{"message": {"content": text}}]} if known else {"error": "no such model"})
        self.send_response(200 if known else 404)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content.encode())

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Echo)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_row_for_each_prompt_and_a_column_for_each_model(url: str) -> None:
    assert answers(url, "key", ["base", "pirate"], ["a", "b"], max_tokens=7) == [
        ["base <a> 0 7", "pirate <a> 0 7"],
        ["base <b> 0 7", "pirate <b> 0 7"],
    ]
    table = answers_table(url, "key", ["base"], ["a"], max_tokens=7)
    assert "<th>base</th>" in table
    assert "<td>a</td><td>base &lt;a&gt; 0 7</td>" in table


def test_what_is_refused_is_said(url: str) -> None:
    with pytest.raises(Unavailable, match=r"nosuch: .*no such model.* \(HTTP 404\)"):
        answers(url, "key", ["nosuch"], ["a"], max_tokens=7)
    with pytest.raises(Unavailable, match="404"):
        answers(url, "other", ["base"], ["a"], max_tokens=7)
