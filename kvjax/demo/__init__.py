"""The demo checkpoint, a small Llama-architecture model that looks things up, and how it was made.

    python -m kvjax.demo.train --out DIR     # start, or continue
    python -m kvjax.demo.curves DIR          # how it learned
    python -m kvjax.demo.score DIR/hf        # held-out accuracies, and text losses
    python -m kvjax.demo.portrait DIR/hf     # what its heads attend to

`corpus` is its text, `tokens` and `vocabulary` its tokens, `documents` and `lines` what it reads, `data` makes batches
of them, `course` says when documents grow, `model` is the decoder as it is trained, `checkpoint` is what a run leaves
on disk, `export` writes the Hugging Face checkpoint.
"""
