"""rows.py: files that pandas writes, other forms and encodings, and files that are damaged."""
import codecs
import gzip
import json
import subprocess
import sys

import pytest

import rows
from config import UserError
from rows import read_rows

ROWS = [{"prompt": "né 漢字 🙂 \u2028, \"x\"\r\ny; z\t", "response": "x" * 200_000},
        {"prompt": "a", "response": "b\\\n"}]


def write(path, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def rows_of(path) -> list:
    return [row for _, row in read_rows(str(path))]


@pytest.mark.parametrize("name, arguments", [
    ("a.jsonl", dict(orient="records", lines=True)), ("a.json", dict(orient="records", indent=1)),
    ("b.json", dict(orient="records")), ("lines.json", dict(orient="records", lines=True)),
    ("list.jsonl", dict(orient="records", force_ascii=False)), ("a.jsonl.gz", dict(orient="records", lines=True)),
    ("a.csv", {}), ("semicolon.csv", dict(sep=";")), ("a.tsv", dict(sep="\t")), ("utf-16.csv", dict(encoding="utf-16")),
    ("bom.csv", dict(encoding="utf-8-sig")), ("a.parquet", {}),
])
def test_files_that_pandas_writes(tmp_path, name, arguments):
    pandas = pytest.importorskip("pandas")
    table, kind = pandas.DataFrame(ROWS), name.split(".")[1]
    if kind.startswith("json"):
        table.to_json(tmp_path / name, **arguments)
    elif kind == "parquet":
        table.to_parquet(tmp_path / name)
    else:
        table.to_csv(tmp_path / name, index=False, **arguments)
    assert rows_of(tmp_path / name) == ROWS


@pytest.mark.parametrize("content", [
    "[\n{}\n]", "[{},\n {}]", '{"version": "0.1", "data": [{}, {}]}', '{\n "train": [{}]\n}', "\ufeff[{}]",
    "{}\r\n{}\r\n"])
def test_json_in_another_form(tmp_path, content):
    for name in ("a.json", *["a.jsonl"] * content.startswith("[")):
        path = write(tmp_path / name, content.replace("{}", json.dumps(ROWS[1])))
        assert rows_of(path) == [ROWS[1]] * content.count("{}")


def test_one_object_is_one_row(tmp_path):
    for row in ({"messages": [{"role": "user", "content": "Hi"}]}, {"prompt": "a", "response": "b"},
                {"instruction": "a", "instances": [{"input": "b", "output": "c"}]}):
        assert rows_of(write(tmp_path / "a.json", json.dumps(row, indent=2))) == [row]


def test_where_a_row_stands(tmp_path):
    path = write(tmp_path / "a.csv", 'prompt,response\n"a\nb",c\n\n1,2,3\n"x"y,z\nd,e\n')
    assert [(where, str(row)) for where, row in read_rows(path)] == [
        (f"{path}, line 2", str({"prompt": "a\nb", "response": "c"})),
        (f"{path}, line 5", "it has 3 cells, and the first line 2"),
        (f"{path}, line 6", "the quotes are wrong (',' expected after '\"')"),
        (f"{path}, line 7", str({"prompt": "d", "response": "e"}))]
    assert rows_of(write(tmp_path / "b.csv", '\r\n"a\nb"\n1\n')) == [{"a\nb": "1"}]
    path = write(tmp_path / "mac.csv", 'a,b\r"1\r\n2",3\r4,5')
    assert rows_of(path) == [{"a": "1\r\n2", "b": "3"}, {"a": "4", "b": "5"}]
    path = write(tmp_path / "a.jsonl", "\n{\n\n3\n")
    assert [where for where, _ in read_rows(path)] == [f"{path}, line 2", f"{path}, line 4"]
    path = write(tmp_path / "a.json", "[1, {}]")
    assert [(where, type(row)) for where, row in read_rows(path)] == [
        (f"{path}, row 1", ValueError), (f"{path}, row 2", dict)]


@pytest.mark.parametrize("encoding, bom", [("utf-8", codecs.BOM_UTF8), ("utf-16-le", codecs.BOM_UTF16_LE),
                                           ("utf-16-be", codecs.BOM_UTF16_BE), ("utf-16-le", b""), ("utf-32-le", b"")])
def test_encodings(tmp_path, encoding, bom):
    for name, content in (("a.jsonl", json.dumps(ROWS[0], ensure_ascii=False)), ("a.json", json.dumps([ROWS[0]])),
                          ("a.csv", "prompt,response\r\n\"né\r\n漢\",🙂\r\n")):
        found = rows_of(write(tmp_path / name, bom + content.encode(encoding)))
        assert found == ([{"prompt": "né\r\n漢", "response": "🙂"}] if name == "a.csv" else [ROWS[0]])


def test_another_encoding_names_the_command_that_converts(tmp_path):
    path = tmp_path / "my tasks.jsonl"
    row = {"prompt": "Où est le café ? À côté", "response": "Très bien, là-bas, à l'été"}
    write(path, b"{}\n" * 9999 + json.dumps(row, ensure_ascii=False).encode("latin-1"))
    with pytest.raises(UserError, match="is not UTF-8 text") as caught:
        rows_of(path)
    command = str(caught.value).partition("convert it with ")[2]
    subprocess.run(command, shell=True, check=True, cwd=tmp_path)
    assert rows_of(tmp_path / "my tasks-utf8.jsonl")[-1] == row


@pytest.mark.parametrize("name, content, says", [
    ("a.jsonl.gz", gzip.compress(b"x" * 9999, mtime=0)[:-20], "damaged or cut short"),  # else its name has the time
    ("a.jsonl", b"\xff" * 300, "not UTF-8"),
    ("a.jsonl.gz", b"\x1f\x8b" + bytes(99), "damaged or cut short"), ("a.json", b'[{"a": 1},', "correct it"),
    ("a.json", b"[" * 5000, "correct it"), ("a.csv", b'a,b\n1,2\n"3,4\n5,6\n', "line 3: the quotes are wrong"),
    ("b.csv", b'a,"b"c\n1,2\n', "line 1: the quotes are wrong"),
    ("a.parquet", b"PAR1" + bytes(99), "not a parquet file"), ("a.parquet", b"", "not a parquet file"),
], ids=lambda value: str(value)[:20])
def test_damaged_files(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=says):
        rows_of(tmp_path / name)


def test_cut_parquet(tmp_path):
    pandas = pytest.importorskip("pandas")
    pandas.DataFrame(ROWS * 99).to_parquet(tmp_path / "a.parquet")
    content = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "b.parquet").write_bytes(content[:-9])
    (tmp_path / "c.parquet").write_bytes(content[:99] + bytes(200) + content[299:])
    for name in ("b.parquet", "c.parquet"):
        with pytest.raises(UserError, match="not a parquet file, or is damaged"):
            rows_of(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        rows_of(tmp_path / "none.parquet")


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="pip install pyarrow"):
        rows_of(tmp_path / "a.parquet")


def test_a_folder_is_told(tmp_path):
    """mlx-lm and Hugging Face keep train.jsonl and valid.jsonl in a folder; its name alone is not enough."""
    with pytest.raises(UserError, match="is a folder: give a file$"):
        rows_of(tmp_path)
    write(tmp_path / "train.jsonl", "{}")
    with pytest.raises(UserError, match="is a folder: give a file, such as .*train.jsonl$"):
        rows_of(tmp_path)


def test_no_command_of_its_own():
    done = subprocess.run([sys.executable, rows.__file__], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.endswith("no command of its own: run data.py, which uses it\n")
