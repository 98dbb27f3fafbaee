"""The reproductions run, small, and their verdicts can go both ways. Speed is measured but not asserted."""

import re
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch

from onchip.bench.timing import Quartiles

REPRODUCTIONS = Path(__file__).parent.parent / "reproductions"


def loaded(name):
    """A fixture: the reproduction of that name, as a module."""

    @pytest.fixture(scope="module", name=name)
    def module():
        spec = spec_from_file_location(name, REPRODUCTIONS / f"{name}.py")
        found = module_from_spec(spec)
        sys.modules[spec.name] = found
        spec.loader.exec_module(found)
        yield found
        del sys.modules[spec.name]

    return module


flashattention = loaded("flashattention")
flashattention2 = loaded("flashattention2")
flashattention3 = loaded("flashattention3")
block_sparse = loaded("block_sparse")
hippo = loaded("hippo")
lssl = loaded("lssl")
s4 = loaded("s4")
mamba = loaded("mamba")
mamba2 = loaded("mamba2")
digits = loaded("digits")
synthetic = loaded("synthetic")


@pytest.mark.slow
def test_flashattention_runs(tmp_path):
    script = [sys.executable, str(REPRODUCTIONS / "flashattention.py"), "--quick", "--out", str(tmp_path)]
    run = subprocess.run(script, capture_output=True, text=True, check=False)
    verdicts = re.findall("PASS|FAIL", run.stdout)
    assert len(verdicts) == 3, run.stderr
    assert run.returncode == ("FAIL" in verdicts)
    assert verdicts[0] == "PASS"  # exactness; the sequences are too short here for the others to say much
    assert (tmp_path / "flashattention.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "ours, eager, holds",
    [([1, 2, 4], [1, 4, 16], True), ([1, 4, 16], [1, 4, 16], False), ([1, 2, 4], [1, 2, 4], False)],
)
def test_memory_is_judged_by_its_growth(flashattention, ours, eager, holds):
    finding = flashattention.linear_memory([512, 1024, 2048], {"onchip": ours, "sdpa_math": eager})
    assert finding.holds is holds


@pytest.mark.parametrize("speeds, holds", [([1.5, 2.0, 3.0], True), ([3.0, 2.5, 2.0], False), ([1.0, 1.2, 1.9], False)])
def test_speed_must_grow_and_reach_what_was_published(flashattention, speeds, holds):
    finding = flashattention.growing_speed([512, 1024, 2048], [Quartiles(x, x, x) for x in speeds])
    assert finding.holds is holds


@pytest.mark.slow
def test_flashattention3_runs(tmp_path):
    script = [sys.executable, str(REPRODUCTIONS / "flashattention3.py"), "--quick", "--out", str(tmp_path)]
    run = subprocess.run(script, capture_output=True, text=True, check=False)
    verdicts = re.findall("PASS|FAIL", run.stdout)  # the sequences are too short here for the published errors
    assert len(verdicts) == 3, run.stderr
    assert run.returncode == ("FAIL" in verdicts)
    assert (tmp_path / "flashattention3.png").read_bytes().startswith(b"\x89PNG")


def test_errors_are_judged_against_the_published_ones(flashattention3):
    published = dict(flashattention3.PUBLISHED)
    findings = flashattention3.as_published, flashattention3.less_than_standard, flashattention3.what_helps
    assert all(finding(published).holds for finding in findings)
    for name in published:
        assert not flashattention3.as_published(published | {name: 1.6 * published[name]}).holds
        assert not flashattention3.as_published(published | {name: published[name] / 1.6}).holds
    for name in ("float16, FlashAttention", "FP8, both"):
        assert not flashattention3.less_than_standard(published | {name: 1.6 * published[name]}).holds
    assert not flashattention3.what_helps(published | {"FP8, incoherent processing alone": 2e-2}).holds
    assert not flashattention3.what_helps(published | {"FP8, both": 5e-3}).holds


def test_the_published_inputs_have_their_moments(flashattention3):
    x = flashattention3.outliers(4096, 128)
    # A variance of 1 + 0.001 · 100, of which the outliers make the estimate uncertain by a few thousandths.
    assert abs(x.square().mean().item() - 1.1) < 0.02
    assert x.abs().max() > 15


def test_without_incoherent_processing_errors_grow(flashattention3):
    errors = flashattention3.measure(256, 1)
    assert errors["float16, FlashAttention"] < errors["float16, standard"] < errors["FP8, both"]
    assert errors["FP8, both"] < errors["FP8, a scale a block alone"]


