"""What all tests share: the scripts run as a user runs them, on one thread, in folders of their own."""
import os
import signal
import subprocess
import sys
from pathlib import Path

import browser
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # two threads on a busy machine wait for each other
signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore Ctrl-C, and so do theirs


def run(script: str, *arguments, status: int = 0) -> subprocess.CompletedProcess:
    """A script from a command line. Where it fails, it tells why in one line."""
    done = subprocess.run([sys.executable, ROOT / script, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr and (not status or done.stderr.count("\n") == 1), done.stderr
    return done


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
    with browser.page(chromium, server) as opened:
        yield opened
