"""A base that is right in form and random in weights, for runs that need no sense."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from tests.conftest import BASE_CONFIG


@pytest.fixture(scope="module")
def random_base(tmp_path_factory: pytest.TempPathFactory, recipe: ModuleType) -> str:
    """A smaller sister of the tiny base, never trained."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("random") / "base"
    tokenizer = recipe.make_tokenizer()
    torch.manual_seed(0)
    sizes = {**BASE_CONFIG, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    Qwen2ForCausalLM(Qwen2Config(**sizes, tie_word_embeddings=True)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
