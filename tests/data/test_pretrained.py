"""Tokenizers that come with a model, against the library that made them."""

import json

import pytest

from onchip.data import ByteTokenizer, Document, PretrainedTokenizer, load_tokenizer, token_stream

tokenizers = pytest.importorskip("tokenizers", reason="needs the tokenizers library (pip install 'onchip[hf]')")

TEXT = ["the quick brown fox", "jumps över the lazy dog — ", "naïve café, 東京 🙂\n\n"] * 3
ENDS = {"bos_token_id": 0, "eos_token_id": 1}


def byte_level():
    """As GPT-2 has it, with a token of its own before every text, as Llama 3 has it."""
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    library.train_from_iterator(TEXT, trainer)
    library.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return library


def sentencepiece():
    """As Llama 2 has it: words begin with ▁, what is no token is written in bytes."""
    pieces = [
        "<s>",
        "</s>",
        "<unk>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "t",
        "h",
        "e",
        "▁t",
        "▁th",
        "▁the",
    ]
    library = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            {piece: i for i, piece in enumerate(pieces)},
            [("▁", "t"), ("▁t", "h"), ("▁th", "e")],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    library.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    decoders = tokenizers.decoders
    library.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    library.add_special_tokens(["<s>", "</s>"])
    return library


def written(folder, library, ends=ENDS):
    library.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps(ends))
    return PretrainedTokenizer(folder, vocab_size=400)


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
def test_bytes_come_back_token_by_token(tmp_path, make):
    library = make()
    tokenizer = written(tmp_path, library)
    for text in TEXT:
        ids = tokenizer.encode(text)
        assert ids == tokenizer.encode(text.encode()) == library.encode(text, add_special_tokens=False).ids
        assert b"".join(tokenizer.decode([i]) for i in ids).decode() == text
    assert tokenizer.decode([0, 1, 399]) == b""
    assert any(len(tokenizer.decode([i])) > 1 for i in ids) or make is sentencepiece


def test_a_text_begins_and_ends_as_its_model_has_it(tmp_path):
    tokenizer = written(tmp_path, byte_level(), {"bos_token_id": 0, "eos_token_id": [1, 5]})
    assert tokenizer.begin("fox")[0] == tokenizer.boundary_id == 0
    assert tokenizer.begin("fox")[1:] == tokenizer.encode("fox")
    assert [i for i in range(9) if tokenizer.ends(i)] == [0, 1, 5]
    without = written(tmp_path, sentencepiece(), {"eos_token_id": 1})
    assert without.begin("") == [1] and without.begin("the") == without.encode("the")


def test_it_is_saved_whole(tmp_path):
    tokenizer = written(tmp_path, byte_level())
    (tmp_path / "new").mkdir()
    tokenizer.save(tmp_path / "new")
    again = load_tokenizer(tmp_path / "new", 400)
    assert again.begin(TEXT[2]) == tokenizer.begin(TEXT[2])
    assert [again.ends(i) for i in range(400)] == [tokenizer.ends(i) for i in range(400)]


def test_a_stream_of_its_tokens(tmp_path):
    tokenizer = written(tmp_path, byte_level())
    stream = token_stream([Document("a", b"the fox"), Document("b", b"lazy")], tokenizer)
    assert stream.tolist() == [0, *tokenizer.encode("the fox"), 0, *tokenizer.encode("lazy")]
    with pytest.raises(ValueError, match=r"^b: text must be UTF-8"):
        token_stream([Document("a", b"the fox"), Document("b", b"\xff")], tokenizer)


def test_what_cannot_serve_is_refused(tmp_path):
    assert isinstance(load_tokenizer(tmp_path, 257), ByteTokenizer)
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer\.json, which a model of 400 tokens needs"):
        load_tokenizer(tmp_path, 400)
    written(tmp_path, byte_level())
    with pytest.raises(ValueError, match=r"tokenizer\.json knows 300 tokens, the model 299"):
        load_tokenizer(tmp_path, 299)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="names neither bos_token_id nor eos_token_id"):
        load_tokenizer(tmp_path, 400)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    with pytest.raises(ValueError, match="must be byte-level BPE or SentencePiece's"):
        written(tmp_path, words)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer\.json is damaged"):
        load_tokenizer(tmp_path, 400)
