"""The settings of a script are its own lower-case globals. --name=value on the command line changes one.

    data = "shakespeare"  # folder under data/
    n_layer = 6           # blocks
    settings = overrides(globals())

Errors: a script raises UserError for what the user can correct. It ends with that one line instead of a traceback.
"""

import atexit
import codecs
import contextlib
import difflib
import json
import math
import os
import re
import shlex
import signal
import sys
import textwrap
import tokenize
from collections.abc import Sequence

given: set[str] = set()  # the settings named on the command line


class UserError(ValueError):
    """An error that the user can correct. The message is one line: what is wrong, and what to do."""


def overrides(globals_dict: dict, *positional: str) -> dict:
    """Set a script's globals from its command line and return its settings, in the order of the source.

    The settings are the lower-case globals that hold a bool, int, float or str when this is called, and their values
    determine the types. Arguments without "--" set the `positional` names in turn. If a setting is given several times,
    the last value counts, so a line of a shell script can end in "$@"; a setting whose default is () collects them all
    as texts, and as the last positional one takes all arguments that are left. `given` holds the names that were set.
    In a script that is imported, not run, the defaults remain.
    UserError: an unknown name, or a value of the wrong type; then nothing is set.
    """
    settings = {
        name: value
        for name, value in globals_dict.items()
        if (type(value) in (bool, int, float, str) or type(value) is tuple and not value)
        and name == name.lower() and not name.startswith("_")
    }
    assert set(positional) <= set(settings), f"not settings: {set(positional) - set(settings)}"
    if globals_dict["__name__"] == "__main__":
        sys.excepthook = _excepthook
        if signal.getsignal(signal.SIGINT) is _stop:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        atexit.register(_flush)
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="any_text")
        if "--help" in sys.argv[1:] or "-h" in sys.argv[1:]:
            _help(globals_dict["__file__"], globals_dict["__doc__"], settings, positional)
            raise SystemExit
        changes = _parse(settings, positional, sys.argv[1:])  # raises before anything is set
        given.update(changes)
        settings.update(changes)
        globals_dict.update(settings)
    return settings


def _parse(settings: dict, positional: tuple, arguments: list[str]) -> dict:
    changes, free = {}, list(positional)
    for argument in arguments:
        if argument.startswith("--"):
            name, equals, text = argument[2:].partition("=")
            if name not in settings:
                raise UserError(f"unknown setting --{name}: {_nearest(name, settings)}")
            if not equals:
                raise UserError(f"--{name} has no value: write --{name}=VALUE")
        elif free:
            name, text = free[0], argument
            if type(settings[name]) is not tuple:  # a tuple takes all that follow
                free.pop(0)
        elif positional:
            raise UserError(f"one argument too many, {argument!r}: it takes {' and '.join(positional)}")
        else:
            raise UserError(f"unexpected argument {argument!r}: settings are written --name=value")
        if type(settings[name]) is tuple:
            changes[name] = (*changes.get(name, ()), text)
        else:
            changes[name] = _convert(name, text, type(settings[name]))
    return changes


def _convert(name: str, text: str, kind: type):
    try:
        value = {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
        if kind in (bool, str) or kind is int and abs(value) < 2**63 or kind is float and math.isfinite(value):
            return value
    except (ValueError, KeyError):
        pass
    wanted = {bool: "true or false", int: "a whole number of at most 64 bits", float: "a number that is finite"}[kind]
    raise UserError(f"--{name}={shlex.quote(text)}: it must be {wanted}")


def _nearest(name: str, settings: dict) -> str:
    found = difflib.get_close_matches(name.lower().replace("-", "_"), settings, n=1)
    return f"did you mean --{found[0]}=VALUE?" if found else "--help lists them all"


def nearest(name: str, names: Sequence[str]) -> str:
    """The end of an error message for a name that is not among these: the nearest one, else all of them."""
    found = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean {found[0]}?" if found else f"choose one of {', '.join(names)}"


def check_output(path: str, *inputs: str):
    """UserError if the file to write is one of the inputs, or a file in an input folder, under whatever name: relative
    paths, symbolic links and hard links are followed. An empty name is no input."""
    if not os.path.exists(path):
        return
    for given in filter(os.path.exists, inputs):
        inside = os.path.realpath(path).startswith(os.path.join(os.path.realpath(given), ""))
        names = [given, *(os.path.join(given, name) for name in (os.listdir(given) if os.path.isdir(given) else ()))]
        same = next((name for name in names if os.path.exists(name) and os.path.samefile(path, name)), None)
        if same or inside:
            raise UserError(f"{path} would overwrite the input {same or given}: give another name")


def check_replaced(path: str, script: str):
    """UserError if there is a file at this path that `script` has not made. An earlier result of the script may be
    replaced; this is printed. A result is a safetensors file whose header names the script."""
    if os.path.exists(path):
        maker = None
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError, RecursionError), open(path, "rb") as file:
            header = json.loads(file.read(min(int.from_bytes(file.read(8), "little"), 100_000_000)))  # format's limit
            maker = json.loads(header["__metadata__"]["tinygpt"])["script"]
        if maker != script:
            made = f"made by {maker}" if type(maker) is str else "and is no result of a script"
            raise UserError(f"{path} exists, {made}: give another name, or remove it")
        print(f"{path} is an earlier result of {script}, which is replaced")


