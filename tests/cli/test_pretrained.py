"""`onchip generate` and `onchip train --init-from` on a folder as transformers writes it."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch

from onchip.cli import main
from onchip.data import load_tokenizer
from onchip.models import load_model, read_config, save_model

tokenizers = pytest.importorskip("tokenizers", reason="needs the tokenizers library (pip install 'onchip[hf]')")
transformers = pytest.importorskip("transformers", reason="compares with transformers (pip install 'onchip[dev]')")

TEXT = "the quick brown fox jumps over the lazy dog, and the slow brown bear runs away. "


@pytest.fixture
def folder(tmp_path):
    """A random GPT-2 with a tokenizer of its own."""
    path = tmp_path / "gpt2"
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=290, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    library.train_from_iterator([TEXT], trainer)
    config = transformers.GPT2Config(
        vocab_size=300, n_embd=32, n_layer=2, n_head=2, n_positions=40, bos_token_id=0, eos_token_id=0, pad_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(path)
    library.save(str(path / "tokenizer.json"))
    return path


EACH = """
import json, sys
from onchip.cli import main
for arguments in json.load(sys.stdin):
    try:
        main(arguments)
    except SystemExit as exit:
        print("exit", exit.code, file=sys.stderr)
"""


def onchip(*commands):
    """The exit code of each command and what it said on standard error; one process for all saves their starts."""
    done = subprocess.run(
        [sys.executable, "-c", EACH],
        input=json.dumps([list(map(str, command)) for command in commands]),
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100"},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    *said, end = re.split(r"^exit (\d+)\n", done.stderr, flags=re.MULTILINE)
    assert not end
    return list(zip(map(int, said[1::2]), said[::2], strict=True))


def test_the_text_is_that_of_transformers(folder, capsysbinary):
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    model = transformers.GPT2LMHeadModel.from_pretrained(folder).eval()
    prompt = library.encode("the quick").ids
    tokens = model.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False, pad_token_id=0)[0]
    arguments = ["generate", str(folder), "--prompt", "the quick", "--max-new-tokens", "20", "--temperature", "0"]
    capsysbinary.readouterr()
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    out, err = capsysbinary.readouterr()
    assert exit.value.code in (0, None), err
    assert out.decode() == library.decode(tokens.tolist(), skip_special_tokens=True) + "\n"
    assert b"tokens in" in err


def test_training_goes_on_from_the_folder(folder, tmp_path):
    corpus, run = tmp_path / "corpus.txt", tmp_path / "run"
    corpus.write_text(TEXT * 60)
    (tmp_path / "model.json").write_text("{}")
    tiny = ("train", corpus, "--preset", "tiny", "--context", 32)
    begin = (*tiny, "--init-from", folder)
    results = onchip(
        (*begin, "--out", run, "--steps", 12, "--lr", 1e-3),
        ("train", "--out", run),
        ("train", "--out", run, "--init-from", run),
        (*begin, "--out", tmp_path / "no", "--model", tmp_path / "model.json"),
        (*begin, "--out", tmp_path / "no", "--context", 41),
    )
    codes, said = zip(*results, strict=True)
    assert codes == (0, 0, 2, 2, 2), said
    assert f"begun from {folder}, not {run}" in said[2]
    assert "exclude each other" in said[3]
    assert "at most the model's 40 positions, and got 41" in said[4]
    assert not (tmp_path / "no").exists()

    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]
    before, after = load_model(folder), load_model(run)
    assert after.config == before.config == read_config(run)
    # Twelve small steps away from where it began, as another beginning would not be.
    assert 0 < (after.embedding.weight - before.embedding.weight).abs().max() < 0.02
    assert load_tokenizer(run, 300).begin("the fox") == load_tokenizer(folder, 300).begin("the fox")
    save_model(after, tmp_path / "back", like=folder)
    assert transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "back").config.n_embd == 32
