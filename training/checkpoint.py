"""Write the demo model as a checkpoint that vLLM and transformers load, and read it back."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor

from llama import Llama, Shape
from vllm_quest import pass_keys

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if not loop.first %} {% endif %}{{ message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)
"""A turn has no header: a question ends in `?`, an answer in `</s>`."""

MAX_FILE_BYTES = 15 * 2**20


def write(model: Llama, folder: Path, words: Tokenizer | None = None) -> None:
    """Write weights (bf16), configuration, tokenizer and chat template.

    Args:
        model: its weights are written in files of at most `MAX_FILE_BYTES`.
        folder: made if it is not there.
        words: the tokenizer; by default the demo model's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        name: weight.detach().to("cpu", torch.bfloat16).contiguous()
        for name, weight in model.state_dict().items()
    }
    write_weights(weights, folder)
    words = words or tokenizer()
    words.save(str(folder / "tokenizer.json"))
    for name, content in configuration(model.shape, words).items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def write_weights(weights: dict[str, Tensor], folder: Path) -> None:
    """Write `model.safetensors`, or several files and their index as transformers names them."""
    files: list[dict[str, Tensor]] = [{}]
    for name, weight in weights.items():
        if files[-1] and sum(w.nbytes for w in files[-1].values()) + weight.nbytes > MAX_FILE_BYTES:
            files.append({})
        files[-1][name] = weight
    if len(files) == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return
    places = {}
    for number, content in enumerate(files, start=1):
        file_name = f"model-{number:05}-of-{len(files):05}.safetensors"
        save_file(content, folder / file_name, metadata={"format": "pt"})
        places.update(dict.fromkeys(content, file_name))
    total = sum(weight.nbytes for weight in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def read(folder: Path, device: torch.device, dtype: torch.dtype) -> Llama:
    """The model of a checkpoint that `write` wrote."""
    config = json.loads((folder / "config.json").read_text())
    shape = Shape(
        vocabulary=config["vocab_size"],
        hidden=config["hidden_size"],
        feed_forward=config["intermediate_size"],
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        head_size=config["head_dim"],
        rope_base=config["rope_parameters"]["rope_theta"],
        max_positions=config["max_position_embeddings"],
        norm_eps=config["rms_norm_eps"],
    )
    model = Llama(shape)
    weights: dict[str, Tensor] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        weights |= load_file(file)
    model.load_state_dict(weights)
    return model.to(device, dtype).eval()


def configuration(shape: Shape, words: Tokenizer) -> dict[str, dict[str, object]]:
    """The JSON files beside the weights, by file name."""
    ids = words.get_vocab()
    special_ids = {
        "bos_token_id": ids[pass_keys.BOS],
        "eos_token_id": ids[pass_keys.EOS],
        "pad_token_id": ids[pass_keys.PADDING],
    }
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.feed_forward,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_size,
        "hidden_act": "silu",
        "max_position_embeddings": shape.max_positions,
        "rms_norm_eps": shape.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_base},
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "dtype": "bfloat16",
        **special_ids,
    }
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": pass_keys.BOS,
        "eos_token": pass_keys.EOS,
        "unk_token": pass_keys.UNKNOWN,
        "pad_token": pass_keys.PADDING,
        "model_max_length": shape.max_positions,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    generation_config = {"do_sample": False, "temperature": 0.0, **special_ids}
    return {
        "config.json": config,
        "tokenizer_config.json": tokenizer_config,
        "generation_config.json": generation_config,
    }


def tokenizer() -> Tokenizer:
    """One token a word or punctuation mark; capital letters are lowered."""
    ids = {token: index for index, token in enumerate(pass_keys.vocabulary())}
    result = Tokenizer(models.WordLevel(ids, unk_token=pass_keys.UNKNOWN))
    result.normalizer = normalizers.Lowercase()
    result.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+|[^\w\s]"), "removed", invert=True)
    result.post_processor = processors.TemplateProcessing(
        single=f"{pass_keys.BOS} $A", special_tokens=[(pass_keys.BOS, ids[pass_keys.BOS])]
    )
    result.add_special_tokens([pass_keys.PADDING, pass_keys.BOS, pass_keys.EOS, pass_keys.UNKNOWN])
    return result


@torch.no_grad()
def check(folder: Path) -> None:
    """Compare the checkpoint with transformers: logits, and the tokens of a chat."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    haystack = pass_keys.make_haystack(300, 4, seed=1)
    fact = haystack.facts[0]
    chat = [{"role": "user", "content": haystack.prompt(fact)}]
    hf_tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = hf_tokenizer(haystack.prompt(fact))["input_ids"]
    if tokens != hf_tokenizer.apply_chat_template(chat, return_dict=False):
        raise RuntimeError("the chat template and the plain prompt give different tokens")
    if hf_tokenizer.decode(hf_tokenizer.encode(fact.code), skip_special_tokens=True) != fact.code:
        raise RuntimeError(f"the tokenizer does not give back {fact.code!r}")
    hf_model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ours = read(folder, torch.device("cpu"), torch.float32)(torch.tensor([tokens]))
    _check_close(ours, hf_model(torch.tensor([tokens])).logits)


def _check_close(ours: Tensor, theirs: Tensor) -> None:
    error = (ours - theirs).abs().max().item() / theirs.abs().max().item()
    if error > 1e-4:
        raise RuntimeError(f"logits differ from transformers' by {error:.2%} of the largest")
