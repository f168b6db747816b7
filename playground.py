"""The playground: a page in the browser that loads, trains and takes apart a GPT, served with your checkpoints.

    python playground.py
    3 checkpoints under .
    http://localhost:8000 (Ctrl-C ends it)

    python playground.py out --port=9000 --open=False

The page lists every checkpoint under the folder, newest first, but no links, and nothing in folders whose names begin
with a dot. Only this machine can reach the server, and it serves nothing but the page (webgpu/) and these checkpoints.
Any other server of plain files can serve the page, without the list: python -m http.server -d webgpu

For programs: GET /checkpoints.json gives [{name, path, size, parameters, modified}]. `name` is the file's path under
the folder, `path` its address on this server, `size` in bytes, `modified` in seconds since 1970; `parameters` is
missing if the weights are quantized. GET /checkpoints/NAME gives the file.
"""
import errno
import functools
import json
import math
import os
import shutil
import sys
import threading
import webbrowser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from config import UserError, overrides

folder = "."  # the checkpoints in it and in its subfolders are listed
port = 8000   # of http://localhost; if it is taken, the next free one; 0: any
open = True   # open the page in the browser at once

settings = overrides(globals(), "folder")

PAGE = os.path.realpath(os.path.join(os.path.dirname(os.path.abspath(__file__)), "webgpu"))
TYPES = {".html": "text/html; charset=utf-8", ".css": "text/css; charset=utf-8", ".svg": "image/svg+xml",
         ".js": "text/javascript; charset=utf-8", ".wgsl": "text/plain; charset=utf-8", ".json": "application/json",
         ".safetensors": "application/octet-stream"}  # nothing else is part of the page
if not os.path.isdir(folder):
    raise UserError(f"{folder} is not a folder: give the one that your checkpoints are in")
if not 0 <= port < 65536:
    raise UserError(f"port={port}: it must be from 0 to 65535")

# ---- checkpoints -----------------------------------------------------------------------------------------------------


def checkpoints() -> dict[str, dict]:
    """The checkpoints that are under the folder at the moment, newest first: the facts of the list, by name."""
    found = []
    for place, folders, files in os.walk(folder):  # it follows no links to folders
        folders[:] = [name for name in folders if not name.startswith(".")
                      and os.path.realpath(os.path.join(place, name)) != PAGE]  # its own checkpoint is not listed
        for file in files:
            path = os.path.join(place, file)
            if file.endswith(".safetensors") and os.path.isfile(path) and not os.path.islink(path):
                try:
                    stat = os.stat(path)
                    facts = read_header(path, stat.st_size, stat.st_mtime_ns)
                except (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError):
                    continue  # it was just removed, cannot be read, or is not a safetensors file
                if facts is not None:
                    name = os.path.relpath(path, folder).replace(os.sep, "/")
                    found.append({"name": name, "path": "/checkpoints/" + quote(os.fsencode(name)), **facts,
                                  "size": stat.st_size, "modified": stat.st_mtime})
    return {facts["name"]: facts for facts in sorted(found, key=lambda facts: -facts["modified"])}


@functools.lru_cache(maxsize=10_000)  # each request asks for all of them
def read_header(path: str, size: int, modified: int) -> dict | None:
    """Facts for the list; None for what is not a checkpoint of this collection: an adapter, an optimizer's state, or a
    file of another project."""
    with Path(path).open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(size - 8, 100_000_000):  # the format's own limit
            return None
        header = json.loads(file.read(length))
    meta = json.loads(header.pop("__metadata__")["tinygpt"])
    if not isinstance(meta["config"], dict) or meta.get("adapter"):
        return None
    packed = any(tensor["dtype"] == "U32" for tensor in header.values())
    return {} if packed else {"parameters": sum(math.prod(tensor["shape"]) for tensor in header.values())}


# ---- server ----------------------------------------------------------------------------------------------------------


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # one connection for all files of the page

    def do_GET(self):
        # Another site can make its own name point to this machine, and its page then ask this server; but the request
        # still has that name.
        if self.headers.get("Host", "").rsplit(":", 1)[0] not in ("localhost", "127.0.0.1"):
            return self.send_error(403, "ask for localhost")
        name = unquote(urlsplit(self.path).path, errors="surrogateescape")
        if name == "/checkpoints.json":
            content = json.dumps([*checkpoints().values()]).encode()
            self.begin("application/json", len(content))
            self.wfile.write(content)
        elif name.startswith("/checkpoints/"):
            known = name.removeprefix("/checkpoints/") in checkpoints()
            self.send_file(os.path.join(folder, name.removeprefix("/checkpoints/")) if known else "")
        else:
            path = os.path.realpath(os.path.join(PAGE, name[1:] or "index.html")) if "\0" not in name else ""
            self.send_file(path if name[:1] == "/" and path.startswith(PAGE + os.sep) else "")

    def send_file(self, path: str):
        kind = TYPES.get(os.path.splitext(path)[1])
        try:
            file = Path(path if kind else "").open("rb")
        except OSError:
            return self.send_error(404)
        with file:
            self.begin(kind, os.fstat(file.fileno()).st_size)
            shutil.copyfileobj(file, self.wfile, 2**20)

    def begin(self, kind: str, size: int):
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(size))
        self.send_header("Cache-Control", "no-cache")  # a checkpoint is written again and again
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.end_headers()

    def log_message(self, *_):
        pass


class Server(ThreadingHTTPServer):
    def handle_error(self, *request):
        if not isinstance(sys.exc_info()[1], ConnectionError):  # a browser may close a connection early
            super().handle_error(*request)


def listen() -> Server:
    """The server, at `port` or the next free one. UserError if there is none."""
    for number in [0] if port == 0 else range(port, min(port + 100, 65536)):
        try:
            server = Server(("127.0.0.1", number), Handler)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise UserError(f"port {number} cannot be used ({error.strerror}): give another --port") from error
            continue
        if port and number != port:
            print(f"port {port} is taken: here is {number} (the page keeps its training runs by port)")
        return server
    raise UserError(f"the ports from {port} on are taken: give another --port")


server = listen()
url = f"http://localhost:{server.server_port}"
count = len(checkpoints())
print(f"{count} checkpoint{'' if count == 1 else 's'} under {folder}\n{url} (Ctrl-C ends it)", flush=True)
if open:
    threading.Thread(target=webbrowser.open, args=[url], daemon=True).start()  # a browser in the terminal would block
try:
    server.serve_forever()
except KeyboardInterrupt:
    print()
