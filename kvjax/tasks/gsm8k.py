"""GSM8K: grade-school mathematics in words, after solved examples, from the official files."""

import re
from pathlib import Path

from kvjax.errors import InputError
from kvjax.tasks import jsonl
from kvjax.tasks.metrics import last_number
from kvjax.tasks.task import Request, Sample, Task

ADDRESS = "https://github.com/openai/grade-school-math"
FIELDS = {"question": str, "answer": str}
NEW = 256  # tokens; what lm_eval generates at most


def gsm8k(shots: int = 8) -> Task:
    """Word problems after solved examples; the last number of the answer counts.

    Takes the first `samples` lines of a file `test*.jsonl` and the first `shots` of a file `train*.jsonl`, both in
    `DATA/gsm8k` or in `DATA`. The examples are the context, and a chat template is not applied.

    Source: Cobbe et al. 2021 (arXiv:2110.14168), https://github.com/openai/grade-school-math; the form of the prompt is
    that of lm_eval's task `gsm8k`.
    Differs: the source fine-tunes and takes the number after `####`; here, as in lm_eval's `flexible-extract`, the last
    number counts, compared as it is written (18.00 is not 18). lm_eval draws the examples at random.

    Args:
      shots: examples before the question.
    """
    if shots < 0:
        raise InputError(f"gsm8k: shots={shots} is negative")
    return Task("gsm8k", lambda request: _samples(request, shots), score)


def score(text: str, sample: Sample) -> float:
    """1 if the last number before a next question is the right one."""
    return float(last_number(text.partition("Question:")[0]) in sample.answers)


def _samples(request: Request, shots: int) -> list[Sample]:
    """The first test problems, all after the same examples."""
    examples = "".join(map(_example, _read(request, "train", shots))) if shots else ""
    samples = [_sample(examples, *problem) for problem in _read(request, "test", request.samples)]
    if (longest := max(map(request.tokens, samples))) > (length := max(request.lengths)):
        raise InputError(
            f"task gsm8k with {shots} examples takes up to {longest} tokens, not {length}: "
            f"ask for fewer shots or a greater length"
        )
    return samples


def _read(request: Request, split: str, count: int) -> list[tuple[int, str, str, str]]:
    """Line number, question, solution and result of the first problems of a split."""
    names = [f"{folder}{split}{rest}.jsonl" for folder in ("gsm8k/", "") for rest in ("", "*")]
    path = jsonl.find(request.data, "gsm8k", names, ADDRESS)
    problems = [_problem(path, *record) for record in jsonl.read(path, FIELDS, count)]
    if split == "train" and len(problems) < count:
        raise InputError(f"{path} has {len(problems)} examples: too few for shots={count}")
    return problems


def _problem(path: Path, number: int, record: dict) -> tuple[int, str, str, str]:
    """Line number, question, solution without the calculator's annotations, and result."""
    result = last_number(record["answer"].rpartition("####")[2]) if "####" in record["answer"] else None
    if result is None:
        raise InputError(f"{path}, line {number} has no number after '####' in its answer")
    return number, record["question"], re.sub(r"<<[^>]*>>", "", record["answer"]), result


def _example(problem: tuple[int, str, str, str]) -> str:
    """A solved problem."""
    _, question, solution, _ = problem
    return f"Question: {question}\nAnswer: {solution}\n\n"


def _sample(examples: str, number: int, question: str, _: str, result: str) -> Sample:
    """A problem to solve."""
    asked = f"Question: {question}\nAnswer:"
    return Sample("test", number - 1, examples, asked, answers=(result,), new=NEW, chat=False)
