"""Write what transformers says with real models: `python -m tests.real.make_expected FOLDER`.

FOLDER has the GGUF files that `PROMPTS` names. transformers computes with the weights that it dequantises from them.
"""

import json
import sys
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("expected.json")
NEW = 24
# file -> whether prompts go into its chat template, prompts
PROMPTS = {
    "SmolLM2-135M-Instruct.Q4_1.gguf": (
        True,
        [
            "What is the capital of France?",
            "Write a haiku about the sea.",
            "What is photosynthesis?",
            "List three fruits that are red.",
            "def fibonacci(n): finish this Python function.",
        ],
    ),
    "gemma-3-270m-q4_k_m.gguf": (
        False,
        [
            "The capital of France is",
            "Once upon a time, in a village by the sea,",
            "The three primary colours are",
            "def fibonacci(n):\n    ",
            "Dear Sir or Madam,\n\nI am writing to",
        ],
    ),
}


def main(folder: str) -> None:
    """Write the prompts' tokens and the greedy ones after them."""
    found = {name: said(folder, name, chat, prompts) for name, (chat, prompts) in PROMPTS.items()}
    FILE.write_text(json.dumps(found) + "\n")


def said(folder: str, name: str, chat: bool, prompts: list[str]) -> list[dict[str, Any]]:
    """What a model says to each prompt."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, found = AutoTokenizer.from_pretrained(folder, gguf_file=name), []
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32).eval()
    for prompt in prompts:
        messages = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) if chat else prompt
        ids = tokenizer(text, add_special_tokens=not chat, return_tensors="pt")["input_ids"]
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            output_logits=True,
            return_dict_in_generate=True,
        )
        best = [logits[0].topk(2).values for logits in out.logits]
        print(name, repr(prompt), "the closest runner-up is", min(float(two[0] - two[1]) for two in best), "behind")
        found.append({"prompt": prompt, "ids": ids[0].tolist(), "tokens": out.sequences[0, ids.shape[1] :].tolist()})
    return found


if __name__ == "__main__":
    main(sys.argv[1])
