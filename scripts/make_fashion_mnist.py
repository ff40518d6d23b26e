"""Make the embedded subset of Fashion-MNIST from Debian's package ``dataset-fashion-mnist``.

    apt-get install dataset-fashion-mnist
    python scripts/make_fashion_mnist.py /usr/share/datasets/fashion-mnist nasplat/data

Writes ``fashion_mnist_6k.npz`` (the first 500 training and the first 100 test images of each class, in the order of
the original files) and the licence notice beside it. The same input gives the same arrays.
"""

from __future__ import annotations

import argparse
import gzip
from pathlib import Path

import numpy as np

CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
    "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
PER_CLASS = {"train": 500, "test": 100}
FILES = {"train": "train", "test": "t10k"}
NOTICE = """Fashion-MNIST (https://github.com/zalandoresearch/fashion-mnist)

The MIT License (MIT)

Copyright (c) 2017 Zalando SE, https://tech.zalando.com

Permission is hereby granted, free of charge, to any person obtaining a copy
of this software and associated documentation files (the "Software"), to deal
in the Software without restriction, including without limitation the rights
to use, copy, modify, merge, publish, distribute, sublicense, and/or sell
copies of the Software, and to permit persons to whom the Software is
furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all
copies or substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR
IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY,
FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE
AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER
LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM,
OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE
SOFTWARE.

fashion_mnist_6k.npz holds a class-balanced subset (5,000 training and 1,000
test images) made by scripts/make_fashion_mnist.py.
"""


def read_idx(path: Path) -> np.ndarray:
    """Read one gzipped idx file of unsigned bytes: images ``(n, h, w)`` or labels ``(n,)``."""
    raw = gzip.decompress(path.read_bytes())
    dimensions = raw[3]
    shape = np.frombuffer(raw, dtype=">u4", count=dimensions, offset=4).astype(int)
    return np.frombuffer(raw, dtype=np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def main() -> None:
    """Write the subset and the notice."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder with the idx files")
    parser.add_argument("target", type=Path, help="folder to write to")
    arguments = parser.parse_args()
    arrays: dict[str, np.ndarray] = {"classes": np.array(CLASSES)}
    for split, prefix in FILES.items():
        images = read_idx(arguments.source / f"{prefix}-images-idx3-ubyte.gz")
        labels = read_idx(arguments.source / f"{prefix}-labels-idx1-ubyte.gz")
        rows = np.sort(np.concatenate([np.flatnonzero(labels == c)[: PER_CLASS[split]] for c in range(10)]))
        arrays[f"x_{split}"], arrays[f"y_{split}"] = images[rows], labels[rows]
    path = arguments.target / "fashion_mnist_6k.npz"
    np.savez_compressed(path, **arrays)
    (arguments.target / "fashion_mnist_6k.LICENSE").write_text(NOTICE)
    print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
