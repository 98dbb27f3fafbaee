"""The conformance suite of sequence mixers: one property per function, over any mixer.

It knows `onchip.nn.mixers.Mixer` and nothing of families. With pytest:

```python
@pytest.mark.parametrize("check", onchip.testing.MIXER_CHECKS, ids=lambda check: check.__name__)
def test_conformance(check):
    check(lambda: MyMixer(d_model=16, chunk_size=8))
```

Make the mixer small, d_model at most some 16, and its chunks, windows and kernels shorter than `LENGTH`, so that
sequences cross their borders.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError
from torch.func import functional_call

from onchip.nn.mixers import MissingForm, Mixer, State

MixerFactory = Callable[[], Mixer[Any]]

LENGTH = 37
TOLERANCE = 1e-10


def check_mixer(factory: MixerFactory) -> None:
    """Run every check on mixers made by `factory`; an `AssertionError` says what does not hold.

    >>> from onchip.nn.mixers import Attention
    >>> check_mixer(lambda: Attention(8, n_heads=2, n_kv_heads=1, window=(5, 0), sinks=True))
    """
    for check in MIXER_CHECKS:
        check(factory)


def check_chunks(factory: MixerFactory) -> None:
    """Split anywhere, into chunks (also empty ones) and single steps, a sequence gives the parallel form's output."""
    mixer = _make(factory)
    x = _normal(2, LENGTH, mixer.d_model)
    if not mixer.causal:
        _check_says_missing(mixer, x)
        return
    expected = mixer(x)
    for seed in range(6):
        splits = torch.randint(LENGTH + 1, (seed,), generator=_generator(seed)).sort().values.tolist()
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                y, _ = _in_chunks(mixer, x, [0, *splits, LENGTH])
            _assert_close(y, expected, f"chunks split at {splits}, gradients recorded: {grad}")


def check_steps(factory: MixerFactory) -> None:
    """Token by token, a sequence gives the output of the parallel form; under `inference_mode` too."""
    mixer = _make(factory)
    if not mixer.causal:
        return
    x = _normal(2, LENGTH, mixer.d_model)
    expected = mixer(x)
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        for state in (mixer.initial_state(2), mixer.initial_state(2).expendable()):
            with mode():
                y, state = _in_steps(mixer, x[:, :-2], state)
            with torch.no_grad():  # a state may leave the mode it was made in
                tail, _ = _in_steps(mixer, x[:, -2:], state)
            _assert_close(torch.cat([y, tail], dim=1), expected, f"steps under {mode.__name__}")


