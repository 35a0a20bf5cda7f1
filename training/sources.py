"""Python sources at hand, as text for training and for measuring: the installed standard library
and packages.

A sixteenth of the standard library's files, chosen by name, is held out: the same files on every
machine with the same Python.
"""

import argparse
import random
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

HELD_OUT_SHARE = 16
MAX_FILE_BYTES = 300_000  # longer ones are mostly tables
CHUNK_FILES = 512


def standard_library() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def is_held_out(name: str) -> bool:
    """Whether a file of the standard library, by its path inside it, is kept from training."""
    return zlib.crc32(name.encode()) % HELD_OUT_SHARE == 0


def held_out_files() -> list[Path]:
    return [path for path in _library_files() if _name_is_held_out(path)]


def training_files(seed: int) -> list[Path]:
    """Every other source file, in random order."""
    files = [path for path in _library_files() if not _name_is_held_out(path)]
    for folder in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        files += sorted(Path(folder).rglob("*.py"))
    random.Random(seed).shuffle(files)
    return files


def texts(files: list[Path], max_bytes: int) -> Iterator[str]:
    """The files' texts, until they reach a size."""
    total = 0
    for path in files:
        if total >= max_bytes:
            return
        if path.is_file() and 0 < path.stat().st_size <= MAX_FILE_BYTES:
            text = path.read_text(encoding="utf-8", errors="ignore")
            total += len(text)
            yield text


def encode(tokenizer: Tokenizer, files: list[Path], max_bytes: int) -> Tensor:
    """The texts as one stream of tokens, `[num_tokens]` int32."""
    pieces: list[np.ndarray] = []
    chunk: list[str] = []

    def flush() -> None:
        encoded = tokenizer.encode_batch_fast(chunk, add_special_tokens=False)
        pieces.extend(np.array(encoding.ids, dtype=np.int32) for encoding in encoded)
        chunk.clear()

    for text in texts(files, max_bytes):
        chunk.append(text)
        if len(chunk) == CHUNK_FILES:
            flush()
    flush()
    return torch.from_numpy(np.concatenate(pieces))


def _library_files() -> list[Path]:
    root = standard_library()
    outside = ("site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3")
    return sorted(
        path
        for path in root.rglob("*.py")
        if not set(outside) & set(path.relative_to(root).parts[:-1])
    )


def _name_is_held_out(path: Path) -> bool:
    return is_held_out(path.relative_to(standard_library()).as_posix())


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the held-out sources as one text file.")
    parser.add_argument("file", type=Path)
    args = parser.parse_args()
    args.file.write_text("\n".join(texts(held_out_files(), max_bytes=2**62)), encoding="utf-8")


if __name__ == "__main__":
    main()
