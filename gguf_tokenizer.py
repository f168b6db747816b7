"""The tokenizer of a GGUF file, into a tokenizer of this collection, and back.

    tokenizer, more = tokenizer_of(fields, "model.gguf")  # fields: the file's settings, by name
    add_tokenizer(writer, meta, vocab_size)               # meta: the header of a checkpoint; writer: gguf.GGUFWriter

A GGUF file holds the tokens, their types, and either merges with the name of the regexes that cut a text into words
(tokenizer.ggml.pre), or scores, as SentencePiece has them. Here they become a tokenizer.json, which is read as Hugging
Face's are: see from_tokenizer_json() in tokenizer.py.
"""
import json
import re
import sys

from config import UserError
from readers import template_settings
from tokenizer import (
    BYTES_OF_LETTERS,
    DIGITS_ALONE,
    GPT2_PATTERN,
    PATTERN,
    Tokenizer,
    added_entries,
    begin_with,
    bpe_regexes,
    from_tokenizer_json,
    to_tokenizer_json,
)

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # types of tokens

# ---- regexes ---------------------------------------------------------------------------------------------------------

DIGIT, DIGITS = r"\p{N}", r"\p{N}+"
ENDING = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # punctuation with the newlines after it, and blanks
SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"  # English contractions
LLAMA3 = SHORT + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + ENDING
QWEN2 = SHORT + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + ENDING
# Words of one case: capitals first, then small letters.
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
WORDS = [rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*"]
SLASH = ENDING.replace(r"[\r\n]*", r"[\r\n/]*")
TEKKEN = "|".join(WORDS) + r"|\p{N}" + SLASH
GPT4O = "|".join(word + SHORT + "?" for word in WORDS) + r"|\p{N}{1,3}" + SLASH
PUNCTUATED = (r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
              r"| ?[\p{P}\p{S}]+")
DEEPSEEK3 = [r"\p{N}{1,3}", r"[一-龥぀-ゟ゠-ヿ]+", PUNCTUATED + r"[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"]
CASED = ("A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-\u1f15\u1f18-\u1f1d"
         "\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe"
         "\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffcℂℇℊ-ℓℕℙ-ℝℤ\u2126"
         "ℨ\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃")
BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"
IDEOGRAPHS = r"[一-龥\u0800-一가-\ud7ff]+"
CJK = "[一-鿿㐀-䶿豈-﫿぀-ゟ゠-ヿ･-ﾟ⼀-⿟เ-๿຀-໿ក-៿က-႟ꩠ-ꩿꧠ-꧿가-힯ᄀ-ᇿ]+"

# The regexes that cut a text into words, one after the other, by their names in tokenizer.ggml.pre. Of several names
# with equal regexes, the first is written into new files.
PRE = {
    **dict.fromkeys(("gpt-2", "phi-2", "jina-es", "jina-de", "gigachat", "jina-v2-es", "jina-v2-de", "a.x-4.0",
                     "mellum", "modern-bert", "exaone4", "jina-v1-en", "jina-v2-code", "roberta-bpe", "mpt", "olmo",
                     "jais", "trillion", "granite-docling"), [GPT2_PATTERN]),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2",
                     "jina-v5-nano", "dbrx", "smaug-bpe", "glm4", "chatglm-bpe"), [LLAMA3]),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "stablelm2", "hunyuan", "solar-open",
                     "grok-2"), [QWEN2]),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"),
                    [DIGIT, GPT2_PATTERN]),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2", "granite-embed-multi-97m"), [GPT4O]),
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4"), DEEPSEEK3),
    **dict.fromkeys(("tiny_aya", "cohere2moe"), [r"\d{1,3}(?=(?:\d{3})*\b)", GPT4O]),
    **dict.fromkeys(("bailingmoe", "bailingmoe2", "llada-moe"),
                    [r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]"
                     r"|\s+(?!\S)|\s+"]),
    **dict.fromkeys(("poro-chat", "bloom", "gpt3-finnish"), [BLOOM]),
    "viking": [BLOOM, DIGIT],
    "tekken": [TEKKEN],
    "qwen35": [QWEN2.replace(r"\p{L}+|", r"[\p{L}\p{M}]+|").replace(r"[^\s\p{L}\p{N}]+", r"[^\s\p{L}\p{M}\p{N}]+")],
    "ufakzeka": [QWEN2.removeprefix(SHORT + "|")],
    "seed-coder": [QWEN2.replace(r" ?[^\s\p{L}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{N}\r\n]+")],
    "minicpm5": [r"\p{N}{1,3}", QWEN2.replace(r"|\p{N}|", r"|\p{N}+|")],
    "laguna": [r"[^\n]+|[\n]+", QWEN2],
    "jais-2": [LLAMA3.removesuffix(r"\s+(?!\S)|\s+")
               + "".join(rf"\s{{{n}}}(?!\S)|" for n in (512, 256, 128, 64, 32, 16, 8, 4)) + r"\s{1,2}(?!\S)|\s{1}"],
    "exaone-moe": [SHORT + r"|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}"
                           r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+"],
    "youtu": ["[가-힣ㄱ-ㆎ]+|[！…“”‘’—：；，、-〿︰-﹏]+|[ㄅ-ㄯ]+|[一-龥぀-ゟ゠-ヿ]+", GPT4O.replace("{1,3}", "")],
    "superbpe": [DIGITS, r"(?=(\d{3})+(?!\d))"],
    "spark2_5": [*DEEPSEEK3[:2], PUNCTUATED + r"|[\r\n]|\s+(?!\S)|\s+", DIGIT],
    "afmoe": [r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))", CJK, DEEPSEEK3[2]],
    "deepseek-llm": [r"[\r\n]", rf"\s?[{CASED}]+", r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$", IDEOGRAPHS, DIGITS],
    "deepseek-coder": [r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", IDEOGRAPHS, DIGIT],
    "falcon": [r"[\p{P}\$\+<=>\^~\|`]+", GPT2_PATTERN, "[0-9][0-9][0-9]"],
    "chameleon": ["<sentinel:[0-9]+>", "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z", r"([\t\n]|    |  )", DIGIT,
                  r"[\p{P}!-/:-@\[-`{-~]", GPT2_PATTERN],
    "default": [r"[\p{P}\$\+<=>\^~\|]+", GPT2_PATTERN, DIGITS, "[0-9][0-9][0-9]"],
}
# Where a file lacks add_bos_token: tokenizers that put a token before each text all the same, as llama.cpp does.
BEGIN = {"llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano",
         "tekken", "chameleon"}
WHOLE_WORDS = BEGIN - {"chameleon"} | {"minicpm5", "youtu", "granite-embed-multi-97m"}  # ignore_merges
NFC = {"qwen2", "deepseek-r1-qwen", "qwen35", "mpt", "olmo"}  # their tokenizer.json normalizes; llama.cpp does not
MODELS = {"bert": "WordPiece", "t5": "Unigram", "rwkv": "RWKV's", "plamo2": "PLaMo's", "gemma4": "Gemma 4's",
          "hybriddna": "DNA's", "whitespace": "whitespace"}  # that are not read
ENDS = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>",
        "<|endoftext|>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<end_of_utterance>",
        "<eos>", "<｜end▁of▁sentence｜>")  # names of control tokens at which llama.cpp stops too

