"""Items -> answers as rows of one batch -> what measures find of them. Both resume.

    OUT/evaluation.json    what is evaluated: another set, split, options or checkpoint is refused
    OUT/results.jsonl      an answer a line, as `mimo_fast.batch` keeps them; OUT/ID.wav
    OUT/findings.jsonl     what a measure found of an answer, a line each, with its tool

Whatever has a line is not computed again. A finding is of one answer and one tool: another
recogniser listens anew, and nothing is answered again for it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from copy import copy
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mimo_fast.audio.paths import check_folder, check_readable
from mimo_fast.batches import RECORD, add_line, batch, read_lines
from mimo_fast.checkpoint.folder import write_json
from mimo_fast.errors import AudioError, EvaluationError, MimoFastError
from mimo_fast.evaluation.as_evaluated import AsEvaluated, wording
from mimo_fast.evaluation.items import Answer, EvaluationSet, Found, Item, Measure, Options, Tools
from mimo_fast.json_files import cut
from mimo_fast.mimo_audio import MimoAudio
from mimo_fast.sampling import task_samplers
from mimo_fast.text.tasks import find_task

ABOUT, FINDINGS = "evaluation.json", "findings.jsonl"

SAFE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,150}")
"""Ids that are names of files on every system."""

FAILURES = 3
"""A tool that fails so often, one answer after the other, ends the evaluation."""

SAMPLE = 2**20
"""Bytes at both ends of a file of weights that its fingerprint is made of, with its size."""

WEIGHTS = {".safetensors", ".gguf", ".bin", ".pt"}


@dataclass(frozen=True)
class Asked:
    """What is evaluated, and how it is asked.

    Attributes:
        seed: Item i is answered with seed + i; where nothing but the wording of the request is
            drawn, in transcriptions, all have the same.
        max_new_tokens: Groups of a reply at most; None for the model's own.
        adapter: That all requests choose.
        sampled: With upstream's samplers, where the checkpoint states greedy ones.
        as_evaluated: In MiMo-Audio-Eval's own runtime, see `as_evaluated.py`.
        format: Of the weights, as quantized while loading; None for the checkpoint's own.
    """

    set: EvaluationSet
    split: str
    options: Options
    seed: int = 0
    max_new_tokens: int | None = None
    adapter: str | None = None
    sampled: bool = False
    as_evaluated: bool = False
    format: str | None = None

    @property
    def task(self) -> str:
        return self.set.task(self.options)

    @property
    def measures(self) -> Sequence[Measure]:
        return self.set.measures(self.split, self.options)


@dataclass(frozen=True)
class Measured:
    """A measure, what it found of which answer, and why it found nothing of others."""

    measure: Measure
    found: Sequence[tuple[Answer, Found]]
    missing: frozenset[str] = frozenset()
    failed: Sequence[str] = ()


@dataclass(frozen=True)
class Evaluation:
    """All answers of a set, in the order of its items, and what was found of them."""

    asked: Asked
    about: Mapping[str, Any]
    answers: Sequence[Answer]
    measured: Sequence[Measured]


def read_items(asked: Asked, data: Path, limit: int | None = None) -> list[Item]:
    """The first `limit` items of a set, all of whose recordings can be read.

    Raises:
        EvaluationError: a file is missing or wrong, two items have one id, or there is none.
    """
    items = list(asked.set.read(data, asked.split, asked.options))[:limit]
    if not items:
        raise EvaluationError(f"{data} holds no items of {asked.set.title}, {asked.split}")
    seen = set[str]()
    for item in items:
        if item.id in seen:
            raise EvaluationError(f"{asked.set.title} has two items {item.id!r:.80} in {data}")
        seen.add(item.id)
    bad = list[str]()
    for file in dict.fromkeys(file for item in items for file in _files(item)):
        try:
            if not check_readable(file):
                bad.append(f"{file} is empty")
        except AudioError as error:
            bad.append(str(error))
    if bad:
        more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        raise EvaluationError(f"{bad[0]}{more}: {asked.set.title} is incomplete")
    return items


def _files(item: Item) -> Iterator[Path]:
    values: list[Any] = [item.arguments, item.truth]
    while values:
        value = values.pop()
        if isinstance(value, Path):
            yield value
        elif isinstance(value, Mapping):
            values += value.values()
        elif isinstance(value, list | tuple):
            values += value


def evaluate(
    model: MimoAudio,
    asked: Asked,
    items: Sequence[Item],
    tools: Tools,
    folder: Path,
    *,
    overwrite: bool = False,
    progress: bool = True,
) -> Evaluation:
    """Answers and measures what the folder does not hold yet.

    Args:
        tools: whose recogniser is no longer `plugins.SELF`.
        overwrite: whether another evaluation in the folder is begun anew, instead of refused.

    Raises:
        EvaluationError: the folder holds another evaluation, or a tool fails again and again.
        AudioError: the folder cannot be written.
    """
    about = _about(model, asked)
    _begin(folder, about, overwrite)
    runs = AsEvaluated(model) if asked.as_evaluated else copy(model)
    if asked.sampled:
        runs.task_sampler_configs = task_samplers()
    answers = _answers(runs, asked, items, folder, progress)
    measured = [_measured(each, answers, tools, folder, progress) for each in asked.measures]
    return Evaluation(asked, about, answers, measured)


def _about(model: MimoAudio, asked: Asked) -> dict[str, Any]:
    """What makes answers those of one evaluation, as JSON values."""
    options = {key: value for key, value in asdict(asked.options).items() if key != "normaliser"}
    return {
        "set": asked.set.name,
        "split": asked.split,
        "task": asked.task,
        "options": options,
        "model": fingerprint(Path(model.path)),
        "codec": fingerprint(Path(model.mimo_audio_tokenizer_path)),
        "format": asked.format,
        "dtype": str(model.lm.dtype).removeprefix("torch."),
        "adapter": asked.adapter,
        "seed": asked.seed,
        "max_new_tokens": asked.max_new_tokens,
        "sampled": asked.sampled,
        "as_evaluated": asked.as_evaluated,
    }


def fingerprint(folder: Path) -> str:
    """Of a checkpoint: its config, and sizes and both ends of its files of weights."""
    digest = hashlib.sha256()
    for path in sorted([folder] if folder.is_file() else folder.iterdir()):
        if path.name != "config.json" and path.suffix not in WEIGHTS:
            continue
        with path.open("rb") as file:
            size = path.stat().st_size
            digest.update(f"{path.name} {size}\n".encode() + file.read(SAMPLE))
            file.seek(max(size - SAMPLE, 0))
            digest.update(file.read())
    return digest.hexdigest()[:16]


def _begin(folder: Path, about: Mapping[str, Any], overwrite: bool) -> None:
    """Refuses a folder of another evaluation, or empties its records."""
    check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ABOUT
    if path.exists():
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            known = {}
        differs = [key for key in about if known.get(key) != about[key]]
        if differs and not overwrite:
            what = ", ".join(f"{key} {known.get(key)} instead of {about[key]}" for key in differs)
            raise EvaluationError(
                f"{folder} holds another evaluation ({cut(what)}): name another folder with -o, "
                "or give --overwrite"
            )
    elif (folder / RECORD).exists() and not overwrite:
        raise EvaluationError(f"{folder} holds results of something else: name another with -o")
    if overwrite:
        for name in (RECORD, FINDINGS):
            (folder / name).unlink(missing_ok=True)
    write_json(path, dict(about))


def _requests(model: MimoAudio, asked: Asked, items: Sequence[Item]) -> list[dict[str, Any]]:
    """The arguments of each item's task, with its seed and wording."""
    task, tags = find_task(asked.task), model.lm.config.architecture.tags
    # Transcriptions: nothing is drawn but the wording, which is then one for all.
    drawn = task.speaks or bool(model.get_task_sampler(task.sampler)["global"].do_sample)
    requests = list[dict[str, Any]]()
    for i, item in enumerate(items):
        request = {**item.arguments, "seed": asked.seed + i * drawn}
        if task is find_task("asr_sft") and tags:
            tag = model.lm.config.architecture.tag_of(item.truth.get("language"))
            request["audio_tag"] = tag
        if asked.as_evaluated:
            request |= wording(asked.task, item)
        requests.append(request)
    return requests


