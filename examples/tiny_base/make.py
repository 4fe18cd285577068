"""Make the tiny base model: a Qwen2-architecture chat model, trained from nothing.

    python examples/tiny_base/make.py --output-dir .cache/tiny-base

No download. A byte-level BPE tokenizer is learned from the sentences of
`corpus.py`, then a model of some three million parameters learns to answer
each question word for word. It takes under three minutes on two cores and is
deterministic for a given seed, torch version and number of threads.

The result is an ordinary Hugging Face folder. It is written beside its final
place and renamed, so a folder that exists is complete.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent))

import corpus  # the sibling file; this recipe is a script, not a package

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

END_OF_TURN = "<|im_end|>"
PADDING = "<|endoftext|>"
SPECIAL_TOKENS = [PADDING, "<|im_start|>", END_OF_TURN]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NUM_THREADS = 2  # sums depend on how they are split over threads, so the number is part of the recipe
VOCAB_SIZE = 1536
MIN_EXACT_SHARE = 0.95


def make_tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    rows = corpus.questions_and_answers()
    tokenizer.train_from_iterator(
        [text for row in rows.items() for text in row],
        trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE,
            special_tokens=SPECIAL_TOKENS,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TURN,
        pad_token=PADDING,
        additional_special_tokens=SPECIAL_TOKENS[1:2],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen2ForCausalLM:
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen2ForCausalLM(config)


def encode(tokenizer: PreTrainedTokenizerFast) -> list[tuple[list[int], int]]:
    """Each row as (token ids of prompt and answer, length of the prompt)."""
    rows = []
    for question, answer in corpus.questions_and_answers().items():
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}],
            add_generation_prompt=True,
            return_dict=False,
        )
        rows.append((prompt + tokenizer(answer + END_OF_TURN)["input_ids"], len(prompt)))
    return rows


def collate(rows: list[tuple[list[int], int]], pad: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids, attention mask and labels, each (rows, longest); the prompt carries no loss."""
    import torch

    longest = max(len(ids) for ids, _ in rows)
    ids = torch.full((len(rows), longest), pad)
    mask = torch.zeros((len(rows), longest), dtype=torch.long)
    labels = torch.full((len(rows), longest), -100)
    for i, (row, prompt_length) in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
        labels[i, prompt_length : len(row)] = torch.tensor(row[prompt_length:])
    return ids, mask, labels


def train(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, epochs: int) -> None:
    import torch
    from tqdm import tqdm

    rows = encode(tokenizer)
    batch_size = 32
    steps_per_epoch = -(-len(rows) // batch_size)
    total = epochs * steps_per_epoch
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=total, pct_start=0.1)
    model.train()
    every_s = 0.1 if sys.stderr.isatty() else 10.0  # a log file gets few lines
    with tqdm(total=total, desc="tiny base", unit="step", mininterval=every_s) as bar:
        for _ in range(epochs):
            order = torch.randperm(len(rows)).tolist()
            for start in range(0, len(rows), batch_size):
                chosen = [rows[i] for i in order[start : start + batch_size]]
                ids, mask, labels = collate(chosen, tokenizer.pad_token_id)
                loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad(set_to_none=True)
                bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
                bar.update()


def exact_answers(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast) -> dict[str, bool]:
    """Ask every training question; whether the greedy answer is exact, question by question."""
    import torch

    rows = corpus.questions_and_answers()
    tokenizer.padding_side = "left"
    batch = tokenizer.apply_chat_template(
        [[{"role": "user", "content": question}] for question in rows],
        add_generation_prompt=True,
        padding=True,
        return_dict=True,
        return_tensors="pt",
    )
    model.eval()
    with torch.inference_mode():
        out = model.generate(**batch, max_new_tokens=48, do_sample=False)
    answers = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return {q: got == want for (q, want), got in zip(rows.items(), answers, strict=True)}


def save(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, report: dict[str, object], to: Path
) -> None:
    staging = to.with_name(f".{to.name}.{os.getpid()}.partial")
    try:
        model.save_pretrained(staging)
        tokenizer.padding_side = "right"
        tokenizer.save_pretrained(staging)
        (staging / "recipe.json").write_text(json.dumps(report, indent=2) + "\n")
        if to.exists():  # an older one of ours
            shutil.rmtree(to)
        staging.rename(to)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def recipe_digest(seed: int, epochs: int) -> str:
    """Digest of everything that the result depends on and that stands here."""
    digest = hashlib.sha256(f"{seed} {epochs}".encode())
    for path in (Path(__file__), Path(corpus.__file__)):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def made_by(folder: Path) -> str | None:
    """The digest of the recipe that made `folder`; None if it was none of ours."""
    try:
        made: str | None = json.loads((folder / "recipe.json").read_text()).get("recipe")
    except (OSError, ValueError, AttributeError):
        return None
    return made


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=60)
    args = parser.parse_args(argv)
    recipe = recipe_digest(args.seed, args.epochs)
    if args.output_dir.exists():
        if made_by(args.output_dir) == recipe:
            print(f"tiny base: {args.output_dir} is there already, nothing to do", file=sys.stderr)
            return 0
        if made_by(args.output_dir) is None:
            print(f"tiny base: {args.output_dir} was not made by this recipe, left alone", file=sys.stderr)
            return 2
        print("tiny base: the recipe has changed, making it anew", file=sys.stderr)

    import torch

    started = time.monotonic()
    torch.set_num_threads(NUM_THREADS)
    torch.use_deterministic_algorithms(True)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, args.seed)
    train(model, tokenizer, args.epochs)
    model = model.to(torch.bfloat16)  # what is examined is what is saved and served
    exact = exact_answers(model, tokenizer)
    share = sum(exact.values()) / len(exact)
    report: dict[str, object] = {
        "recipe": recipe,
        "seed": args.seed,
        "epochs": args.epochs,
        "questions": len(exact),
        "exact_share": round(share, 4),
        "parameters": sum(p.numel() for p in model.parameters()),
        "torch": torch.__version__,
    }
    print(
        f"tiny base: {report['parameters']:,} parameters, {sum(exact.values())} of {len(exact)} "
        f"answers exact, {time.monotonic() - started:.0f} s",
        file=sys.stderr,
    )
    if share < MIN_EXACT_SHARE:
        wrong = [question for question, right in exact.items() if not right]
        print(f"tiny base: below {MIN_EXACT_SHARE:.0%}, not saved. Wrong: {wrong}", file=sys.stderr)
        return 1
    args.output_dir.parent.mkdir(parents=True, exist_ok=True)
    save(model, tokenizer, report, args.output_dir)
    return 0


if __name__ == "__main__":
    sys.exit(main())
