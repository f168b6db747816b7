"""playground.py: what it lists, what it serves, what it refuses; ports; Ctrl-C."""
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.parse

import mlx.core as mx
import mlx.nn as nn
import pytest
from browser import ROOT, js, page, serve
from conftest import run

from lora import attach, save_adapter
from model import GPT, GPTConfig, save_arrays, save_checkpoint
from tokenizer import byte_tokenizer
from tuned_lens import save_lens

PAGE = ROOT / "webgpu"
STRANGE = "é 1%2F?#\\.safetensors"


def save(path, pack: bool = False) -> GPT:
    model = GPT(GPTConfig(block_size=8, vocab_size=64, n_layer=1, n_head=1, n_embd=32), seed=0)
    if pack:
        nn.quantize(model, 32, 4)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(str(path), model, {"tokenizer": byte_tokenizer().to_dict()})
    return model


@pytest.fixture(scope="module")
def listed(tmp_path_factory):
    """A server with checkpoints, and with files that it must not list."""
    top = tmp_path_factory.mktemp("top")
    folder = top / "folder"
    model = save(folder / "out" / "ckpt.safetensors")
    save(folder / STRANGE, pack=True)
    for number, name in enumerate((STRANGE, "out/ckpt.safetensors")):
        os.utime(folder / name, (1e9 + number, 1e9 + number))
    save(top / "secret.safetensors")
    save(folder / ".hidden" / "ckpt.safetensors")
    (folder / "link.safetensors").symlink_to(top / "secret.safetensors")
    (folder / "inside.safetensors").symlink_to(folder / "out" / "ckpt.safetensors")
    (folder / "folder.safetensors").mkdir()
    (folder / "up").symlink_to(top)
    os.mkfifo(folder / "pipe.safetensors")
    (folder / "notes.txt").write_text("private")
    (folder / "ckpt.safetensors.tmp123").write_bytes((folder / "out" / "ckpt.safetensors").read_bytes())
    whole = (folder / "out" / "ckpt.safetensors").read_bytes()
    bad = {"empty": b"", "cut": whole[:100], "garbage": b"\xff" * 1000, "list": b"\2" + b"\0" * 7 + b"[]"}
    for name, content in bad.items():
        (folder / f"{name}.safetensors").write_bytes(content)
    save_arrays(str(folder / "out" / "ckpt.optimizer-5.safetensors"), {"step": mx.array(5)}, {"version": 1, "step": 5})
    save_lens(str(folder / "ckpt.lenses.safetensors"), {"A": mx.zeros((1, 32)), "b": mx.zeros((1, 32))}, model, {})
    mx.save_safetensors(str(folder / "foreign.safetensors"), {"a": mx.zeros(3)}, {"format": "pt"})
    mx.save_safetensors(str(folder / "nothing.safetensors"), {"a": mx.zeros(3)})
    attach(model)
    save_adapter(str(folder / "adapter.safetensors"), model, {"config": {}})
    with serve(folder) as server:
        yield server


def ask(server, path: str, method: str = "GET", **headers) -> tuple[int, bytes, dict]:
    """(status, content, headers) of a path, sent unchanged: other clients would normalize it."""
    address = urllib.parse.urlsplit(server.url)
    connection = http.client.HTTPConnection("127.0.0.1", address.port, timeout=20)
    connection.putrequest(method, path, skip_host="Host" in headers)
    for name, value in headers.items():
        connection.putheader(name, value)
    connection.endheaders()
    answer = connection.getresponse()
    return answer.status, answer.read(), dict(answer.getheaders())


def test_it_lists_checkpoints_and_nothing_else(listed):
    status, content, headers = ask(listed, "/checkpoints.json")
    assert status == 200 and headers["Content-Type"] == "application/json" and headers["Cache-Control"] == "no-cache"
    found = json.loads(content)
    assert [facts["name"] for facts in found] == ["out/ckpt.safetensors", STRANGE]  # the newest first
    sizes = [os.path.getsize(listed.folder / facts["name"]) for facts in found]
    assert [facts["size"] for facts in found] == sizes and [facts["modified"] for facts in found] == [1e9 + 1, 1e9]
    n_parameters = 64 * 32 + 4 * 32 * 32 + 2 * 4 * 32 * 32 + 3 * 32 + 2 * 32
    assert found[0]["parameters"] == n_parameters and "parameters" not in found[1]
    for facts in found:
        status, content, headers = ask(listed, facts["path"])
        assert status == 200 and headers["Content-Type"] == "application/octet-stream"
        assert content == (listed.folder / facts["name"]).read_bytes()


