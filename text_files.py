"""Text files: pieces of bounded size, byte order marks, and what to do about a file that is not UTF-8.

    for begins, text in read_text("book.txt", 2**22): ...
    text_files.advice("letters.txt")    # iconv -f CP1252 -t UTF-8 letters.txt > letters-utf8.txt
"""
import codecs
import os
import re
import shlex
import sys
from collections.abc import Iterator

from config import UserError

END = "<|endoftext|>"  # ends a document in a text file
BOMS = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF8: "utf-8-sig",
        codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}  # UTF-32's begins with UTF-16's

UNPACK = {b"\x1f\x8b": "gunzip -k", b"\x28\xb5\x2f\xfd": "unzstd", b"BZh": "bunzip2 -k", b"\xfd7zXZ": "unxz -k",
          b"%PDF-": "pdftotext"}  # by the first bytes of a file

# ---- pieces ----------------------------------------------------------------------------------------------------------


def read_text(path: str, size: int) -> Iterator[tuple[bool, str]]:
    """The pieces of a text file, each of at most about `size` bytes: (whether a document begins, text). <|endoftext|>
    ends a document and is left out. A document after it that has only blanks, such as a file's last newline, is left
    out, too. Raises NotText."""
    begins, first, held = True, True, ""
    for block in decoded(path, size):
        for i, text in enumerate(block.split(END)):
            if i:
                begins, first, held = True, False, ""
            text, held = held + text, ""
            if begins and not first and not text.strip():  # what follows it tells whether it is a document
                held = text
            elif text:
                yield begins, text
                begins = False


def decoded(path: str, size: int) -> Iterator[str]:
    """The text of a file in pieces that end at a boundary(), and not within an <|endoftext|>."""
    rest, position, last = "", 0, False
    with open(path, "rb") as file:
        start = file.peek()
        encoding = next((name for bom, name in BOMS.items() if start.startswith(bom)), "utf-8")
        decoder = codecs.getincrementaldecoder(encoding)()
        while not last:
            block = file.read(size)
            last = len(block) < size
            if encoding.startswith("utf-8") and b"\0" in block:
                raise NotText(path, encoding, position + block.find(0))
            position += len(block)
            try:
                text = rest + decoder.decode(block, final=last)
            except UnicodeDecodeError as error:  # error.object begins with bytes of the block before
                raise NotText(path, encoding, position - len(error.object) + error.start) from error
            end = len(text)
            if not last:
                end = boundary(text, end)
                end -= next((n for n in range(len(END) - 1, 0, -1) if text.endswith(END[:n], 0, end)), 0)
            yield text[:end]
            rest = text[end:]


def cut_up(text: str, size: int) -> Iterator[tuple[bool, str]]:
    """The pieces of a document: (whether it is the first one, text)."""
    start = 0
    while start < len(text):
        end = boundary(text, start + size, start) if len(text) > start + size else len(text)
        yield start == 0, text[start:end]
        start = end


def boundary(text: str, end: int, start: int = 0) -> int:
    """The position at or shortly before `end` at which to cut a text: before a single space, or after a single newline,
    that is followed by a letter or digit. The patterns of tiktoken and of tokenizer.py end a word there in any case, so
    that cutting does not change the tokens. Without such a position after `start` it is `end`, and a few tokens may
    change."""
    for i in range(end - 2, max(end - 2**16, start), -1):
        if text[i] in " \n" and text[i + 1].isalnum() and not text[i - 1].isspace():
            return i + (text[i] == "\n")
    return end


# ---- files in other encodings ----------------------------------------------------------------------------------------


class NotText(UserError):
    """A file is not text that can be read. `advice` is the command that converts it, "" for a binary file."""

    def __init__(self, path: str, encoding: str, offset: int):
        self.advice = advice(path, offset) if encoding == "utf-8" else ""
        name = encoding.removesuffix("-sig").upper()
        todo = f"convert it with {self.advice}" if self.advice else "leave it out"
        super().__init__(f"{path} is not {name} text (byte {offset}): {todo}")


def advice(path: str, offset: int = 0) -> str:
    """The command that makes text in UTF-8 of a file, by a guess from the bytes around an offset; "" for a binary file
    that is not compressed."""
    with open(path, "rb") as file:
        start = file.read(6)
        for magic, command in UNPACK.items():
            if start.startswith(magic):
                return f"{command} {shlex.quote(path)}"
        file.seek(max(0, offset - 2000))
        raw = file.read(6000)
    encoding = guess(raw)
    stem, ending = os.path.splitext(path)
    converted = shlex.quote(f"{stem}-utf8{ending}")
    return f"iconv -f {encoding} -t UTF-8 {shlex.quote(path)} > {converted}" if encoding else ""