def names_of(items: Sequence[Item]) -> list[str] | None:
    """Names of the answers' files: the ids, where all are names of files of their own."""
    ids = [item.id for item in items]
    safe = all(map(SAFE.fullmatch, ids))
    return ids if safe and len({each.casefold() for each in ids}) == len(ids) else None


def _answers(
    model: MimoAudio, asked: Asked, items: Sequence[Item], folder: Path, progress: bool
) -> list[Answer]:
    limits: dict[str, Any] = {"max_new_tokens": asked.max_new_tokens, "adapter": asked.adapter}
    speaks = find_task(asked.task).speaks
    names = names_of(items) if speaks else None
    requests = _requests(model, asked, items)
    for _ in batch(model, asked.task, requests, folder, names=names, progress=progress, **limits):
        # The folder has them.
        continue
    known = {line["index"]: line for line in read_lines(folder / RECORD) if "index" in line}
    return [_answer(item, known.get(i, {}), folder) for i, item in enumerate(items)]


def _answer(item: Item, line: Mapping[str, Any], folder: Path) -> Answer:
    if "error" in line or not line:
        return Answer(item, error=str(line.get("error", "it was not answered")))
    audio = folder / line["file"] if "file" in line else None
    return Answer(item, str(line["text"]), audio, float(line.get("seconds", 0)))