def _help(path: str, doc: str | None, settings: dict, positional: tuple):
    arguments = [f"[{name} ...]" if settings[name] == () else f"[{name}]" for name in positional]
    usage = " ".join(["usage: python", os.path.basename(path), *arguments])
    print(f"{(doc or '').strip()}\n\n{usage} [--name=value ...]")
    texts = {name: str(value).lower() if type(value) is bool else str(value) for name, value in settings.items()}
    texts.update({name: "" for name, value in settings.items() if value == ()})
    shown = {name: f"  --{name}={shlex.quote(text)}" for name, text in texts.items()}
    column = 2 + max((len(left) for left in shown.values() if len(left) < 44), default=0)
    comments, last = _comments(path), None
    for name, left in shown.items():
        group, comment = comments.get(name, (last, ""))
        if group != last or last is None:
            print(f"\n{group or 'settings'}")
            last = group or ""
        if name in positional:
            comment = f"[argument {positional.index(name) + 1}] {comment}"
        line = f"{left.ljust(column - 2)}  {comment}"
        print(textwrap.fill(line, 120, subsequent_indent=" " * column, break_on_hyphens=False))


def _comments(path: str) -> dict[str, tuple[str, str]]:
    """The group (the one-word comment line above it) and the trailing comment of every global that the file sets."""
    found, group, name = {}, "", ""  # name: the first word of a statement that begins at the left margin
    with open(path, "rb") as file:
        for token in tokenize.tokenize(file.readline):  # searching for "#" would find it in strings too
            if token.type == tokenize.NEWLINE:
                name = ""
            elif token.type == tokenize.NAME and not name and token.start[1] == 0:
                name = "(again)" if token.string in found else token.string  # the first assignment has the comment
                found[name] = (group, "")
            elif token.type == tokenize.COMMENT:
                comment = token.string.strip("# ")
                if name:
                    found[name] = (found[name][0], re.sub(r"  # \w+$", "", comment))  # without a variant's tag
                elif not name and token.start[1] == 0 and len(comment.split()) == 1:
                    group = comment
    return found


def _excepthook(kind, error, trace):
    """Print one line for an error that the user can correct, a traceback for a bug."""
    script = os.path.basename(sys.argv[0])
    if issubclass(kind, KeyboardInterrupt):
        line, status = "stopped", 130
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # while Python ends, another Ctrl-C would print a traceback
    elif issubclass(kind, BrokenPipeError):  # the process that reads our output has ended, as in `| head`
        line, status = "", 141
    elif issubclass(kind, UserError):
        line, status = f"{script}: {error}", 2
    elif kind is RuntimeError and "Could not load C++ shared library" in str(error):  # Ctrl-C ended MLX's compiler, too
        line, status = "stopped while MLX compiled a kernel: start again", 130
    elif kind is RuntimeError and "Failed to compile function" in str(error):
        line, status = f"{script}: MLX cannot compile a kernel: is the disk full? ({str(error).splitlines()[-1]})", 2
    elif issubclass(kind, MemoryError):
        line, status = f"{script}: there is not enough memory: {str(error) or 'make something smaller'}", 2
    elif issubclass(kind, OSError):
        line = ": ".join(str(part) for part in (script, error.strerror or error, error.filename) if part is not None)
        status = 2
    else:
        return sys.__excepthook__(kind, error, trace)
    if line:
        print(" ".join(line.split()), file=sys.stderr)
    raise SystemExit(status)  # raised in this hook it sets the exit status


def _stop(*_):
    """End at once, on Ctrl-C while a script is importing. Then it has nothing to save, and a KeyboardInterrupt in the
    middle of an import would leave a traceback, or get lost in an extension."""
    os.write(2, b"stopped\n")
    os._exit(130)


def _stop_early():
    """Let _stop() handle Ctrl-C until overrides() is called, if the script that runs is one of this collection."""
    ours, main = os.path.dirname(os.path.abspath(__file__)), getattr(sys.modules["__main__"], "__file__", None)
    ours = main and os.path.dirname(os.path.abspath(main)) in (ours, os.path.join(ours, "runs"))
    if ours and signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where a shell ignores Ctrl-C
        signal.signal(signal.SIGINT, _stop)


def _any_text(error: UnicodeError) -> tuple[str | bytes, int]:
    """For output, what the encoding lacks: a byte of a file's name that is no text is written as it is, any other
    character as its Python escape."""
    letter = error.object[error.start]
    if "\udc80" <= letter <= "\udcff":  # what Python makes of such a byte
        return bytes([ord(letter) - 0xDC00]), error.start + 1
    return letter.encode("ascii", "backslashreplace"), error.start + 1


def _flush():
    """Flush the output before Python does, as Python prints a traceback where the process that reads it has ended, or
    the disk that it goes to is full."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        print(f"{os.path.basename(sys.argv[0])}: cannot write the output: {error.strerror}", file=sys.stderr)
        os._exit(2)


codecs.register_error("any_text", _any_text)
_stop_early()

if __name__ == "__main__":
    print("config.py has no command of its own: run train.py, which uses it", file=sys.stderr)
    sys.exit(2)