def test_the_page_finds_them_by_name(chromium, listed):
    function = """async () => {
      const { readHeader } = await import("/safetensors.js");
      const found = await (await fetch("/checkpoints.json")).json();
      const sizes = [];
      for (const { name, path } of found) {
        for (const address of [path, "checkpoints/" + encodeURIComponent(name)]) {
          sizes.push((await readHeader(await (await fetch(address)).blob())).tensors.size);
        }
      }
      return sizes;
    }"""
    with page(chromium, listed) as opened:
        sizes = js(opened, function)
    assert len(sizes) == 4 and sizes[0] == sizes[1] > 5 and sizes[2] == sizes[3] > 5


def test_the_list_is_made_anew(listed):
    save(listed.folder / "new" / "x.safetensors")
    assert "new/x.safetensors" in [facts["name"] for facts in json.loads(ask(listed, "/checkpoints.json")[1])]
    before = ask(listed, "/checkpoints/new/x.safetensors")[1]
    save(listed.folder / "new" / "x.safetensors", pack=True)
    after = ask(listed, "/checkpoints/new/x.safetensors")[1]
    assert before != after == (listed.folder / "new" / "x.safetensors").read_bytes()
    (listed.folder / "new" / "x.safetensors").unlink()
    assert ask(listed, "/checkpoints/new/x.safetensors")[0] == 404
    assert "new/x.safetensors" not in [facts["name"] for facts in json.loads(ask(listed, "/checkpoints.json")[1])]


def test_it_serves_the_page(listed):
    kinds = {".js": "text/javascript; charset=utf-8", ".wgsl": "text/plain; charset=utf-8",
             ".css": "text/css; charset=utf-8", ".html": "text/html; charset=utf-8",
             ".svg": "image/svg+xml", ".json": "application/json", ".safetensors": "application/octet-stream"}
    files = [path for path in PAGE.rglob("*") if path.is_file()]
    assert len(files) >= 3
    for path in files:
        status, content, headers = ask(listed, "/" + path.relative_to(PAGE).as_posix() + "?v=1#x")
        assert (status, content) == (200, path.read_bytes()) and headers["Content-Type"] == kinds[path.suffix]
        assert headers["Cache-Control"] == "no-cache"
    if (PAGE / "index.html").exists():
        assert ask(listed, "/")[1] == (PAGE / "index.html").read_bytes()


@pytest.mark.parametrize("path", [
    "/model.py", "/../model.py", "/%2e%2e/model.py", "/..%2fmodel.py", "/%2e%2e%2fmodel.py", "/kernels/../../model.py",
    "//etc/passwd", "/%2fetc%2fpasswd", "/etc/passwd", "/..", "/.", "/kernels", "/kernels/", "/..\\model.py", "*",
    "/../tests/fixtures/awq.safetensors", "/%2e%2e/tests/fixtures/awq.safetensors",
    "/..%2ftests/fixtures/awq.safetensors", "/tokenizer.js%00", "/%00", "/tokenizer",
    "/checkpoints", "/checkpoints/", "/checkpoints/out",
    "/checkpoints/notes.txt", "/checkpoints/../secret.safetensors", "/checkpoints/%2e%2e/secret.safetensors",
    "/checkpoints/..%2fsecret.safetensors", "/checkpoints/out/../../secret.safetensors",
    "/checkpoints/link.safetensors", "/checkpoints/inside.safetensors", "/checkpoints/up/secret.safetensors",
    "/checkpoints/up/folder/out/ckpt.safetensors", "/checkpoints/.hidden/ckpt.safetensors",
    "/checkpoints/adapter.safetensors", "/checkpoints/foreign.safetensors", "/checkpoints/ckpt.lenses.safetensors",
    "/checkpoints/out/ckpt.optimizer-5.safetensors", "/checkpoints/cut.safetensors", "/checkpoints/pipe.safetensors",
    "/checkpoints/folder.safetensors", "/checkpoints/./out/ckpt.safetensors", "/checkpoints//out/ckpt.safetensors",
    "/checkpoints/out/ckpt.safetensors%00", "/checkpoints/%ff.safetensors"])
