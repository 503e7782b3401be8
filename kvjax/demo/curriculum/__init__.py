"""The next demo model: tasks in the evaluation's short forms, and plain text, in documents of up to 4096 tokens.

    python -m kvjax.demo.curriculum.train --out DIR     # start, or continue
    python -m kvjax.demo.curriculum.curves DIR          # how it learned
    python -m kvjax.demo.curriculum.score DIR/hf        # held-out accuracies, and text losses

`corpus` is its text, `tokens` its vocabulary, `documents` writes what it reads, `data` makes batches of it, `course`
says when documents grow, `model` is the decoder as it is trained, `checkpoint` is what a run leaves on disk.
"""
