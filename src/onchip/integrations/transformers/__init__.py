"""onchip behind transformers: `attn_implementation="onchip"`, and state space models."""

__all__ = ["NAME", "register"]

NAME = "onchip"
"""What `attn_implementation` is called."""


def register() -> None:
    """Make `attn_implementation="onchip"` known to transformers, and serve its state space models; again does no harm.

    `AutoModel.from_pretrained(path, attn_implementation="onchip")`, or `model.set_attn_implementation("onchip")`,
    runs every attention layer through `onchip.attention`, for training and for generation: causal and bidirectional,
    grouped queries, padding on either side, dynamic, static and sliding caches, sliding windows, softcap, sinks, packed
    sequences (by `position_ids` that restart, or by `cu_seq_lens_q` and `cu_seq_lens_k`; in time linear in their
    number), masks of the caller's own, and dropout on the probabilities, whose seed is drawn from PyTorch's default
    generator. A row that sees no key, as in left padding, gives zeros (in eager attention a mean of what is hidden).

    State space models need no more than this call, before or after the import of their modeling files: Mamba, Mamba-2,
    FalconMamba, Jamba, Bamba, Zamba, Zamba2 and whatever uses the same hooks run their convolutions, scans and steps
    through onchip, in training too. Prompts that Mamba-1's mixers read in chunks continue from the cache's state, which
    transformers loses. Packed rows (`seq_idx`) are kept apart by Mamba-2's mixers, and refused by Mamba-1's.

    Raises:
        ImportError: transformers is not installed, or is older than 5.

    Warns where transformers is older than 5.15, which has no hook for state space models.

    What a model asks of its attention and is not here raises ValueError when the layer is called: returned
    probabilities, relative position biases, paged caches.

    Cost: 5 to 16 µs a call beyond `onchip.attention` (`onchip bench transformers --suite glue`, the best and the median
    of a run), more where keys of a static cache are cut off, and one look at the padding a forward pass.

    >>> import pytest
    >>> transformers = pytest.importorskip("transformers")
    >>> register()
    >>> "onchip" in transformers.AttentionInterface()
    True
    """
    try:
        from onchip.integrations.transformers import attention, state_space
    except ImportError as error:
        raise ImportError(
            "onchip.integrations.transformers needs transformers 5 (pip install 'transformers>=5')"
        ) from error
    attention.register()
    state_space.register()
