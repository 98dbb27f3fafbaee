"""`import flash_attn` finds onchip after `install`, as far as clients look, and nothing is left after `uninstall`."""

import importlib.metadata
import importlib.util
import inspect
import subprocess
import sys

import pytest

from onchip.integrations import flash_attn
from onchip.integrations.flash_attn import flash_attn_interface, hopper


@pytest.fixture(autouse=True)
def nothing_stays():
    before = dict(sys.modules), list(sys.meta_path)
    yield
    flash_attn.uninstall()
    assert list(sys.meta_path) == before[1]
    assert not [name for name in sys.modules if name.startswith("flash_attn") and name not in before[0]]


def test_import_finds_onchip():
    flash_attn.install()
    import flash_attn as found
    from flash_attn import flash_attn_func
    from flash_attn.bert_padding import index_first_axis, pad_input, unpad_input
    from flash_attn.flash_attn_interface import flash_attn_varlen_func

    assert flash_attn_func is flash_attn.flash_attn_func
    assert flash_attn_varlen_func is flash_attn.flash_attn_varlen_func
    assert {f.__module__ for f in (index_first_axis, pad_input, unpad_input)} == {
        "onchip.integrations.flash_attn.bert_padding"
    }
    assert not hasattr(found, "install")
    with pytest.raises(ModuleNotFoundError, match="flash_attn_interface"):
        importlib.import_module("flash_attn_interface")
    with pytest.raises(ModuleNotFoundError, match=r"flash_attn\.layers"):
        importlib.import_module("flash_attn.layers")


def test_what_transformers_asks():
    """Its checks of flash-attn, the GPU left out: spec, distribution, version, and a window_size by inspection."""
    flash_attn.install(hopper=True)
    for package, distribution, least in (
        ("flash_attn", "flash-attn", (2, 3, 3)),
        ("flash_attn_interface", "flash-attn-3", (3,)),
    ):
        assert importlib.util.find_spec(package) is not None
        assert importlib.metadata.packages_distributions()[package] == [distribution]
        for name in (distribution, distribution.replace("-", "_")):
            assert tuple(map(int, importlib.metadata.version(name).split("."))) >= least
        module = importlib.import_module(package)
        assert importlib.util.find_spec(package).name == package == module.__name__
        assert "window_size" in inspect.signature(module.flash_attn_func).parameters
    assert importlib.import_module("flash_attn").__version__ == importlib.metadata.version("flash_attn")


def test_uninstall_leaves_nothing():
    flash_attn.install()
    importlib.import_module("flash_attn.bert_padding")
    flash_attn.install(hopper=True)
    flash_attn.uninstall()
    flash_attn.uninstall()
    assert importlib.util.find_spec("flash_attn") is None
    assert "flash_attn" not in importlib.metadata.packages_distributions()
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("flash_attn")


