"""LongBench: questions, summaries, examples and code over long documents, from the official files."""

import json
import re
from functools import partial
from pathlib import Path

from kvjax.errors import InputError
from kvjax.tasks import jsonl, metrics
from kvjax.tasks.task import Request, Sample, Task, fit

ADDRESS = "https://github.com/THUDM/LongBench"
SETS = json.loads(Path(__file__).with_name("longbench.json").read_text("utf-8"))["sets"]
METRICS = {
    "narrativeqa": metrics.qa_f1,
    "qasper": metrics.qa_f1,
    "multifieldqa_en": metrics.qa_f1,
    "hotpotqa": metrics.qa_f1,
    "2wikimqa": metrics.qa_f1,
    "musique": metrics.qa_f1,
    "gov_report": metrics.rouge_l,
    "qmsum": metrics.rouge_l,
    "multi_news": metrics.rouge_l,
    "trec": metrics.classification,
    "triviaqa": metrics.qa_f1,
    "samsum": metrics.rouge_l,
    "passage_count": metrics.count,
    "passage_retrieval_en": metrics.retrieval,
    "lcc": metrics.code_similarity,
    "repobench-p": metrics.code_similarity,
}
EXAMPLES = ("trec", "triviaqa", "samsum")  # the context is examples: only the first generated line is the answer
PLAIN = (*EXAMPLES, "lcc", "repobench-p")  # without a chat template


def longbench(sets: str = "all") -> Task:
    """LongBench's English and code sets, each a part of the task.

    Takes the first `samples` lines of `DATA/longbench/SET.jsonl` or `DATA/SET.jsonl`. A prompt longer than the longest
    length asked for loses its middle. `facts["cut"]` says how many characters that took.

    Source: Bai et al. 2023 (arXiv:2308.14508) and https://github.com/THUDM/LongBench: prompts, lengths of answers
    (longbench.json), `pred.py`, `eval.py`, `metrics.py`.
    Differs: the middle is cut at characters, so that as many tokens as fit are left; the source keeps equal numbers of
    tokens at both ends. The limit includes the answer and the chat template. samsum is generated to its full
    length and cut after its first line; the source stops there.

    Args:
      sets: `all`, or names separated by `+` or `,`.
    """
    names = list(SETS) if sets == "all" else list(dict.fromkeys(re.split(r"[+,]", sets)))
    if unknown := [name for name in names if name not in SETS]:
        raise InputError(f"longbench has no set {unknown[0]!r}: choose from all, {', '.join(SETS)}")
    return Task("longbench", lambda request: [sample for name in names for sample in _samples(request, name)], score)


def score(text: str, sample: Sample) -> float:
    """The best of a set's metric over the accepted answers."""
    if sample.part in EXAMPLES:
        text = text.lstrip("\n").partition("\n")[0]
    metric = METRICS[sample.part]
    if metric is metrics.classification:
        metric = partial(metric, classes=str(sample.facts["classes"]).split("\n"))
    return max(metric(text, answer) for answer in sample.answers)


def _samples(request: Request, name: str) -> list[Sample]:
    """The first samples of a set."""
    path = jsonl.find(request.data, "longbench", [f"longbench/{name}.jsonl", f"{name}.jsonl"], ADDRESS)
    fields = {"context": str, "input": str, "answers": list} | ({"all_classes": list} if name == "trec" else {})
    records = jsonl.read(path, fields, request.samples)
    for number, line in records:
        for field in ("answers", *(["all_classes"] if name == "trec" else [])):
            if not line[field] or not all(isinstance(text, str) for text in line[field]):
                raise InputError(f"{path}, line {number}: {field!r} is not a list of texts, at least one")
    samples = [_sample(request, name, number - 1, line) for number, line in records]
    score("", samples[0])  # what a metric lacks shows before anything is generated
    return samples


def _sample(request: Request, name: str, index: int, line: dict) -> Sample:
    """One line of a file in the set's prompt, with its middle cut to the longest length."""
    before, _, after = SETS[name]["prompt"].partition("{context}")
    context, question = before + line["context"], after.replace("{input}", line["input"])
    classes = {"classes": "\n".join(line["all_classes"])} if name == "trec" else {}

    def keep(characters: int) -> list[Sample]:
        """With a shortened context, such that the prompt's halves before and after the cut are equally long."""
        first = min(characters, (characters + len(question)) // 2)
        cut = len(context) - characters
        left = context[:first] + context[first + cut :]
        answers = tuple(line["answers"])
        facts = {"cut": cut, **classes}
        return [Sample(name, index, left, question, "", answers, SETS[name]["new"], name not in PLAIN, facts)]

    limit = max(request.lengths)
    if request.tokens(*(whole := keep(len(context)))) <= limit:
        return whole[0]
    return fit(request, f"longbench, set {name},", limit, keep, 0, len(context))[0]
