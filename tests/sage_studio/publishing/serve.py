"""A small HTTP server around an exported repository's `handler.py`, and how fast it answers.

    python tests/sage_studio/publishing/serve.py serve FOLDER                # prints its address
    python tests/sage_studio/publishing/serve.py measure FOLDER prompt.mid     # p50, p95 of 100 requests, 4 at once

The handler is loaded as Hugging Face's inference toolkit does it: from its file, the folder first on the path. Our own
packages cannot be imported by the server, so what answers is what the repository holds.
"""

import argparse
import base64
import http.client
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

STATUS = {"invalid_request": 400, "invalid_midi": 400, "too_large": 413, "busy": 503, "unavailable": 501}
MAX_BODY = 2_000_000  # base64 of the largest file, and the parameters


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256  # connections not yet accepted: more than ever come at once here


def load_handler(folder: str):
    """The `EndpointHandler` of a repository."""
    for name in ("sage_music", "perceivers", "sage_studio"):
        sys.modules[name] = None
    spec = importlib.util.spec_from_file_location("handler", Path(folder) / "handler.py")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, folder)
    sys.modules["handler"] = module
    spec.loader.exec_module(module)
    return module.EndpointHandler(folder)


def serve(folder: str, port: int = 0) -> None:
    """Answer requests on loopback until the process ends; the address is the first line on stdout."""
    handler = load_handler(folder)

    class Endpoint(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_POST(self):
            length = self.headers.get("Content-Length", "")
            if not length.isdecimal() or int(length) > MAX_BODY:
                self.close_connection = True  # what was not read would be taken for the next request
                if length.isdecimal():  # closed with bytes unread, a connection is reset, and the answer lost
                    self.rfile.read(min(int(length), 10 * MAX_BODY))
                return self.reply(413, {"error": {"type": "too_large", "message": f"{MAX_BODY:,} bytes at most."}})
            try:
                data = json.loads(self.rfile.read(int(length)))
            except (ValueError, RecursionError):
                return self.reply(400, {"error": {"type": "invalid_request", "message": "the body is not JSON."}})
            answer = handler(data)
            status = STATUS.get(answer["error"]["type"], 500) if "error" in answer else 200
            return self.reply(status, answer)

        def reply(self, status: int, answer: dict):
            body = json.dumps(answer, allow_nan=False).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = Server(("127.0.0.1", port), Endpoint)
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()


@contextmanager
def running(folder: str | os.PathLike, **environment: str):
    """`(host, port)` of a server in a process of its own, which ends with the block."""
    command = [sys.executable, __file__, "serve", os.fspath(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment})
    try:
        address = process.stdout.readline().strip()
        if not address:
            raise RuntimeError(f"the server of {folder} ended with {process.wait()}.")
        host, port = address.removeprefix("http://").split(":")
        yield host, int(port)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def post(address: tuple[str, int], body: bytes | str | dict, timeout: float = 120.0) -> tuple[int, dict]:
    """Status and answer of one request; a dict is sent as JSON."""
    connection = http.client.HTTPConnection(*address, timeout=timeout)
    try:
        body = json.dumps(body) if isinstance(body, dict) else body
        connection.request("POST", "/", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def request_for(midi: bytes, **parameters) -> dict:
    """The body of a request."""
    return {"inputs": base64.b64encode(midi).decode(), "parameters": parameters}


def measure(address, prompts: list[bytes], requests: int, concurrency: int, parameters: dict) -> dict:
    """Latency in seconds of `requests` requests of different seeds, `concurrency` of them under way at any time."""

    def one(index: int) -> tuple[float, int, dict]:
        begin = time.perf_counter()
        body = request_for(prompts[index % len(prompts)], seed=index, **parameters)
        status, answer = post(address, body)
        return time.perf_counter() - begin, status, answer

    one(0)  # what is made once at the first request is not every request's
    begin = time.perf_counter()
    with ThreadPoolExecutor(concurrency) as pool:
        results = list(pool.map(one, range(requests)))
    wall = time.perf_counter() - begin
    latencies = sorted(latency for latency, _, _ in results)

    def percentile(share: float) -> float:
        return latencies[min(int(share * len(latencies)), len(latencies) - 1)]

    return {
        "requests": requests,
        "concurrency": concurrency,
        "statuses": dict(Counter(status for _, status, _ in results)),
        "p50_s": round(percentile(0.5), 3),
        "p95_s": round(percentile(0.95), 3),
        "max_s": round(latencies[-1], 3),
        "requests_per_s": round(requests / wall, 2),
        "notes_per_s": round(sum(answer.get("new_notes", 0) for _, _, answer in results) / wall, 1),
    }


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    server = commands.add_parser("serve", help="answer requests on loopback")
    server.add_argument("folder")
    server.add_argument("--port", type=int, default=0)
    meter = commands.add_parser("measure", help="latency under load")
    meter.add_argument("folder")
    meter.add_argument("prompts", nargs="+", help="MIDI files, taken in turn")
    meter.add_argument("--requests", type=int, default=100)
    meter.add_argument("--concurrency", type=int, default=4)
    meter.add_argument("--parameters", type=json.loads, default={"prompt_bars": 4, "bars": 4}, help="as JSON")
    args = parser.parse_args(argv)
    if args.command == "serve":
        serve(args.folder, args.port)
        return 0
    prompts = [Path(prompt).read_bytes() for prompt in args.prompts]
    with running(args.folder) as address:
        print(json.dumps(measure(address, prompts, args.requests, args.concurrency, args.parameters)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
