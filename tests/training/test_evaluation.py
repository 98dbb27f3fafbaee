"""Bits per byte against their definition."""

import math
import shutil
import subprocess

import pytest
import torch

from onchip.data import Document
from onchip.models import LanguageModel
from onchip.training import TrainConfig, bits_per_byte, compressed_bits_per_byte

DOCUMENTS = [Document("a", b"hello, hello"), Document("b", b"x"), Document("c", bytes(range(40)))]


def test_they_are_the_negative_log_probabilities_of_windows_computed_alone(config: TrainConfig) -> None:
    model = LanguageModel(config.model).double()
    context, bits = 8, 0.0
    stream = [token for document in DOCUMENTS for token in (256, *document.data)]
    # Every token's history: back to the last boundary, and no further than its window.
    for i, target in enumerate([*stream[1:], 256]):
        start = max(i - i % context, max(j for j in range(i + 1) if stream[j] == 256))
        logits = model(torch.tensor([stream[start : i + 1]]))[0, -1]
        bits -= logits.log_softmax(0)[target].item() / math.log(2)
    size = sum(len(document.data) for document in DOCUMENTS)
    # Logits are taken in float32.
    assert bits_per_byte(model, DOCUMENTS, context=context) == pytest.approx(bits / size, rel=1e-6)


def test_a_model_that_knows_nothing_pays_for_every_byte_and_every_end(config: TrainConfig) -> None:
    model = LanguageModel(config.model)
    torch.nn.init.zeros_(model.embedding.weight)
    size = sum(len(document.data) for document in DOCUMENTS)
    expected = math.log2(257) * (size + len(DOCUMENTS)) / size
    assert bits_per_byte(model, DOCUMENTS, context=1000) == pytest.approx(expected, rel=1e-6)


def test_a_look_at_some_windows_sees_those_windows_alone(config: TrainConfig) -> None:
    model = LanguageModel(config.model)
    first, others, last = b"a" * 31, b"=" + b"b" * 31, b"=" + b"c" * 31  # windows of 32, after the boundary
    whole, some = [Document("", first + others * 2 + last)], [Document("", first + last)]
    look = bits_per_byte(model, whole, context=32, windows=2)
    assert look == pytest.approx(bits_per_byte(model, some, context=32), rel=1e-6)
    assert look != pytest.approx(bits_per_byte(model, whole, context=32), rel=1e-6)
    assert bits_per_byte(model, whole, context=32, windows=9) == bits_per_byte(model, whole, context=32)


@pytest.mark.parametrize("program", ["gzip", "xz"])
def test_the_compressors_are_those_of_the_command_line(program: str) -> None:
    if shutil.which(program) is None:
        pytest.skip(f"no {program} here")
    data = b"".join(b"line %d of the file, %d\n" % (i, i * i % 97) for i in range(3000))
    packed = subprocess.run([program, "-9", "-c"], input=data, capture_output=True, check=True).stdout
    halves = [Document("1", data[:1000]), Document("2", data[1000:])]
    ours = compressed_bits_per_byte(halves)[f"{program} -9"]
    # Two implementations of deflate may part by a little; the containers by some bytes.
    assert ours == pytest.approx(8 * len(packed) / len(data), rel=0.02)