def test_it_serves_nothing_else(listed, path):
    status, content, _ = ask(listed, path)
    assert status == 404 and b"GPT" not in content and b"tinygpt" not in content


def test_absolute_names_are_none(listed):
    secret = listed.folder.parent / "secret.safetensors"
    assert ask(listed, f"/checkpoints/{secret}")[0] == ask(listed, f"/checkpoints/%2f{secret}")[0] == 404
    assert ask(listed, f"/{secret}")[0] == ask(listed, f"/%2f{secret}")[0] == 404


def test_other_methods_and_other_hosts(listed):
    for method in ("POST", "PUT", "DELETE", "OPTIONS"):
        assert ask(listed, "/checkpoints.json", method)[0] == 501
    port = urllib.parse.urlsplit(listed.url).port
    for host in ("localhost", f"localhost:{port}", f"127.0.0.1:{port}"):
        assert ask(listed, "/checkpoints.json", Host=host)[0] == 200, host
    for host in ("evil.example", f"evil.example:{port}", f"localhost.evil.example:{port}", ""):
        assert ask(listed, "/checkpoints.json", Host=host)[0] == 403, host


def test_only_this_machine_reaches_it(listed):
    port = urllib.parse.urlsplit(listed.url).port
    if sys.platform == "linux":  # all of 127.* is this machine: a server that listens on all addresses would answer
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", port), timeout=5)
    with socket.create_connection(("127.0.0.1", port), timeout=5):
        pass


def start(*arguments) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "playground.py"), *map(str, arguments), "--open=False"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_no_checkpoints_a_taken_port_and_ctrl_c(tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = other.getsockname()[1]
        process = start(tmp_path, f"--port={taken}")
        lines = [process.stdout.readline() for _ in range(3)]
        assert lines[0].startswith(f"port {taken} is taken: here is ") and lines[1].startswith("0 checkpoints under ")
        url = lines[2].split()[0]
        port = urllib.parse.urlsplit(url).port
        assert taken < port <= taken + 99 and str(port) in lines[0]
        with socket.create_connection(("127.0.0.1", port)) as idle:  # the server ends in spite of an open connection
            connection = http.client.HTTPConnection("localhost", port, timeout=20)
            connection.request("GET", "/checkpoints.json")
            assert connection.getresponse().read() == b"[]"
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=20)
            assert (process.returncode, out.strip(), err) == (0, "", "")
            idle.close()


def test_a_browser_that_leaves_is_no_error(tmp_path):
    save(tmp_path / "x.safetensors")
    with open(tmp_path / "x.safetensors", "ab") as file:
        file.truncate(200_000_000)
    process = start(tmp_path, "--port=0")
    process.stdout.readline()
    port = urllib.parse.urlsplit(process.stdout.readline().split()[0]).port
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(b"GET /checkpoints/x.safetensors HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 200")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # leave at once
    connection = http.client.HTTPConnection("localhost", port, timeout=20)
    connection.request("GET", "/checkpoints.json")
    assert len(json.loads(connection.getresponse().read())) == 1
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=20)[1] == "" and process.returncode == 0


def test_bad_settings(tmp_path):
    (tmp_path / "file").write_text("")
    assert "is not a folder" in run("playground.py", tmp_path / "missing", status=2).stderr
    assert "is not a folder" in run("playground.py", tmp_path / "file", status=2).stderr
    assert "port=65536" in run("playground.py", tmp_path, "--port=65536", status=2).stderr
    assert "playground.py [folder]" in run("playground.py", "--help").stdout
