"""text_files.py: documents in pieces of any size, byte order marks, and commands that convert other encodings."""

import shutil
import subprocess
import tracemalloc

import pytest

from config import UserError
from text_files import NotText, advice, boundary, cut_up, decoded, guess, read_text


def documents(path, size: int) -> list[str]:
    found = []
    for begins, text in read_text(str(path), size):
        assert text
        if begins:
            found.append("")
        found[-1] += text
    return found


CASES = {
    "one": ["one"],
    "a<|endoftext|>b": ["a", "b"],
    "a\n<|endoftext|>\nb\n": ["a\n", "\nb\n"],
    "<|endoftext|>a<|endoftext|>": ["a"],
    "a<|endoftext|><|endoftext|>b": ["a", "b"],
    "a\n<|endoftext|>\n": ["a\n"],
    "a<|endoftext|> \n\n <|endoftext|>b": ["a", "b"],
    "<|endoftext": ["<|endoftext"],
    "a <|endoftext|> b <|endoftext|": ["a ", " b <|endoftext|"],
    "<|<|endoftext|>>": ["<|", ">"],
    "\n": ["\n"],
    "": [],
    "<|endoftext|>\n": [],
    "one two\nthree" * 5 + "<|endoftext|>" + "日本語 é " * 9: ["one two\nthree" * 5, "日本語 é " * 9],
}


@pytest.mark.parametrize("text", CASES)
def test_documents_whatever_the_size_of_a_piece(tmp_path, text):
    (tmp_path / "a.txt").write_bytes(text.encode())
    for size in (*range(1, 40), 10**6):
        assert documents(tmp_path / "a.txt", size) == CASES[text], size


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32", "utf-16-be", "utf-32-be"])
def test_byte_order_marks(tmp_path, encoding):
    text = "größer als 日本 🙂\r\n" * 9
    mark = "" if encoding in ("utf-8-sig", "utf-16", "utf-32") else "\ufeff"
    (tmp_path / "a.txt").write_bytes((mark + text).encode(encoding))
    for size in (4, 7, 10, 10**6):
        assert "".join(decoded(str(tmp_path / "a.txt"), size)) == text
    (tmp_path / "a.txt").write_bytes((mark + text).encode(encoding) + b"\xff")
    with pytest.raises(UserError, match="is not UTF-(8|16|32) text"):
        list(decoded(str(tmp_path / "a.txt"), 10**6))


def test_memory_is_bounded(tmp_path):
    (tmp_path / "a.txt").write_text("word " * 2_000_000)
    tracemalloc.start()
    assert sum(len(text) for _, text in read_text(str(tmp_path / "a.txt"), 10**5)) == 10**7
    assert tracemalloc.get_traced_memory()[1] < 10**6
    tracemalloc.stop()


def test_boundary():
    assert boundary("aa bb cc", 7) == 5  # before " cc"
    assert boundary("aa\nbb\nc", 7) == 6  # after the newline
    assert boundary("aa  bb", 6) == 6  # two blanks may be one token
    for size in range(1, 9):
        parts = list(cut_up("aa bb cc", size))
        assert "".join(part for _, part in parts) == "aa bb cc" and [begins for begins, _ in parts].count(True) == 1
    assert list(cut_up("aa bb cc", 5)) == [(True, "aa"), (False, " bb"), (False, " cc")]


# ---- other encodings -------------------------------------------------------------------------------------------------

SENTENCES = {
    "cp1252": ["L'élève était déjà à l'école, où il garçon…", "Größe über alles, schöne Straße", "It’s “fine”", "a – b",
               "El niño comió mañana; ¿qué pasó?", "São Paulo não é então a solução", "Blåbærsyltetøy på Åland",
               "perché la città è così"],
    "cp850": ["L'élève était déjà à l'école, où"],
    "cp1250": ["Příliš žluťoučký kůň úpěl ďábelské ódy", "Zażółć gęślą jaźń", "árvíztűrő tükörfúrógép őrült"],
    "cp1251": ["Все счастливые семьи похожи друг на друга", "Київ столиця України і її річки"],
    "koi8-r": ["Все счастливые семьи похожи друг на друга"],
    "cp1253": ["Καλημέρα κόσμε, τι κάνεις σήμερα"],
    "cp1254": ["Işık çok güzel, şimdi ağaçlar yeşil"],
    "cp1255": ["בראשית ברא אלהים את השמים ואת הארץ והארץ היתה תהו ובהו"],
    "cp1256": ["مرحبا بالعالم كيف حالك اليوم"],
    "cp932": ["吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。"],
    "euc-jp": ["吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。"],
    "gb18030": ["幸福的家庭都是相似的，不幸的家庭各有各的不幸。"],
    "big5": ["幸福的家庭都是相似的，不幸的家庭各有各的不幸。這是我們的國家"],
    "cp949": ["행복한 가정은 모두 비슷하지만 불행한 가정은 저마다 이유가 다르다."],
    "utf-16-le": ["plain words without a mark"],
    "utf-16-be": ["plain words without a mark"],
}


@pytest.mark.parametrize("encoding", SENTENCES)
def test_the_command_converts_a_text(tmp_path, encoding):
    """Python's codecs wrote the files; iconv must give back the text."""
    for number, text in enumerate(SENTENCES[encoding]):
        assert text.encode(encoding).decode(guess(text.encode(encoding))) == text
        path = tmp_path / f"it's {number}.txt"
        path.write_bytes(text.encode(encoding))
        with pytest.raises(NotText) as error:
            list(decoded(str(path), 10**6))
        command = str(error.value).split(": convert it with ")[1]
        assert command == advice(str(path)) and command.startswith("iconv -f ")
        if shutil.which("iconv"):
            subprocess.run(command, shell=True, check=True)
            assert (tmp_path / f"it's {number}-utf8.txt").read_text(encoding="utf-8") == text


def test_a_byte_far_inside(tmp_path):
    """The guess is made from the text around the first byte that is not UTF-8."""
    text = "plain\n" * 10**6 + SENTENCES["cp932"][0]
    (tmp_path / "a.txt").write_bytes(text.encode("cp932"))
    with pytest.raises(NotText, match=r"\(byte 6000000\): convert it with iconv -f CP932 "):
        list(decoded(str(tmp_path / "a.txt"), 2**20))


def test_text_with_a_few_broken_characters_keeps_the_others(tmp_path):
    (tmp_path / "a.txt").write_bytes("Größe über alles ".encode() * 20 + b"\xff end")
    assert guess((tmp_path / "a.txt").read_bytes()) == "UTF-8 -c"
    if shutil.which("iconv"):
        subprocess.run(advice(str(tmp_path / "a.txt"), 400), shell=True, check=False)  # its status tells of the loss
        assert (tmp_path / "a-utf8.txt").read_text() == "Größe über alles " * 20 + " end"


@pytest.mark.parametrize("content, command", [
    (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", ""), (b"abc\0def", ""), (bytes(range(256)), ""), (b"\xff\xd8\xff\xe0\x01", ""),
    (b"\x1f\x8b\x08\0\0\0", "gunzip -k "), (b"%PDF-1.4\n%\xe2\xe3", "pdftotext "), (b"\x28\xb5\x2f\xfd\0", "unzstd "),
])
def test_binary_files(tmp_path, content, command):
    (tmp_path / "a b").write_bytes(content)
    with pytest.raises(NotText) as error:
        list(decoded(str(tmp_path / "a b"), 100))
    path = str(tmp_path / "a b")
    assert error.value.advice == (f"{command}'{path}'" if command else "")
    assert str(error.value).endswith("leave it out" if not command else f"convert it with {command}'{path}'")