@pytest.mark.slow
def test_flashattention2_runs(tmp_path):
    script = [sys.executable, str(REPRODUCTIONS / "flashattention2.py"), "--quick", "--out", str(tmp_path)]
    run = subprocess.run(script, capture_output=True, text=True, check=False)
    verdicts = re.findall("PASS|FAIL", run.stdout)
    assert len(verdicts) == 3, run.stderr
    assert run.returncode == ("FAIL" in verdicts)
    assert (tmp_path / "flashattention2.png").read_bytes().startswith(b"\x89PNG")


def measured(module, length, fraction=0.8, speedup=1.75):
    same = lambda x: Quartiles(x, x, x)  # noqa: E731
    fractions = {panel: same(fraction) for panel in module.PANELS}
    return module.Length(length, fractions, {"forward": same(speedup), "backward": same(speedup)})


@pytest.mark.parametrize("name", ["forward", "backward"])
def test_a_fraction_of_the_product_is_judged_at_the_best_length(flashattention2, name):
    published = flashattention2.PUBLISHED[name]
    for reached, holds in ((published, True), (published - 0.01, False)):
        found = [measured(flashattention2, 512, reached), measured(flashattention2, 1024, 0.1)]
        assert flashattention2.near_the_product(found, name).holds is holds


@pytest.mark.parametrize("short, long, holds", [(1.2, 1.8, True), (1.8, 1.6, False)])
def test_causal_is_judged_at_the_longest_length(flashattention2, short, long, holds):
    found = [measured(flashattention2, 512, speedup=short), measured(flashattention2, 1024, speedup=long)]
    assert flashattention2.causal_costs_half(found).holds is holds


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_cases_are_those_of_flashattention2(flashattention2, device):
    full, causal, backward, _ = (flashattention2.case(2048, device, *panel) for panel in flashattention2.PANELS)
    assert causal.operations == pytest.approx(full.operations / 2, rel=1e-3)
    assert backward.operations == 2.5 * full.operations and backward.alone
    if device == "cuda":
        assert full.batch * full.q_len == 16384 and full.heads * full.head_dim == 2048 and full.dtype == "bfloat16"


