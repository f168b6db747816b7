"""What all tests share: the scripts run as a user runs them, on one thread, in folders of their own."""
import doctest
import os
import random
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import blas  # noqa: F401  (before mlx)
import browser
import prepared
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # two threads on a busy machine wait for each other
signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore Ctrl-C, and so do theirs


def pytest_addoption(parser):
    parser.addoption("--no-skips", action="store_true", help="a skipped test fails, unless docs/tests.md says why")


def unless_explained(report, config, reason: str):
    """With --no-skips, a skipped test or file fails, unless docs/tests.md has the reason."""
    if report.skipped and config.getoption("--no-skips") and reason not in (ROOT / "docs" / "tests.md").read_text():
        report.outcome, report.longrepr = "failed", f"skipped, and docs/tests.md does not say why: {reason}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    return unless_explained(report, item.config, str(getattr(call.excinfo and call.excinfo.value, "msg", "")))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    report = yield
    reason = report.longrepr[2].removeprefix("Skipped: ") if report.skipped else ""
    return unless_explained(report, collector.config, reason)


def launch(n: int, by_mlx: bool = False) -> list[str]:
    """What begins a command that n processes run together: launch.py, or mlx.launch where a test is about how it ends
    them. Each process of the tests takes ports of its own, or two tests at a time would mix theirs up."""
    port = str(10_000 + os.getpid() * 8 % 20_000)
    if by_mlx:
        return [os.path.join(os.path.dirname(sys.executable), "mlx.launch"), "-n", str(n), "-p", port, "--"]
    return [sys.executable, str(ROOT / "tests" / "launch.py"), str(n), port] if n > 1 else []


def run(script: str, *arguments, status: int = 0) -> subprocess.CompletedProcess:
    """A script from a command line. Where it fails, it tells why in one line."""
    done = prepared.run([sys.executable, ROOT / script, *arguments])
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr and (not status or done.stderr.count("\n") == 1), done.stderr
    return done


def pytest_collection_modifyitems(items: list):
    """The files with the longest tests come first, so that at the end no process waits for another one."""
    longest = "test_kills.py", "test_fuzz.py", "test_bench.py", "test_runs.py", "test_page_faults.py", "test_page.py"
    items.sort(key=lambda item: item.path.name not in longest)


@pytest.fixture(scope="session")
def chromium():
    """The browser of all tests; they are skipped where there is none."""
    with browser.chromium() as found:
        yield found


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """The playground, with a folder of checkpoints that tests may write to: server.url, server.folder."""
    with browser.serve(tmp_path_factory.mktemp("checkpoints")) as found:
        yield found


@pytest.fixture
def page(chromium, server):
    """An empty page of the server's. See browser.py."""
    with browser.page(chromium, server, first_text=20) as opened:
        yield opened


@pytest.fixture(scope="session")
def opened(chromium, server):
    """An empty page for tests that only call functions of the page's modules. Its device compiles each kernel once for
    all of them. A test that leaves the device or the page changed takes `page`."""
    with browser.page(chromium, server) as found:
        yield found


def load_adapter(model, path: str, weight: float = 1.0, header: dict | None = None) -> dict:
    """Put a saved adapter onto a model, whatever its base was; header: of its checkpoint. Returns the adapter's
    header."""
    from lora import add_adapter, read_adapter
    modules, meta = read_adapter(path, model, header or {})
    add_adapter(model, path, modules, meta, weight)
    return meta


def run_here(script: str, *arguments):
    """The same in this process, a second faster: its errors come out as they are."""
    import config
    argv, hook = sys.argv, sys.excepthook
    sys.argv = [script, *map(str, arguments)]
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    finally:
        sys.argv, sys.excepthook = argv, hook
        config.given.clear()


def docstring_use(script, folder: Path) -> dict:
    """The names that the lines after >>> in a script's docstring leave behind, run where out/ckpt.safetensors is this
    folder's."""
    names, here = {}, os.getcwd()
    (folder / "out").mkdir()
    (folder / "ckpt.safetensors").rename(folder / "out" / "ckpt.safetensors")
    os.chdir(folder)
    try:
        for example in doctest.DocTestParser().get_examples(script.__doc__):
            exec(example.source, names)
    finally:
        os.chdir(here)
    return names


class OneLayer(dict):
    """In place of a folder, for a reader: arrays by name."""
    names, prefix = property(dict.keys), "model."

    def file_of(self, name: str) -> str:
        return "a file"

    def place(self, module: str, part: str) -> str:
        return f"a file: {module}.{part}"


def peak_memory(script: str, *arguments) -> int:
    """The most memory that a script held at a time, in bytes, by Linux's count. (Not getrusage's: there a process
    begins with what its parent holds.)"""
    if not sys.platform.startswith("linux"):
        pytest.skip("the count is Linux's")
    code = ("import runpy, sys; sys.argv = sys.argv[1:]; sys.path.insert(0, sys.argv.pop(0)); "
            "runpy.run_path(sys.argv[0], run_name='__main__'); print(open('/proc/self/status').read())")
    command = [sys.executable, "-c", code, ROOT, ROOT / script, *arguments]
    told = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True).stdout
    return 1024 * next(int(line.split()[1]) for line in told.splitlines() if line.startswith("VmHWM"))


def flips_and_cuts(path: Path, number: int, header: int):
    """Spoil a file, so often, and put it right in the end: cut anywhere, or one bit of its header flipped, which is its
    first so many bytes (0: all, or those that safetensors says). Yields whether it is cut."""
    whole, rng = path.read_bytes(), random.Random(0)
    header = header or (8 + int.from_bytes(whole[:8], "little") if path.suffix == ".safetensors" else len(whole))
    for i in range(number):
        bad = bytearray(whole)
        if i % 4 == 0:
            del bad[rng.randrange(len(bad)):]
        else:
            bad[rng.randrange(header)] ^= 1 << rng.randrange(8)
        path.write_bytes(bad)
        yield i % 4 == 0
    path.write_bytes(whole)


# A number in a file of settings may be another number: nothing can tell.
NUMBERS = {"block_size", "norm_eps", "rope_theta", "rope_factor", "rope_low_freq", "rope_high_freq", "rope_original",
           "sliding_window"}


def survives(script: str, source: Path, path: Path, number: int, least: float, header: int = 0):
    """A reader's answer to a file of its source that is cut, or has a bit flipped: UserError, in one line that names a
    file, and nothing written; or the same model as before, never another, but for NUMBERS, where they stand in this
    file. UserError whenever it is cut, and in this share of all cases at least."""
    import mlx.core as mx

    from config import UserError
    from model import load_checkpoint
    out, idx, refused = path.parent.parent / "spoilt.out", mx.arange(40)[None], 0

    def read():
        out.unlink(missing_ok=True)
        run_here(script, source, out)
        model, meta = load_checkpoint(str(out))
        model.set_dtype(mx.float32)
        return meta["config"], model(idx)

    settings, logits = read()
    for cut in flips_and_cuts(path, number, header):
        try:
            found, other = read()
        except UserError as error:
            assert "\n" not in str(error) and str(source) in str(error) and not list(out.parent.glob("spoilt*")), error
            refused += 1
        else:
            changed = {name for name in settings if found[name] != settings[name]}
            assert not cut and (mx.array_equal(other, logits) or path.suffix != ".safetensors" and changed), changed
            assert changed <= NUMBERS, changed
    assert refused >= least * number
