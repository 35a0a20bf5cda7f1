"""Small decoders that read images: a vision tower in front of a family of tests/families.py."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    CLIPImageProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from engines import VOCABULARY
from families import FAMILIES

IMAGE_PIXELS = 28
PATCH_PIXELS = 7
FIRST_WORD = 16
"""Token ids below it are for special tokens."""

TOWER = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 1,
    "image_size": IMAGE_PIXELS,
    "patch_size": PATCH_PIXELS,
}


def write_gemma_3(folder: Path) -> str:
    """For text alone: it has no processor and no tokenizer."""
    vision = {"model_type": "siglip_vision_model", **TOWER}
    return _write(
        folder, "Gemma3ForConditionalGeneration", "gemma3", "Gemma 3", vision_config=vision
    )


def write_paligemma(folder: Path) -> str:
    """For text alone, as `write_gemma_3`."""
    return _write(
        folder,
        "PaliGemmaForConditionalGeneration",
        "paligemma",
        "Gemma",
        vision_config={"model_type": "siglip_vision_model", **TOWER},
        projection_dim=FAMILIES["Gemma"].config["hidden_size"],
    )


def write_llava(folder: Path) -> str:
    tokenizer = _tokenizer(image_token="<image>")
    square = {"height": IMAGE_PIXELS, "width": IMAGE_PIXELS}
    LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": IMAGE_PIXELS}, crop_size=square),
        tokenizer,
        patch_size=PATCH_PIXELS,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
    return _write(
        folder,
        "LlavaForConditionalGeneration",
        "llava",
        "Llama 3",
        vision_config={"model_type": "clip_vision_model", "projection_dim": 64, **TOWER},
        image_token_index=tokenizer.image_token_id,
        image_seq_length=(IMAGE_PIXELS // PATCH_PIXELS) ** 2,
    )


def write_qwen2_5_vl(folder: Path) -> str:
    """Its positions have three parts: time, height and width of an image's patch."""
    tokenizer = _tokenizer(
        image_token="<image>",
        video_token="<video>",
        vision_bos_token="<vision>",
        vision_eos_token="</vision>",
    )
    sizes = {
        "patch_size": PATCH_PIXELS,
        "merge_size": 2,
        "size": {"shortest_edge": IMAGE_PIXELS**2, "longest_edge": 4 * IMAGE_PIXELS**2},
    }
    Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(**sizes), tokenizer, Qwen2VLVideoProcessor(**sizes)
    ).save_pretrained(folder)
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 12, 12]}
    return _write(
        folder,
        "Qwen2_5_VLForConditionalGeneration",
        "qwen2_5_vl",
        "Qwen2",
        text={"model_type": "qwen2_5_vl_text", "rope_parameters": rope},
        vision_config={
            "hidden_size": 64,
            "intermediate_size": 64,
            "depth": 2,
            "num_heads": 1,
            "patch_size": PATCH_PIXELS,
            "window_size": IMAGE_PIXELS,
            "fullatt_block_indexes": [1],
            "out_hidden_size": FAMILIES["Qwen2"].config["hidden_size"],
        },
        image_token_id=tokenizer.image_token_id,
        video_token_id=tokenizer.video_token_id,
        vision_start_token_id=tokenizer.vision_bos_token_id,
        vision_end_token_id=tokenizer.vision_eos_token_id,
    )


NOT_CAUSAL: dict[str, tuple[Callable[[Path], str], str]] = {
    "Gemma 3": (write_gemma_3, "Gemma 3"),
    "PaliGemma": (write_paligemma, "Gemma"),
}
"""What writes a model whose image tokens attend to later ones, and its decoder's family."""

CAUSAL: dict[str, tuple[Callable[[Path], str], str]] = {
    "LLaVA": (write_llava, "<image>"),
    "Qwen2.5-VL": (write_qwen2_5_vl, "<vision> <image> </vision>"),
}
"""What writes a model, and what stands for an image in its prompts."""


def as_text(token_ids: Sequence[int]) -> str:
    """Words, one per token id; special tokens become other words."""
    return " ".join(f"w{max(token_id, FIRST_WORD)}" for token_id in token_ids)


def _tokenizer(**specials: str) -> PreTrainedTokenizerFast:
    """One token per word, and special tokens that processors ask for by name."""
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    vocabulary = {text: token_id for token_id, text in enumerate((names | specials).values())}
    vocabulary |= {f"w{token_id}": token_id for token_id in range(FIRST_WORD, VOCABULARY)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, extra_special_tokens=specials, **names
    )


def _write(
    folder: Path,
    architecture: str,
    model_type: str,
    family: str,
    text: dict[str, Any] | None = None,
    **values: Any,
) -> str:
    """Write a configuration whose decoder is a family's, with `text` on top."""
    config = {
        "architectures": [architecture],
        "model_type": model_type,
        "text_config": FAMILIES[family].config | (text or {}),
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        **values,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)