@pytest.mark.slow
def test_block_sparse_runs(tmp_path):
    script = [sys.executable, str(REPRODUCTIONS / "block_sparse.py"), "--quick", "--out", str(tmp_path)]
    run = subprocess.run(script, capture_output=True, text=True, check=False)
    verdicts = re.findall("PASS|FAIL", run.stdout)
    assert len(verdicts) == 3, run.stderr
    assert run.returncode == ("FAIL" in verdicts)
    assert verdicts[0] == "PASS"  # exactness; the sequence is too short here for the others to say much
    assert (tmp_path / "block_sparse.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("cost, holds", [(0.29, True), (0.31, False)])
def test_time_is_judged_by_the_density(block_sparse, cost, holds):
    costs = {name: Quartiles(cost, cost, cost) for name in block_sparse.PASSES}
    cheap = {name: Quartiles(0.5, 0.5, 0.5) for name in block_sparse.PASSES}
    points = [block_sparse.Point("random", 0.75, cheap), block_sparse.Point("butterfly", 0.25, costs)]
    for name in block_sparse.PASSES:
        assert block_sparse.proportional(points, name).holds is holds


def test_errors_under_a_mask_are_judged_against_standard_attentions(block_sparse):
    assert block_sparse.exact({"butterfly": (2e-6, 1e-6), "random": (1e-6, 1e-6)}).holds
    assert not block_sparse.exact({"butterfly": (2.6e-6, 1e-6), "random": (1e-6, 1e-6)}).holds


def test_the_masks_have_the_densities_they_say(block_sparse):
    found = block_sparse.masks(2048)
    for density in block_sparse.DENSITIES:
        assert found[f"random {density:.2f}"].density == density


@pytest.mark.slow
@pytest.mark.parametrize("name, claims, exact", [("hippo", 4, [1]), ("lssl", 5, [0, 1]), ("s4", 4, [0, 1])])
def test_state_space_reproductions_run(name, claims, exact, tmp_path):
    if name != "hippo":
        pytest.importorskip("sklearn")
    script = [sys.executable, str(REPRODUCTIONS / f"{name}.py"), "--quick", "--out", str(tmp_path)]
    run = subprocess.run(script, capture_output=True, text=True, check=False)
    verdicts = re.findall("PASS|FAIL", run.stdout)  # one epoch on digits and short contexts say little
    assert len(verdicts) == claims, run.stderr
    assert run.returncode == ("FAIL" in verdicts)
    assert all(verdicts[i] == "PASS" for i in exact)
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_digits_say_which_extra_they_need(digits, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(SystemExit, match=r"pip install 'onchip\[reproductions\]'"):
        digits.load()


def test_digits_are_split_once_and_for_all(digits):
    pytest.importorskip("sklearn")
    train, test = digits.load()
    assert train.x.shape == (1437, 64, 1) and test.x.shape == (360, 64, 1)
    assert train.x.min() == -1 and train.x.max() == 1 and set(test.y.tolist()) == set(range(10))
    assert (digits.load()[1].x == test.x).all()


def steps(s4, times, speedups):
    s4_times, attention = zip(*times, strict=True)
    return s4.Steps((1024, 131072), s4_times, attention, [Quartiles(x, x, x) for x in speedups])


@pytest.mark.parametrize(
    "times, speedups, holds",
    [([(1, 2), (1.2, 70)], [2, 60], True), ([(1, 2), (1, 50)], [2, 59], False), ([(1, 2), (3, 200)], [2, 67], False)],
)
def test_generation_is_judged_by_its_growth(s4, times, speedups, holds):
    assert s4.generation(steps(s4, times, speedups)).holds is holds


@pytest.mark.parametrize("learned, none, holds", [(0.97, 0.3, True), (0.85, 0.3, False), (0.97, 0.7, False)])
def test_digits_are_judged_next_to_no_memory(s4, lssl, learned, none, holds):
    assert s4.classification({"S4": [0.1, learned], "without memory": [none]}).holds is holds
    assert lssl.classification({"LSSL": [0.1, learned], "without memory": [none]}).holds is holds


@pytest.mark.parametrize("at_random, holds", [(0.7, True), (0.86, False)])
def test_a_random_matrix_is_judged_by_its_errors(lssl, at_random, holds):
    assert lssl.structure({"LSSL": [0.9], "random A": [at_random]}).holds is holds


def test_continuity_is_of_second_order(lssl):
    heard = {samples: lssl.response(samples) for samples in (128, 256, 512, 1024)}
    assert lssl.continuity(heard).holds
    assert not lssl.continuity(heard | {512: 1.01 * heard[512]}).holds


@pytest.mark.parametrize(
    "scales, holds",
    [({1: 0.08, 2: 0.04, 4: 0.02}, True), ({1: 0.08, 2: 0.07, 4: 0.02}, False), ({1: 0.8, 2: 0.4, 4: 0.2}, False)],
)
def test_equivariance_is_judged_by_convergence(hippo, scales, holds):
    assert hippo.equivariance(scales).holds is holds


@pytest.mark.parametrize("exponent, holds", [(-1, True), (-0.6, False), (-1.5, False)])
def test_gradients_are_judged_by_their_exponent(hippo, exponent, holds):
    t = torch.arange(1, 1001, dtype=torch.float64)
    assert hippo.gradients(t**exponent).holds is holds


def test_reconstruction_must_get_better_and_good(hippo):
    signal = torch.randn(50)
    for errors, holds in (
        ((0.5, 0.2, 0.1, 0.01), True),
        ((0.5, 0.2, 0.1, 0.05), False),
        ((0.1, 0.2, 0.1, 0.01), False),
    ):
        heard = {N: (1 + error) * signal for N, error in zip(hippo.ORDERS, errors, strict=True)}
        assert hippo.reconstruction(hippo.Memories(signal, signal, heard, signal)).holds is holds


@pytest.mark.slow
@pytest.mark.parametrize("name, exact", [("mamba", []), ("mamba2", [0])])
def test_selective_reproductions_run(name, exact, tmp_path):
    script = [sys.executable, str(REPRODUCTIONS / f"{name}.py"), "--quick", "--out", str(tmp_path)]
    run = subprocess.run(script, capture_output=True, text=True, check=False)
    verdicts = re.findall("PASS|FAIL", run.stdout)  # a few steps of training teach nothing
    assert len(verdicts) == 3, run.stderr
    assert run.returncode == ("FAIL" in verdicts)
    assert all(verdicts[i] == "PASS" for i in exact)
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_selective_copying_asks_for_the_tokens_in_order(synthetic):
    tokens, targets = synthetic.selective_copying(50, 20, 4, 6)
    assert tokens.shape == targets.shape == (50, 24)
    assert (tokens[:, 20:] == 1).all() and (targets[:, :20] == synthetic.NOT_ASKED).all()
    strewn = [row[row != 0] for row in tokens[:, :20]]
    assert all(row.equal(asked) for row, asked in zip(strewn, targets[:, 20:], strict=True))
    assert set(targets[:, 20:].unique().tolist()) == {2, 3, 4, 5}
    assert (tokens[:, :20] != 0).any(0).all()  # every place is taken in some row


def test_induction_heads_ask_for_what_followed(synthetic):
    tokens, targets = synthetic.induction_heads(200, 12, 5)
    special = tokens == 0
    assert special.sum(1).eq(2).all() and special[:, -1].all() and (targets[:, :-1] == synthetic.NOT_ASKED).all()
    places = special.int().argmax(1)
    assert targets[:, -1].equal(tokens[torch.arange(200), places + 1]) and targets[:, -1].min() == 1
    assert set(places.tolist()) == set(range(10))


def test_associative_recall_asks_each_key_once_for_its_value(synthetic):
    tokens, targets = synthetic.associative_recall(100, 20, 3, 16)
    for row, asked in zip(tokens.tolist(), targets.tolist(), strict=True):
        pairs = dict(zip(row[:6:2], row[1:6:2], strict=True))
        found = [(token, value) for token, value in zip(row, asked, strict=True) if value != synthetic.NOT_ASKED]
        assert len(pairs) == 3 and sorted(found) == sorted(pairs.items())
        assert max(pairs) < 8 <= min(pairs.values())
        assert sum(token < 8 for token in row) == 6


def test_powers_of_two_reach_both_ends(synthetic):
    assert {synthetic.power_of_two(8, 64) for _ in range(200)} == {8, 16, 32, 64}


def test_training_learns_what_is_asked_for(synthetic):
    def task(batch):
        tokens = torch.randint(4, (batch, 8))
        return synthetic.Batch(tokens, torch.where(torch.arange(8) < 6, synthetic.NOT_ASKED, (tokens + 1) % 4))

    model = synthetic.language_model({"mixer": "attention", "n_heads": 2}, vocab_size=4, d_model=16, depth=1)
    untrained, points = synthetic.accuracy(model, task(64)), synthetic.train(model, task, task(64), steps=60, lr=2e-2)
    assert [point.step for point in points] == [50, 60]
    assert untrained < 0.5 and points[-1].accuracy == synthetic.accuracy(model, task(64)) == 1


@pytest.mark.parametrize("ours, s4d, holds", [(0.99, 0.5, True), (0.94, 0.5, False), (0.99, 0.7, False)])
def test_copying_is_judged_at_the_end(mamba, synthetic, ours, s4d, holds):
    learned = {"Mamba": [synthetic.Point(1, 0.1), synthetic.Point(2, ours)], "S4D": [synthetic.Point(2, s4d)]}
    assert mamba.copying(learned).holds is holds


@pytest.mark.parametrize("ours, attention, holds", [(1.0, 0.1, True), (0.5, 0.1, False), (1.0, 0.9, False)])
def test_induction_is_judged_far_away(mamba, ours, attention, holds):
    right = {"Mamba": dict.fromkeys(mamba.MULTIPLES, 1.0), "attention": dict.fromkeys(mamba.MULTIPLES, attention)}
    right["attention"][1] = 1.0
    right["Mamba"][mamba.FAR] = ours
    assert mamba.induction(right).holds is holds
    right["attention"][1] = 0.5  # which has learnt nothing that it could forget
    assert not mamba.induction(right).holds


@pytest.mark.parametrize(
    "ours, attention, holds",
    [((3, 6, 12), (2, 8, 32), True), ((3, 9, 27), (2, 8, 32), False), ((3, 6, 12), (4, 8, 16), False),
     ((30, 60, 120), (2, 8, 32), False)],
)  # fmt: skip
def test_time_is_judged_by_its_growth(mamba, ours, attention, holds):
    assert mamba.growth([512, 1024, 2048], {"Mamba": ours, "attention": attention}).holds is holds


@pytest.mark.parametrize("error, holds", [(1e-13, True), (1e-9, False)])
def test_duality_is_exact(mamba2, error, holds):
    assert mamba2.duality(error).holds is holds


@pytest.mark.parametrize("small, large, holds", [(1.0, 2.1, True), (3.0, 1.9, False)])
def test_speed_is_judged_where_states_are_large(mamba2, small, large, holds):
    speedups = {of: {16: Quartiles(small, small, small), 64: Quartiles(3, 3, 3)} for of in mamba2.PASSES}
    speedups["forward"][128] = Quartiles(large, large, large)
    assert mamba2.speed(speedups).holds is holds


@pytest.mark.parametrize("best, holds", [(0.96, True), (0.9, False)])
def test_recall_is_judged_at_the_best_learning_rate(mamba2, synthetic, best, holds):
    ends = {1e-3: 0.3, 1e-2: best, 3e-2: 0.2}
    assert mamba2.recall({rate: [synthetic.Point(1, end)] for rate, end in ends.items()}).holds is holds
