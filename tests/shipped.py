"""A small random model with the tokenizer of the demonstration model, in a folder."""

import shutil
from pathlib import Path

import torch
from transformers import MambaConfig, MambaForCausalLM

EXAMPLES = Path(__file__).parents[1] / "examples"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def save_small_model(folder: Path, *, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Two layers, 4,096 tokens; returns the folder."""
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=4096, hidden_size=24, num_hidden_layers=2, state_size=4, tie_word_embeddings=True)
    MambaForCausalLM(config).to(dtype).save_pretrained(folder)
    for name in TOKENIZER_FILES:
        shutil.copy(EXAMPLES / "mamba-books" / name, folder)
    return folder


def text_of(characters: int, *, start: int = 0) -> str:
    """A piece of the evaluation text."""
    return (EXAMPLES / "texts" / "evaluation.txt").read_text(encoding="utf-8")[start : start + characters]