def check_causality(factory: MixerFactory) -> None:
    """Another token at t changes something from t on, and before t nothing, or something if the mixer is not causal."""
    mixer = _make(factory)
    x = _normal(2, LENGTH, mixer.d_model)
    y = mixer(x)
    for t in (1, LENGTH // 2, LENGTH - 1):
        other = x.clone()
        other[:, t] = _normal(2, mixer.d_model, seed=1)
        change = (mixer(other) - y).abs()
        if mixer.causal:
            assert change[:, :t].max() <= TOLERANCE, f"token {t} changes the output before it by {change[:, :t].max()}"
        else:
            assert change[:, :t].max() > TOLERANCE, f"causal is False, but token {t} changes nothing before it"
        assert change[:, t:].max() > TOLERANCE, f"token {t} changes nothing from there on"


def check_packed(factory: MixerFactory) -> None:
    """Packed sequences (also empty ones) and the rows of a batch give what each gives by itself."""
    mixer = _make(factory)
    lengths = [5, 0, 1, LENGTH, 8, 0]
    sequences = [_normal(n, mixer.d_model, seed=n) for n in lengths]
    expected = torch.cat([mixer(x[None])[0] for x in sequences])
    for dtype in (torch.int32, torch.int64):
        boundaries = torch.tensor([0, *lengths]).cumsum(0).to(dtype)
        _assert_close(mixer(torch.cat(sequences), cu_seqlens=boundaries), expected, f"packed, boundaries {dtype}")
    batch = _normal(3, LENGTH, mixer.d_model)
    _assert_close(mixer(batch), torch.cat([mixer(row[None]) for row in batch]), "the rows of a batch")


def check_gradients(factory: MixerFactory) -> None:
    """The parallel form passes `gradcheck` in input and parameters; the other forms have the same gradients."""
    mixer = _make(factory)
    names, values = zip(*mixer.named_parameters(), strict=True)

    def parallel(x: Tensor, *parameters: Tensor) -> Any:
        return functional_call(mixer, dict(zip(names, parameters, strict=True)), (x,))

    leaves = [value.detach().clone().requires_grad_() for value in values]
    try:
        torch.autograd.gradcheck(parallel, (_normal(1, 5, mixer.d_model).requires_grad_(), *leaves))
    except GradcheckError as error:
        raise AssertionError(f"gradients of the input, {', '.join(names)}: {error}") from None

    x = _normal(1, 12, mixer.d_model)
    expected = _gradients(mixer, x, mixer)
    boundaries = torch.tensor([0, 12], dtype=torch.int32)
    forms: dict[str, Callable[[Tensor], Tensor]] = {"packed": lambda x: mixer(x[0], cu_seqlens=boundaries)[None]}
    if mixer.causal:
        forms["chunked"] = lambda x: _in_chunks(mixer, x, [0, 5, 6, 12])[0]
        forms["step"] = lambda x: _in_steps(mixer, x, mixer.initial_state(1))[0]
    for form, f in forms.items():
        for name, gradient in _gradients(mixer, x, f).items():
            _assert_close(gradient, expected[name], f"{form} form: the gradient of {name}")


def check_matrix(factory: MixerFactory) -> None:
    """`apply_matrix(x, matrix(x))` is `mixer(x)`; row t acts on output t alone; a causal matrix is lower triangular."""
    mixer = _make(factory)
    x = _normal(2, 9, mixer.d_model)
    try:
        matrix = mixer.matrix(x)
    except MissingForm:
        return
    assert matrix.ndim == 4 and matrix.shape[::2] == (2, 9) and matrix.shape[3] == 9, tuple(matrix.shape)
    y = mixer(x)
    _assert_close(mixer.apply_matrix(x, matrix), y, "the matrix form")
    if mixer.causal:
        assert not matrix.triu(1).any(), "the matrix of a causal mixer has entries above its diagonal"
    for t in (0, 4, 8):
        without = matrix.clone()
        without[:, :, t] = 0
        change = (mixer.apply_matrix(x, without) - y).abs().amax(dim=(0, 2))
        assert change[t] > TOLERANCE, f"row {t} of the matrix is without effect"
        change[t] = 0
        assert change.max() <= TOLERANCE, f"row {t} of the matrix changes other outputs"


def check_states(factory: MixerFactory) -> None:
    """A state is a value: it serves several continuations, is reordered and detached, and says what it weighs.

    Another mixer's is refused, with the argument's name: `state_type` says what is one's own.
    """
    mixer = _make(factory)
    if not mixer.causal:
        return
    x = _normal(3, LENGTH, mixer.d_model)
    expected = mixer(x)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            _, state = _in_steps(mixer, x[:, :20], mixer.initial_state(3))
            _, other = _in_chunks(mixer, x[:, 20:28], [0, 1, 8], state)
            # Others that begin where the first one did; none may see another.
            _in_chunks(mixer, _normal(3, 12, mixer.d_model, seed=1), [0, 1, 2, 12], state)
            tail, _ = _in_chunks(mixer, x[:, 28:], [0, 1, 9], other)
            _assert_close(tail, expected[:, 28:], "the first of three continuations of a state")
            tail, _ = _in_chunks(mixer, x[:, 20:], [0, 1, 9, 17], state)
            _assert_close(tail, expected[:, 20:], "the last of three continuations of a state")
            index = torch.tensor([2, 0, 0, 2])
            tail, after = _in_chunks(mixer, x[index, 20:], [0, 9, 10, 17], state.reorder(index))
            _assert_close(tail, expected[index, 20:], "after reorder")
            assert after.reorder(index[:0]).reorder(index[:0]) is not None
        assert isinstance(after.nbytes, int) and after.nbytes > 0, f"nbytes is {after.nbytes!r}"
    x.requires_grad_()
    _, state = mixer(x[:, :20], mixer.initial_state(3))
    tail, _ = mixer(x[:, 20:], state.detach())
    _assert_close(tail, expected[:, 20:], "after detach")
    (gradient,) = torch.autograd.grad(tail.sum(), x)
    assert not gradient[:, :20].any(), "gradients flow through a detached state"
    tail, _ = mixer(x[:, 20:], state)
    (gradient,) = torch.autograd.grad(tail.sum(), x)
    assert gradient[:, :20].any(), "no gradient flows through a state"
    for form, call in (("chunk", lambda: mixer(x, _Another())), ("step", lambda: mixer.step(x[:, 0], _Another()))):
        try:
            call()
        except TypeError as error:
            assert "state must be" in str(error), f"a {form} with another mixer's state raises: {error}"
        else:
            raise AssertionError(f"a {form} takes another mixer's state")


def check_ragged(factory: MixerFactory) -> None:
    """Sequences of different lengths, stacked, go on together as each does by itself, also when the longest leaves."""
    mixer = _make(factory)
    if not mixer.causal:
        return
    lengths = [9, 1, 20, 0, 9]
    sequences = [_normal(1, LENGTH, mixer.d_model, seed=seed) for seed, _ in enumerate(lengths)]
    expected = [mixer(x) for x in sequences]
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            states = [mixer(x[:, :n], mixer.initial_state(1))[1] for x, n in zip(sequences, lengths, strict=True)]
            state = type(states[0]).stack([type(states[0]).stack(states[:2]), *states[2:]])
            rows, done = torch.arange(5), 0
            for stay in ([0, 1, 2, 3, 4], [3, 0, 1, 4], [1], []):
                state, rows = state.reorder(torch.tensor(stay, dtype=torch.int64)), rows[stay]
                starts = [lengths[row] + done for row in rows]
                x = [sequences[row][:, start : start + 5] for row, start in zip(rows, starts, strict=True)]
                y, state = _in_chunks(mixer, torch.cat([*x, _normal(0, 5, mixer.d_model)]), [0, 1, 2, 5], state)
                for i, (row, start) in enumerate(zip(rows, starts, strict=True)):
                    wanted = expected[row][0, start : start + 5]
                    _assert_close(y[i], wanted, f"row {row} of lengths {lengths}, {done} tokens on")
                done += 5


def check_edges(factory: MixerFactory) -> None:
    """One token, no token and no sequence are sequences too; the output has the shape and dtype of the input."""
    mixer = _make(factory)
    for shape in ((2, 1), (2, 0), (0, 7), (0, 0)):
        x = _normal(*shape, mixer.d_model).requires_grad_()
        outputs = [mixer(x)]
        if mixer.causal:
            y, state = mixer(x, mixer.initial_state(shape[0]))
            y_t, _ = mixer.step(_normal(shape[0], mixer.d_model), state)
            assert y_t.shape == (shape[0], mixer.d_model)
            outputs.append(y)
        for y in outputs:
            assert y.shape == x.shape and y.dtype == x.dtype, f"{tuple(x.shape)} gives {tuple(y.shape)}, {y.dtype}"
            assert y.isfinite().all(), f"not finite for {tuple(x.shape)}"
            y.sum().backward()
    dtype = _make(factory).float()(_normal(1, LENGTH, mixer.d_model).float()).dtype
    assert dtype == torch.float32, f"a float32 input gives {dtype}"


def check_checkpoint(factory: MixerFactory) -> None:
    """The state dict is all there is: a mixer made without memory and given it computes the same."""
    mixer = _make(factory)
    x = _normal(2, LENGTH, mixer.d_model)
    with torch.device("meta"):
        other = factory()
    other.load_state_dict(mixer.state_dict(), assign=True)
    try:
        y = other(x)
    except RuntimeError as error:
        raise AssertionError(f"a mixer filled from a state dict does not run: {error}") from None
    _assert_close(y, mixer(x), "a mixer filled from a state dict")


class _Another(State):
    """Of no mixer that is checked."""


MIXER_CHECKS: tuple[Callable[[MixerFactory], None], ...] = (
    check_chunks,
    check_steps,
    check_causality,
    check_packed,
    check_gradients,
    check_matrix,
    check_states,
    check_ragged,
    check_edges,
    check_checkpoint,
)
"""Every property, to parametrise a test with."""


def _make(factory: MixerFactory) -> Mixer[Any]:
    """A float64 mixer, its parameters moved off their first values, so that no term is out of sight by being zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        mixer = factory().double()
        with torch.no_grad():
            for parameter in mixer.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return mixer


def _in_chunks(mixer: Mixer[Any], x: Tensor, splits: list[int], state: State | None = None) -> tuple[Tensor, Any]:
    """`x` split at `splits`, which begin with 0; pieces of one token by `step`."""
    state = mixer.initial_state(x.shape[0]) if state is None else state
    outputs = []
    for piece in (x[:, start:end] for start, end in pairwise(splits)):
        y, state = _in_steps(mixer, piece, state) if piece.shape[1] == 1 else mixer(piece, state)
        outputs.append(y)
    return torch.cat(outputs, dim=1), state


def _in_steps(mixer: Mixer[Any], x: Tensor, state: State) -> tuple[Tensor, Any]:
    outputs = []
    for x_t in x.unbind(dim=1):
        y_t, state = mixer.step(x_t, state)
        outputs.append(y_t)
    return torch.stack(outputs, dim=1), state


def _gradients(mixer: Mixer[Any], x: Tensor, f: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """The gradients of a fixed function of `f(x)`, in x and in every parameter, none of which may be without one."""
    x = x.clone().requires_grad_()
    leaves = {"the input": x, **dict(mixer.named_parameters())}
    y = f(x)
    gradients = torch.autograd.grad((y * _normal(*y.shape, seed=2)).sum(), list(leaves.values()), allow_unused=True)
    missing = [name for name, gradient in zip(leaves, gradients, strict=True) if gradient is None]
    assert not missing, f"no gradient for {', '.join(missing)}"
    return {name: gradient for name, gradient in zip(leaves, gradients, strict=True) if gradient is not None}


def _check_says_missing(mixer: Mixer[Any], x: Tensor) -> None:
    for form, call in (
        ("initial_state", lambda: mixer.initial_state(2)),
        ("the chunked form", lambda: mixer(x, State())),
        ("step", lambda: mixer.step(x[:, 0], State())),
    ):
        try:
            call()
        except MissingForm:
            continue
        raise AssertionError(f"{form} of a mixer that is not causal must raise MissingForm")


def _assert_close(actual: Tensor, expected: Tensor, what: str) -> None:
    torch.testing.assert_close(
        actual, expected, rtol=TOLERANCE, atol=TOLERANCE, msg=lambda details: f"{what}: {details}"
    )


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=_generator(seed))


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