def test_a_real_one_stays_unless_told_otherwise(tmp_path, monkeypatch):
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "__init__.py").write_text("real = True\n")
    (tmp_path / "flash_attn" / "layers.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RuntimeError, match=r"flash_attn is already installed: install\(replace=True\)"):
        flash_attn.install()
    real = importlib.import_module("flash_attn")
    importlib.import_module("flash_attn.layers")
    with pytest.raises(RuntimeError, match="already installed"):
        flash_attn.install()
    flash_attn.install(replace=True)
    assert importlib.import_module("flash_attn").flash_attn_func is flash_attn.flash_attn_func
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("flash_attn.layers")
    flash_attn.uninstall()
    assert importlib.import_module("flash_attn") is real
    for name in ("flash_attn", "flash_attn.layers"):
        del sys.modules[name]


def test_onchip_does_not_load_the_drop_ins():
    code = "import sys, onchip; onchip.attention; print([m for m in sys.modules if 'integrations' in m])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


FA2 = {
    "flash_attn_func": "q k v dropout_p=0.0 softmax_scale=None causal=False window_size=(-1, -1) softcap=0.0 "
    "alibi_slopes=None deterministic=False return_attn_probs=False",
    "flash_attn_kvpacked_func": "q kv dropout_p=0.0 softmax_scale=None causal=False window_size=(-1, -1) softcap=0.0 "
    "alibi_slopes=None deterministic=False return_attn_probs=False",
    "flash_attn_qkvpacked_func": "qkv dropout_p=0.0 softmax_scale=None causal=False window_size=(-1, -1) softcap=0.0 "
    "alibi_slopes=None deterministic=False return_attn_probs=False",
    "flash_attn_varlen_func": "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k dropout_p=0.0 "
    "softmax_scale=None causal=False window_size=(-1, -1) softcap=0.0 alibi_slopes=None deterministic=False "
    "return_attn_probs=False block_table=None",
    "flash_attn_varlen_kvpacked_func": "q kv cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k dropout_p=0.0 "
    "softmax_scale=None causal=False window_size=(-1, -1) softcap=0.0 alibi_slopes=None deterministic=False "
    "return_attn_probs=False",
    "flash_attn_varlen_qkvpacked_func": "qkv cu_seqlens max_seqlen dropout_p=0.0 softmax_scale=None causal=False "
    "window_size=(-1, -1) softcap=0.0 alibi_slopes=None deterministic=False return_attn_probs=False",
    "flash_attn_with_kvcache": "q k_cache v_cache k=None v=None rotary_cos=None rotary_sin=None cache_seqlens=None "
    "cache_batch_idx=None cache_leftpad=None block_table=None softmax_scale=None causal=False window_size=(-1, -1) "
    "softcap=0.0 rotary_interleaved=True alibi_slopes=None num_splits=0 return_softmax_lse=False",
}
FA3 = {
    "flash_attn_func": "q k v softmax_scale=None causal=False qv=None q_descale=None k_descale=None v_descale=None "
    "window_size=(-1, -1) attention_chunk=0 softcap=0.0 num_splits=1 pack_gqa=None deterministic=False sm_margin=0 "
    "return_attn_probs=False",
    "flash_attn_qkvpacked_func": "qkv softmax_scale=None causal=False q_descale=None k_descale=None v_descale=None "
    "window_size=(-1, -1) attention_chunk=0 softcap=0.0 deterministic=False num_heads_q=None sm_margin=0 "
    "return_attn_probs=False",
    "flash_attn_varlen_func": "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k seqused_q=None "
    "seqused_k=None softmax_scale=None causal=False qv=None q_descale=None k_descale=None v_descale=None "
    "window_size=(-1, -1) attention_chunk=0 softcap=0.0 num_splits=1 pack_gqa=None deterministic=False sm_margin=0 "
    "return_attn_probs=False",
    "flash_attn_with_kvcache": "q k_cache v_cache k=None v=None qv=None rotary_cos=None rotary_sin=None "
    "cache_seqlens=None cache_batch_idx=None cache_leftpad=None page_table=None cu_seqlens_q=None "
    "cu_seqlens_k_new=None max_seqlen_q=None rotary_seqlens=None q_descale=None k_descale=None v_descale=None "
    "softmax_scale=None causal=False window_size=(-1, -1) attention_chunk=0 softcap=0.0 rotary_interleaved=True "
    "scheduler_metadata=None num_splits=0 pack_gqa=None sm_margin=0 return_softmax_lse=False",
    "flash_attn_combine": "out_partial lse_partial out=None out_dtype=None",
    "get_scheduler_metadata": "batch_size max_seqlen_q max_seqlen_k num_heads_q num_heads_kv headdim cache_seqlens "
    "qkv_dtype=torch.bfloat16 headdim_v=None cu_seqlens_q=None cu_seqlens_k_new=None cache_leftpad=None page_size=None "
    "max_seqlen_k_new=0 causal=False window_size=(-1, -1) attention_chunk=0 has_softcap=False num_splits=0 "
    "pack_gqa=None sm_margin=0",
}


@pytest.mark.parametrize(
    "function, published",
    [
        (getattr(module, name), text)
        for module, table in ((flash_attn_interface, FA2), (hopper, FA3))
        for name, text in table.items()
    ],
    ids=lambda x: f"{x.__module__.rpartition('.')[2]}.{x.__name__}" if callable(x) else "",
)
def test_signature_is_the_published_one(function, published):
    parameters = inspect.signature(function).parameters.values()
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)
    shown = [p.name if p.default is p.empty else f"{p.name}={p.default}" for p in parameters]
    assert " ".join(shown) == published
