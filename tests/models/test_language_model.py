import pytest
import torch
from torch.nn import functional as F

from onchip.models import LanguageModel, ModelConfig, ModelState

LAYERS = [
    {"mixer": "attention", "n_heads": 4, "n_kv_heads": 2},
    {"mixer": "attention", "n_heads": 2, "window": [5, 0], "sinks": True},
]
HYBRID = [
    {"mixer": "mamba2", "d_state": 4, "head_dim": 8, "d_mlp": None},
    {"mixer": "attention", "n_heads": 2},
    {"mixer": "mamba", "d_state": 3, "d_mlp": 8},
]


def make(**changes):
    return LanguageModel(ModelConfig(**{"vocab_size": 19, "d_model": 16, "layers": LAYERS, "d_mlp": 24, **changes}))


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def model(request):
    return busy(make(tie_embeddings=request.param))


@pytest.fixture
def hybrid():
    return busy(make(layers=HYBRID))


def busy(model):
    """A model whose layers do something: new ones are the identity."""
    model = model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def test_all_forms_agree(model):
    tokens = torch.randint(19, (3, 30))
    expected = model(tokens)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            head, state = model(tokens[:, :13], model.initial_state(3))
            last, state = model.prefill(tokens[:, 13:20], state)
            close(head, expected[:, :13])
            close(last, expected[:, 19])
            for t in range(20, 30):
                logits, state = model.step(tokens[:, t], state)
                close(logits, expected[:, t])


def test_all_forms_of_a_hybrid_agree(hybrid):
    test_all_forms_agree(hybrid)
    test_packed_is_one_by_one(hybrid)
    states = [hybrid.prefill(torch.randint(19, (1, n)), hybrid.initial_state(1))[1] for n in (3, 9)]
    assert ModelState.stack(states).nbytes > sum(state.layers[0].nbytes + state.layers[2].nbytes for state in states)


def test_layers_have_the_mlp_that_they_name_or_the_models_or_none(hybrid):
    widths = [None if layer.mlp is None else layer.mlp.out.in_features for layer in hybrid.layers]
    assert widths == [None, 24, 8]
    assert not any("mlp" in name for name in make(layers=LAYERS, d_mlp=None).state_dict())


def test_a_residual_stream_is_as_wide_as_asked():
    tokens = torch.randint(19, (2, 30))
    seen = []
    for wide in (True, False):
        model = make(layers=HYBRID, residual_in_fp32=wide).bfloat16()
        model.layers[1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
        assert model(tokens).dtype == torch.bfloat16
        _, state = model.prefill(tokens, model.initial_state(2))
        assert model.step(tokens[:, 0], state)[0].dtype == torch.bfloat16
    assert seen == [torch.float32, torch.bfloat16]


def test_packed_is_one_by_one(model):
    documents = [torch.randint(19, (n,)) for n in (7, 1, 20)]
    packed = model(torch.cat(documents), cu_seqlens=torch.tensor([0, 7, 8, 28], dtype=torch.int32))
    close(packed, torch.cat([model(document[None])[0] for document in documents]))


def test_states_stack_and_reorder(model):
    tokens = torch.randint(19, (2, 12))
    states = [model.prefill(tokens[i : i + 1, :n], model.initial_state(1))[1] for i, n in enumerate((3, 9))]
    state = ModelState.stack(states).reorder(torch.tensor([1, 0]))
    logits, _ = model.step(torch.stack([tokens[1, 9], tokens[0, 3]]), state)
    close(logits, torch.stack([model(tokens)[1, 9], model(tokens)[0, 3]]))
    assert state.nbytes == sum(layer.nbytes for layer in state.layers) > 0
    assert not state.detach().layers[0].keys.requires_grad and state.layers[0].keys.requires_grad


def test_matrices_are_those_of_the_layers(model):
    tokens = torch.randint(19, (2, 9))
    first, second = model.matrices(tokens)
    assert first.shape == (2, 4, 9, 9) and second.shape == (2, 2, 9, 9)
    x = model.embedding(tokens)
    for layer, matrix in zip(model.layers, (first, second), strict=True):
        x = x + layer.mixer.apply_matrix(layer.mixer_norm(x), matrix)
        x = x + layer.mlp(layer.mlp_norm(x))
    close(model._logits(x), model(tokens))


def test_it_learns():
    """Sequences that repeat every other token: what comes next is what came before the last."""
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(100):
        tokens = torch.randint(19, (8, 2)).repeat(1, 8)
        loss = F.cross_entropy(model(tokens[:, :-1])[:, 1:].flatten(0, 1), tokens[:, 2:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.2 * torch.tensor(19.0).log()


def test_the_first_loss_is_that_of_the_uniform_distribution():
    model = make(vocab_size=257, d_model=128, d_mlp=64, layers=[LAYERS[0]] * 12)
    tokens = torch.randint(257, (4, 65))
    loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    assert abs(loss - torch.tensor(257.0).log()) < 0.3


def test_a_hybrid_compiles_as_one_graph(hybrid):
    test_compiles_as_one_graph(hybrid)


def test_compiles_as_one_graph(model):
    tokens = torch.randint(19, (2, 30))
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(tokens), model(tokens))


def test_layers_begin_as_the_identity():
    model = make(tie_embeddings=False)
    tokens = torch.randint(19, (2, 9))
    assert torch.equal(model(tokens), model.head(model.norm(model.embedding(tokens))))


def test_counts_its_parameters():
    tied, untied = make(tie_embeddings=True), make(tie_embeddings=False)
    assert untied.num_parameters == tied.num_parameters + 19 * 16


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m(torch.zeros(3, dtype=torch.int64)), r"tokens must be \(B, T\), got \(3,\)"),
        (lambda m: m(torch.zeros(1, 3, dtype=torch.int64), cu_seqlens=torch.tensor([0, 3])), r"\(total,\)"),
        (
            lambda m: m(torch.zeros(3, dtype=torch.int64), m.initial_state(1), cu_seqlens=torch.tensor([0, 3])),
            "exclude each other",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(make())


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ({"mixer": "attention", "n_heads": 3}, r"layers\[1\]: d_model must be a multiple of n_heads"),
        ({"mixer": "retention"}, r"layers\[1\]: .*'retention'"),
        ({"mixer": "attention", "n_heads": 2, "causal": False}, r"layers\[1\]: .*needs causal mixers"),
        ({"mixer": "attention", "n_heads": "two"}, r"layers\[1\]: "),
    ],
)
def test_layers_that_cannot_be_built_are_named(layer, message):
    with pytest.raises(ValueError, match=message):
        make(layers=[LAYERS[0], layer])