# ---- read ------------------------------------------------------------------------------------------------------------


def tokenizer_of(fields: dict, where: str) -> tuple[Tokenizer | None, dict]:
    """The tokenizer of a GGUF file's settings, and the entries for a checkpoint's header: chat_template, `template`,
    `ends` (ids at which an answer ends) and "hf" (what Hugging Face's tokenizer_config.json would hold). None, and a
    line that says so, if the tokenizer is of a kind that is not read. where: the file, for messages. UserError if its
    settings do not fit each other."""
    def get(key: str, *default):
        return fields.get(f"tokenizer.ggml.{key}", *default)

    more, model, pre = template_settings(fields.get("tokenizer.chat_template")), get("model"), get("pre")
    tokens, types = get("tokens") or [], get("token_type") or []
    if model not in ("gpt2", "llama") or pre in ("gemma4", "granite-embed-multi-311m", "sarvam-moe", "whitespace"):
        name = MODELS.get(model, repr(model)) if model != "gpt2" else f"that of {pre}"
        print(f"{where}: {name} tokenizer is not supported: the checkpoint cannot read or write text"
              if model else f"{where} holds no tokenizer: the checkpoint cannot read or write text")
        return None, more
    types = types or [NORMAL] * len(tokens)
    for name, found in {"types": types, **({"scores": get("scores") or []} if model == "llama" else {})}.items():
        if not tokens or len(found) != len(tokens):
            raise UserError(f"{where} has a tokenizer of {len(tokens)} tokens and {len(found)} {name}: it is cut "
                            "short; copy it again")
    if len(set(tokens)) < sum(map(bool, tokens)):
        raise UserError(f"{where} has two tokens of one name: copy it again")
    default = dict(bos=1, eos=2, unknown=0) if model == "llama" else {}  # as llama.cpp has them
    named = {name: get(f"{name}_token_id", default.get(name)) for name in ("bos", "eos", "eot", "eom", "unknown",
                                                                            "padding")}
    for name, i in named.items():
        if i is not None and not 0 <= i < len(tokens) or name == "eos" and i is None:
            raise UserError(f"{where} does not say which token is {name} (tokenizer.ggml.{name}_token_id={i}, of "
                            f"{len(tokens)} tokens): copy it again")
    if model == "gpt2" and pre not in PRE:
        print(f"{where}: tokenizer.ggml.pre is " + ("missing" if pre is None else f"{pre!r}, which is not known here")
              + ": the regexes of `default` are assumed, so that some texts may be cut into other words")
    begins = get("add_bos_token", model == "llama" or pre in BEGIN) and named["bos"] is not None
    build = sentence_piece if model == "llama" else byte_pairs
    found = build(get, [token or f"[EMPTY_{i}]" for i, token in enumerate(tokens)], types, where)
    found["added_tokens"] = [entry for kinds, special in (((CONTROL, UNKNOWN), True), ((USER_DEFINED,), False))
                             for entry in added_entries({tokens[i]: i for i, kind in enumerate(types)
                                                         if kind in kinds and tokens[i]}, special)]
    missing = [i for i in (named["bos"], named["eos"]) if i is not None and types[i] not in (CONTROL, UNKNOWN)]
    found["added_tokens"] = [entry for entry in found["added_tokens"] if entry["id"] not in missing]
    found["added_tokens"] += added_entries({tokens[i]: i for i in sorted({*missing})}, True)
    found["added_tokens"].sort(key=lambda entry: entry["id"])
    found["post_processor"] = begin_with(named["bos"], tokens[named["bos"]]) if begins else None
    if "tokenizer.huggingface.json" in fields:
        found = json.loads(fields["tokenizer.huggingface.json"])
    tokenizer = from_tokenizer_json(json.dumps(found, ensure_ascii=False), eos=tokens[named["eos"]])
    config = {f"{theirs}_token": tokens[named[name]] for name, theirs in
              (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")) if named[name] is not None}
    return tokenizer, {**more, "ends": ends_of(tokens, types, named),
                       "hf": {"tokenizer_config": {**config, "add_bos_token": bool(begins)}}}


def ends_of(tokens: list[str], types: list[int], named: dict) -> list[int]:
    """The ids of tokens that end an answer: eos, eot and eom, and control tokens with the usual names of these."""
    control = {tokens[i]: i for i, kind in enumerate(types) if kind == CONTROL}
    names = [name for name in ENDS if name in control]
    if "<|end|>" in names and {"<|return|>", "<|call|>"} <= {*names} or {"<|calls|>", "<|flush|>"} <= {*names}:
        names = [name for name in names if name != "<|end|>"]  # it ends a part of an answer there
    found = [named["eos"], named["eot"], named["eom"], *(control[name] for name in names)]
    return list(dict.fromkeys(i for i in found if i is not None))


def byte_pairs(get, tokens: list[str], types: list[int], where: str) -> dict:
    """The tokenizer.json of a byte-level tokenizer, but for added tokens."""
    pre = get("pre") if get("pre") in PRE else "default"
    vocab = {token: i for i, token in enumerate(tokens) if types[i] != UNUSED}
    merges = []
    for merge in get("merges") or []:
        cut = merge.find(" ", 1)  # a piece may begin with a blank, but have no other
        merges.append([merge[:cut], merge[cut + 1:]])
    bad = next((merge for merge in merges if any(piece not in vocab for piece in (*merge, "".join(merge)))), None)
    if bad or not any(token in BYTES_OF_LETTERS for token in tokens):
        raise UserError(f"{where} merges {bad}, which are no tokens: copy it again" if bad else
                        f"{where} has no token of one byte: its tokenizer is not byte-level, and cannot be read")
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    splits = [{"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
              for regex in PRE[pre]]
    return {"version": "1.0", "normalizer": {"type": "NFC"} if pre in NFC else None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, level]}, "decoder": level,
            "model": {"type": "BPE", "ignore_merges": pre in WHOLE_WORDS, "vocab": vocab, "merges": merges}}


def sentence_piece(get, tokens: list[str], types: list[int], where: str) -> dict:
    """The tokenizer.json, but for added tokens, of SentencePiece's BPE: of all neighbours that together make a known
    piece, those with the best score are merged first; a character that is not a piece becomes bytes. In a
    tokenizer.json not pieces but the pairs that make them are ranked."""
    scores = get("scores")
    vocab = {piece: i for i, piece in enumerate(tokens) if types[i] != UNUSED}
    plain = {piece for piece, kind in zip(tokens, types, strict=True) if kind == NORMAL}
    pairs = [(-scores[vocab[piece]], vocab[piece[:cut]], vocab[piece[cut:]]) for piece in plain
             for cut in range(1, len(piece)) if piece[:cut] in plain and piece[cut:] in plain]
    prefix = get("add_space_prefix", True)
    steps = [{"type": "Replace", "pattern": {"String": " "}, "content": BLANK}]
    decoders = [{"type": "Replace", "pattern": {"String": BLANK}, "content": " "}, {"type": "ByteFallback"},
                {"type": "Fuse"}]
    if prefix:
        steps.insert(0, {"type": "Prepend", "prepend": BLANK})
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    unknown = get("unknown_token_id", 0)
    return {"version": "1.0", "normalizer": {"type": "Sequence", "normalizers": steps}, "pre_tokenizer": None,
            "decoder": {"type": "Sequence", "decoders": decoders},
            "model": {"type": "BPE", "unk_token": tokens[unknown], "fuse_unk": True, "byte_fallback": True,
                      "vocab": vocab, "merges": [[tokens[left], tokens[right]] for _, left, right in sorted(pairs)]}}


BLANK = "\u2581"  # SentencePiece's letter for a blank: one-eighth block

# ---- write -----------------------------------------------------------------------------------------------------------


def add_tokenizer(writer, meta: dict, vocab_size: int):
    """Write the tokenizer of a checkpoint's header, and its chat template, into a gguf.GGUFWriter. vocab_size: of the
    embedding, which may have more rows than there are tokens. UserError, with the reason, if llama.cpp has no such
    tokenizer."""
    fields = fields_of_tokenizer(meta, vocab_size)
    writer.add_tokenizer_model(fields.pop("model"))
    writer.add_token_list(fields.pop("tokens"))
    writer.add_token_types(fields.pop("token_type"))
    if "scores" in fields:
        writer.add_token_scores(fields.pop("scores"))
    if "merges" in fields:
        writer.add_token_merges(fields.pop("merges"))
    if "huggingface.json" in fields:
        writer.add_string("tokenizer.huggingface.json", fields.pop("huggingface.json"))
    for name, value in fields.items():
        add = writer.add_bool if isinstance(value, bool) else writer.add_string if isinstance(value, str) \
            else writer.add_uint32
        add(f"tokenizer.ggml.{name}", value)
    if meta.get("chat_template"):
        writer.add_chat_template(meta["chat_template"])


def fields_of_tokenizer(meta: dict, vocab_size: int) -> dict:
    """The settings tokenizer.ggml.* of GGUF, without that prefix, for the tokenizer of a checkpoint's header: tokens
    and their types, merges or scores, and the tokens that begin a text and end an answer. UserError, with the reason,
    if llama.cpp has no such tokenizer."""
    enc = Tokenizer.from_dict(meta["tokenizer"])
    if enc.kind == "char":
        raise UserError("a tokenizer of characters has no counterpart in GGUF: the model cannot be exported to it")
    found = to_tokenizer_json(enc)
    model = found["model"]
    if model.get("type", "BPE") != "BPE":
        raise UserError(f"a tokenizer of the kind {model['type']} is not written to GGUF, only byte pair encoding")
    odd = next((token["content"] for token in found["added_tokens"] if token.get("single_word")), None)
    if odd is not None:
        raise UserError(f"the token {odd!r} is one only as a whole word, which GGUF cannot say: the model cannot be "
                        "exported to it")
    byte_level = "ByteLevel" in json.dumps(found.get("pre_tokenizer") or found.get("decoder"))
    vocab, entries = model["vocab"], found["added_tokens"]
    names = {i: piece for piece, i in vocab.items()} | {entry["id"]: entry["content"] for entry in entries}
    types = dict.fromkeys(vocab.values(), NORMAL)
    if not byte_level:
        types |= {i: BYTE for i, piece in names.items() if re.fullmatch("<0x[0-9A-F]{2}>", piece)}
    for entry in entries:
        types[entry["id"]] = CONTROL if entry["special"] else USER_DEFINED
        if not entry["special"] and not byte_level:
            names[entry["id"]] = entry["content"].replace(BLANK, " ")  # as it stands in a text
    size = max(vocab_size, 1 + max(names))
    fields = {"tokens": [names.get(i, f"[PAD{i}]") for i in range(size)],
              "token_type": [types.get(i, UNUSED) for i in range(size)], "add_bos_token": enc.bos is not None}
    config = (meta.get("hf") or {}).get("tokenizer_config") or {}
    ids = {name: i for i, name in names.items()}
    for theirs, name in (("unk", "unknown"), ("pad", "padding"), ("bos", "bos")):
        token = config.get(f"{theirs}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if token in ids:
            fields[f"{name}_token_id"] = ids[token]
    if enc.bos is not None:
        fields["bos_token_id"] = enc.bos
    fields["eos_token_id"] = enc.eot
    others = [i for i in meta.get("ends") or [] if i != enc.eot and i < size]
    for i in others:
        fields.setdefault("eom_token_id" if names.get(i) == "<|eom_id|>" else "eot_token_id", i)
    return fields | (byte_pair_fields(found, enc) if byte_level else sentence_piece_fields(found, fields["tokens"]))


def byte_pair_fields(found: dict, enc: Tokenizer) -> dict:
    """Merges and the name of the regexes of a byte-level tokenizer.json."""
    model, normalizer = found["model"], found.get("normalizer")
    regexes = bpe_regexes(found)
    if regexes == [DIGITS_ALONE]:
        regexes = [DIGIT, GPT2_PATTERN]
    if regexes is None or normalizer not in (None, {"type": "NFC"}):
        what = f"the normalizer {normalizer['type']}" if regexes else "a pre_tokenizer that is no list of regexes"
        raise UserError(f"the tokenizer has {what}, which llama.cpp has not: the model cannot be exported to GGUF")
    equal = [name for name, listed in PRE.items() if [*map(without_possessive, listed)] == [
        *map(without_possessive, regexes)]]
    fits = [name for name in equal if (name in NFC) == bool(normalizer)] or equal
    more = {}
    if not regexes and not model["merges"]:
        fits = ["gpt-2"]  # bytes: no regex matters
    elif not fits and regexes == [without_possessive(PATTERN)]:
        print("llama.cpp lacks the regex that cuts a text into words for this tokenizer: it will take Llama 3's, which "
              "differs at runs of newlines")
        fits, more = ["llama-bpe"], {"huggingface.json": json.dumps(found, ensure_ascii=False)}
    elif not fits:
        raise UserError(f"llama.cpp does not know the regexes of this tokenizer ({' and then '.join(regexes)}): the "
                        "model cannot be exported to GGUF")
    return {"model": "gpt2", "pre": fits[0], "add_space_prefix": False, **more,
            "merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]}


def without_possessive(regex: str) -> str:
    """The regex with plain quantifiers: possessive ones only save time."""
    return regex.replace("?+", "?").replace("++", "+")


def sentence_piece_fields(found: dict, tokens: list[str]) -> dict:
    """Scores of a tokenizer.json that works as SentencePiece does. UserError if it does not."""
    model = found["model"]
    pairs = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model.get("merges") or ()]
    steps = found.get("normalizer") or {}
    steps = steps.get("normalizers", [steps] if steps else [])
    pre = found.get("pre_tokenizer") or {}
    lower = {"type": "Replace", "pattern": {"String": " "}, "content": BLANK}
    spaced = lower in steps or pre.get("type") == "Metaspace"
    known = all(step["type"] in ("Prepend", "Replace") for step in steps) and (
        not pre or pre["type"] == "Metaspace" and pre.get("split") is False
        or pre["type"] == "Split" and pre["pattern"] == {"String": " "})  # no blank is left where it splits
    if not spaced or not known or not model.get("byte_fallback"):
        raise UserError("the tokenizer is neither byte-level nor SentencePiece's, with bytes for unknown characters: "
                        "the model cannot be exported to GGUF")
    added = {entry["content"] for entry in found["added_tokens"]}  # these are found in the text before any merge
    pairs = [pair for pair in pairs if not added & {*pair, "".join(pair)}]
    order, made = {}, {*pairs}
    for pair in pairs:
        order.setdefault("".join(pair), len(order))
    ranks = [order["".join(pair)] for pair in pairs]
    pieces = {piece for pair in pairs for piece in (*pair, "".join(pair))}
    lacks = next(((piece[:i], piece[i:]) for piece in order for i in range(1, len(piece))
                  if piece[:i] in pieces and piece[i:] in pieces and (piece[:i], piece[i:]) not in made), None)
    if ranks != sorted(ranks) or lacks:
        raise UserError("the tokenizer merges pairs of pieces that scores cannot rank"
                        + (f" ({lacks[0]!r} and {lacks[1]!r} are never merged)" if lacks else "")
                        + ": the model cannot be exported to GGUF")
    prefix = any(step["type"] == "Prepend" for step in steps) or pre.get("type") == "Metaspace" and pre.get(
        "prepend_scheme", "always") != "never"
    unknown = model.get("unk_token")
    more = {"unknown_token_id": tokens.index(unknown)} if unknown in tokens else {}
    return {"model": "llama", "pre": "default", "add_space_prefix": prefix, **more,
            "scores": [float(-order[piece]) if piece in order else 0.0 for piece in tokens]}


if __name__ == "__main__":
    print(f"{sys.argv[0]} has no command of its own: run gguf_reader.py, which uses it", file=sys.stderr)
    sys.exit(2)
