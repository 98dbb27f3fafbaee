import pytest
import torch

from onchip.data import ByteTokenizer
from onchip.generation import generate, stream
from onchip.generation.decoding import Decoding
from onchip.models import LanguageModel, ModelConfig

PROMPTS = ["def f(x):", "", "import numpy as np\n" * 3, "é"]


@pytest.fixture(scope="module")
def model():
    """A model of hybrid layers whose weights are large enough that its greedy text does not repeat one byte."""
    torch.manual_seed(3)
    layers = [
        {"mixer": "attention", "n_heads": 4, "n_kv_heads": 2},
        {"mixer": "attention", "n_heads": 2, "window": (7, 0), "sinks": True},
    ]
    model = LanguageModel(ModelConfig(vocab_size=257, d_model=32, layers=layers, d_mlp=64, tie_embeddings=False))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.double()


def greedy(model, prompt, n):
    """The definition: the whole sequence through the parallel form for every token."""
    ids = [ByteTokenizer.boundary_id, *ByteTokenizer().encode(prompt)]
    start = len(ids)
    while len(ids) - start < n:
        ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
        if ids[-1] == ByteTokenizer.boundary_id:
            break
    return ids[start:]


def test_greedy_is_the_argmax_of_the_parallel_form(model):
    completions = generate(model, PROMPTS, max_new_tokens=40, temperature=0.0)
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        assert completion.tokens == greedy(model, prompt, 40)
    assert len(set(completions[0].tokens)) > 10


def test_a_completion_does_not_depend_on_the_other_prompts(model):
    together = generate(model, [*PROMPTS, *PROMPTS], max_new_tokens=30, seed=7)
    for i, (prompt, completion) in enumerate(zip([*PROMPTS, *PROMPTS], together, strict=True)):
        assert completion.seed == 7 + i
        assert generate(model, [prompt], max_new_tokens=30, seed=completion.seed) == [completion]
    assert together[0].tokens != together[4].tokens


def test_the_boundary_ends_a_completion(model):
    completions = generate(model, [""] * 40, max_new_tokens=120, seed=0)
    ended = [completion for completion in completions if completion.finish == "end"]
    assert ended
    for completion in completions:
        assert (completion.finish == "end") == (completion.tokens[-1] == ByteTokenizer.boundary_id)
        assert ByteTokenizer.boundary_id not in completion.tokens[:-1]
        assert completion.finish == "end" or len(completion.tokens) == 120


def test_stop_strings_end_a_completion(model):
    several = generate(model, ["x"] * 20, max_new_tokens=60, seed=1)
    whole = next(completion for completion in several if completion.finish == "length")
    stop = whole.text[20:24]
    (cut,) = generate(model, ["x"], max_new_tokens=60, seed=whole.seed, stop=["never there", stop])
    assert cut.finish == "stop"
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.tokens == whole.tokens[: len(cut.tokens)]


def test_the_stream_is_the_completion(model):
    pieces = list(stream(model, PROMPTS, max_new_tokens=25, seed=5))
    for i, completion in enumerate(generate(model, PROMPTS, max_new_tokens=25, seed=5)):
        mine = [piece for piece in pieces if piece.index == i]
        assert "".join(piece.text for piece in mine) == completion.text
        assert completion.text == ByteTokenizer().decode(completion.tokens).decode("utf-8", "replace")
        assert [piece.token for piece in mine] == completion.tokens
        assert [piece.finish for piece in mine] == [None] * (len(mine) - 1) + [completion.finish]


def test_a_stream_leaves_the_callers_gradients_on(model):
    for _ in stream(model, ["a"], max_new_tokens=2, seed=0):
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def test_no_prompts_no_completions(model):
    assert generate(model, []) == []


def test_seeds_differ_by_default(model):
    a, b = (generate(model, [""], max_new_tokens=1)[0].seed for _ in range(2))
    assert a != b


@pytest.mark.parametrize("call", [generate, stream])
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"prompts": "abc"}, TypeError, "prompts must be a list of strings, got the single one 'abc'"),
        ({"stop": "END"}, TypeError, "stop must be a list of strings"),
        ({"stop": [""]}, ValueError, "empty string"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be at least 1, got 0"),
        ({"max_new_tokens": 1.5}, TypeError, "max_new_tokens must be an integer"),
        ({"top_p": 0}, ValueError, "top_p"),
        ({"temperature": -1}, ValueError, "temperature"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(call, model, arguments, error, message):
    with pytest.raises(error, match=message):
        call(model, **{"prompts": ["a"], **arguments})


def test_a_model_of_another_vocabulary_is_refused():
    config = ModelConfig(vocab_size=100, d_model=8, layers=[{"mixer": "attention", "n_heads": 1}], d_mlp=8)
    with pytest.raises(ValueError, match="vocabulary of 257, has 100"):
        generate(LanguageModel(config), ["a"])


@pytest.mark.parametrize(
    "layers",
    [
        [{"mixer": "mamba", "d_state": 4}] * 2,
        [{"mixer": "mamba2", "d_state": 8, "head_dim": 8}] * 2,
        [{"mixer": "mamba2", "d_state": 8, "head_dim": 8}, {"mixer": "attention", "n_heads": 2, "window": (9, 0)}],
    ],
    ids=["mamba", "mamba2", "hybrid with a window"],
)
def test_state_spaces_write_what_their_parallel_form_says_in_constant_memory(layers):
    torch.manual_seed(3)
    model = LanguageModel(ModelConfig(vocab_size=257, d_model=16, layers=layers, d_mlp=None)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    completions = generate(model, PROMPTS, max_new_tokens=20, temperature=0.0)
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        assert completion.tokens == greedy(model, prompt, 20)
    batch, sizes = Decoding(model, [[1, 2, 3] * 20, [4]]), []
    for _ in range(60):
        batch.feed(batch.logits.argmax(dim=-1))
        sizes.append(batch.state.nbytes)
    if all(layer["mixer"] != "attention" for layer in layers):
        assert set(sizes) == {model.initial_state(2).nbytes}
    assert max(sizes[30:]) <= max(sizes[:30])
