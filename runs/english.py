"""The text of the page's second model: 37 children's books in the public domain, from Project Gutenberg.

    python runs/english.py                    # downloads what is not yet in out-english/books: 16 MB
    out-english/text: 37 books, 14,906,729 characters

The script writes one text a book, without Project Gutenberg's header and licence, without line breaks inside
paragraphs, and without marks of pictures and italics. The page's model was trained on the texts as the GITenberg
project keeps them (2026-11-27). `bash runs/english.sh` does this, and then trains the model.

The books: the fairy tales of Andersen, Grimm, Jacobs and Lang (eleven of his coloured books), ten of the books
of Oz, and books by Barrie, Burnett, Carroll, Grahame, Kipling, Montgomery, Nesbit, Porter, Spyri and Alcott, all
published before 1927.
"""
import os
import re
import sys
import urllib.request

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
from config import UserError, overrides  # noqa: E402
from draw import write_whole  # noqa: E402

folder = "out-english"  # with books/pgNUMBER.txt as they are downloaded, and text/NUMBER.txt

settings = overrides(globals())

BOOKS = [11, 16, 45, 54, 55, 113, 236, 289, 419, 485, 486, 503, 514, 517, 540, 640, 641, 778, 836, 955, 956, 957, 959,
         1448, 1450, 1597, 1874, 2435, 2591, 3027, 3282, 3454, 3536, 5615, 6746, 7277, 7439]
ADDRESS = "https://www.gutenberg.org/cache/epub/{0}/pg{0}.txt"
# What stands before and after a book; the second header is that of the 1990s.
FIRST = r"\*\*\* ?START OF.*?\*\*\*|\*END[* ]+THE SMALL PRINT[^\n]*\*END\*"
LAST = r"\n\s*End of (?:[Tt]he )?Project Gutenberg|\*\*\* ?END OF|\Z"
NO_STORY = re.compile(r"[^a-z]*|.*(@|Gutenberg|[Ee]text|Produced by|Contents|Translated from).*")  # [^a-z]: titles
PLAIN = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "—": "--", "\u00a0": " ", "\ufeff": ""})


def fetch(number, path):
    """Download a book."""
    try:
        with urllib.request.urlopen(ADDRESS.format(number), timeout=60) as answer:
            content = answer.read()
    except OSError as error:
        raise UserError(f"book {number} could not be downloaded ({error}): try again, or put it into {path}") from None
    write_whole(path, content)


def prose(text, path):
    """What an author wrote of a book's file: paragraphs of one line each, with an empty line between them."""
    found = re.search(f"(?:{FIRST})(.*?)(?:{LAST})", text, re.DOTALL)
    if not found:
        raise UserError(f"{path} is not a text of Project Gutenberg: its header or its licence is missing. Delete it")
    text = re.sub(r"\[(Illustration|Footnote)[^\]]*\]", "", found[1].translate(PLAIN).replace("\r\n", "\n"))
    text = re.sub(r"\b_|_\b", "", text)  # italics
    paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n", text)]
    return "\n\n".join(part for part in paragraphs if not NO_STORY.fullmatch(part)) + "\n"


def main():
    books, texts = os.path.join(folder, "books"), os.path.join(folder, "text")
    for each in (books, texts):
        os.makedirs(each, exist_ok=True)
    size = 0
    for number in BOOKS:
        path = os.path.join(books, f"pg{number}.txt")
        if not os.path.exists(path):
            fetch(number, path)
        with open(path, encoding="utf-8", errors="replace", newline="") as file:
            text = prose(file.read(), path)
        size += len(text)
        write_whole(os.path.join(texts, f"{number}.txt"), text.encode())
    print(f"{texts}: {len(BOOKS)} books, {size:,} characters")


if __name__ == "__main__":
    main()
