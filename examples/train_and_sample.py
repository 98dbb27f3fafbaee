"""Train a small hybrid language model from Python, and let it write.

python examples/train_and_sample.py [STEPS]
"""

import sys
import tempfile
from pathlib import Path

from onchip.data import ByteTokenizer, Corpus
from onchip.generation import generate
from onchip.models import ModelConfig, load_model
from onchip.training import RunFolder, TrainConfig, Trainer


def main(steps: int = 200) -> None:
    model = ModelConfig(
        vocab_size=ByteTokenizer.vocab_size,
        d_model=64,
        layers=[
            {"mixer": "attention", "n_heads": 4, "window": [31, 0]},  # each layer names its mixer and its arguments
            {"mixer": "attention", "n_heads": 4, "n_kv_heads": 1},
        ],
        d_mlp=192,
    )
    config = TrainConfig(
        model=model, steps=steps, batch=8, context=128, lr=5e-3, warmup=min(20, steps), evaluate_every=steps,
        evaluate_windows=16, checkpoint_every=steps,
    )  # fmt: skip
    corpus = Corpus.read()  # the Python standard library; or files, folders and globs of your own
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(config, corpus, RunFolder(Path(folder)))
        before = trainer.evaluate(windows=16)
        trainer.train()
        print(f"{before:.2f} bits per byte before, {trainer.evaluate(windows=16):.2f} after {steps} steps")
        trained = load_model(folder)
    for completion in generate(trained, ["def ", "import "], max_new_tokens=60, temperature=0.8, seed=1):
        print(repr(completion.text))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