def _measured(
    measure: Measure, answers: Sequence[Answer], tools: Tools, folder: Path, progress: bool
) -> Measured:
    """What a measure finds of all answers; what the folder holds of the same ones is kept."""
    missing = frozenset(name for name in measure.needs if getattr(tools, name) is None)
    if missing:
        return Measured(measure, (), missing)
    kept, path = dict[tuple[str, str], Found](), folder / FINDINGS
    used = {name: tools.names.get(name, "") for name in sorted(measure.needs)}
    for line in read_lines(path):
        if line.get("measure") == measure.name and line.get("tools") == used:
            kept[line["id"], line["answer"]] = line["found"]
    keys = [(answer.item.id, _digest(answer)) for answer in answers]
    waiting = [place for place, key in enumerate(keys) if key not in kept]
    failed, row = list[str](), 0
    for place, found in _found(measure, answers, waiting, tools, progress):
        if isinstance(found, Exception):
            failed.append(cut(found))
            row += 1
            if row >= FAILURES:
                raise EvaluationError(f"{measure.name}: {failed[-1]}") from found
            continue
        row, (item, answer) = 0, keys[place]
        kept[keys[place]] = found
        line = {"id": item, "measure": measure.name, "answer": answer, "tools": used}
        add_line(path, line | {"found": found})
    pairs = zip(answers, keys, strict=True)
    return Measured(
        measure, [(answer, kept[key]) for answer, key in pairs if key in kept], failed=failed
    )


def _found(
    measure: Measure,
    answers: Sequence[Answer],
    waiting: Sequence[int],
    tools: Tools,
    progress: bool,
) -> Iterator[tuple[int, Found | Exception]]:
    """What is found of answers, as it is found, several at once where its tools take several."""
    at_once = [getattr(getattr(tools, name), "at_once", 1) for name in measure.needs]
    hidden = None if progress and measure.needs else True
    find = partial(_attempt, measure.find, tools)
    bar = tqdm(total=len(waiting), desc=measure.name, unit="answer", disable=hidden, leave=False)
    if max(at_once, default=1) <= 1:
        with bar:
            for place in waiting:
                yield place, find(answers[place])
                bar.update()
        return
    with bar, ThreadPoolExecutor(min(at_once)) as workers:
        places: dict[Future[Found | Exception], int] = {
            workers.submit(find, answers[place]): place for place in waiting
        }
        try:
            for future in as_completed(places):
                yield places[future], future.result()
                bar.update()
        finally:
            workers.shutdown(wait=False, cancel_futures=True)


def _attempt(
    find: Callable[[Answer, Tools], Found], tools: Tools, answer: Answer
) -> Found | Exception:
    """What is found, or the error of a plug-in, which may be any."""
    try:
        return find(answer, tools)
    except Exception as error:
        known = isinstance(error, MimoFastError)
        return error if known else EvaluationError(f"{type(error).__name__}: {cut(error, 200)}")


def _digest(answer: Answer) -> str:
    """Of what an answer says, and of what is known of it."""
    digest = hashlib.sha256(repr((answer.text, answer.error)).encode(errors="backslashreplace"))
    digest.update(repr(sorted(answer.item.truth.items())).encode(errors="backslashreplace"))
    if answer.audio is not None:
        digest.update(answer.audio.read_bytes())
    return digest.hexdigest()[:16]


def part_of(measured: Measured, answers: Sequence[Answer]) -> Measured:
    """What was found of some of the answers alone."""
    chosen = {answer.item.id for answer in answers}
    return replace(measured, found=[pair for pair in measured.found if pair[0].item.id in chosen])