# Letters beyond ASCII that are frequent in a language, the most frequent first, and the encodings it was written in.
WEST = "CP1252 CP850 MACINTOSH"
LETTERS = {
    "é’“”–—…£°©": "CP1252 MACINTOSH",                     # English
    "éàèêçâôîûùïëüœÉÀ’«»": WEST,                         # French
    "äüößÜÖÄ„“–": WEST,                                  # German
    "óíáéñúü¿¡ÁÉÓ": WEST,                                # Spanish
    "ãçáéõóíêâúàôÉÁ": WEST,                              # Portuguese
    "äåöøæéÅÖØÆ": WEST,                                  # Swedish, Danish, Norwegian, Finnish
    "àèéùòìÈ": WEST,                                     # Italian
    "íáéěřčžýšůúťňďóČŠŽŘ„“": "CP1250 ISO-8859-2",        # Czech, Slovak
    "łęąóżśćńźŻŁŚ„”": "CP1250 ISO-8859-2",               # Polish
    "éáöőóüíúűÉÁÖ„”": "CP1250 ISO-8859-2",               # Hungarian
    "ıişüğçöİŞÇÖÜâ": "CP1254",                           # Turkish
    "оеаинтсрвлкмдпуяыьгзбчйхжшюцщэфъё«»—": "CP1251 KOI8-R CP866",  # Russian
    "оаинтвреслкідумпзябьгйчхцжїюєшщфґ’": "CP1251",      # Ukrainian
    "αοιετσνηυρπκλμςόίέάήωγδθχφύώβξζψ": "CP1253 ISO-8859-7",
    "יוהלאתרבמשנכחדעקפגסטצזםןךףץ": "CP1255",
    "اليمونرتبةعدسفهكقحجشطصخضذثزغىأإئءآؤظ،": "CP1256",
    "のにはをたがでとしてれさいるなかもこりらまっンスルトリイアラクドレジシタロ、。": "CP932 EUC-JP",
    "이다는에의을가고하지한로기사도자리나시어를아스대인라일서그정해수보전부게국주세": "CP949",
    "的，。一是不了在人有我他这中大来上国个到说们为子和你地出道也时年得就那要下以生会": "GB18030",
    "的，。一是不了在人有我他這中大來上國個到說們為子和你地出道也時年得就那要下以生會": "BIG5",
}


def guess(raw: bytes) -> str | None:
    """The encoding, as iconv and Python name it, in which the bytes beyond ASCII look most like frequent letters of one
    language; None for binary data."""
    zeros = [raw[i::2].count(0) / max(1, len(raw) // 2) for i in (0, 1)]
    if max(zeros) > 0.5 and min(zeros) < 0.1 and len(raw) >= 8:
        return "UTF-16LE" if zeros[1] > zeros[0] else "UTF-16BE"
    if re.search(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f\x7f]", raw):
        return None
    text = raw.decode("utf-8", "replace")
    if 2 * text.count("\ufffd") < sum(letter > "\x7f" for letter in text):
        return "UTF-8 -c"  # mostly UTF-8: leave out the few characters that are broken
    best, found = 0.0, "ISO-8859-1"
    for letters, encodings in LETTERS.items():
        weight = {letter: 1 - i / 2 / len(letters) for i, letter in enumerate(letters)}
        for i, encoding in enumerate(encodings.split()):
            try:
                text = codecs.getincrementaldecoder(encoding)().decode(raw)
            except UnicodeDecodeError:
                continue
            runs = re.findall(r"[^\x00-\x7f]+", text)
            if letters[0] < "\u0180":  # Latin letters: those beyond ASCII rarely follow each other
                seen = [weight.get(run[0], -1) for run in runs]
            else:  # letters of other scripts rarely stand alone; of Chinese characters, most are not in the list
                seen = [weight.get(letter, 0.3 if "\u3040" < letter < "\ud7a4" else -1)
                        for run in runs if len(run) > 1 for letter in run]
            score = sum(seen) / max(1, sum(map(len, runs))) * (0.8 if i else 1)  # the first is more common
            if score > best:
                best, found = score, encoding
    return found


if __name__ == "__main__":
    print(f"{sys.argv[0]} has no command of its own: run data.py, which uses it", file=sys.stderr)
    sys.exit(2)
