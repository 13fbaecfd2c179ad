"""The report of `mimo-fast quality` as Markdown, from its JSON."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mimo_fast.quality.advice import MEASURES

Report = Mapping[str, Any]

NOT_MEASURED = "not measured"

SOURCES = {"given": "given", "heard by the full format": "heard"}


def markdown(report: Report, pictures: Sequence[str]) -> str:
    """The whole report; pictures: names of files beside it."""
    parts = [
        "# Formats compared\n",
        f"**{report['advice']['sentence']}**\n",
        *_about(report),
        *_losses(report, pictures),
        *_formats(report, pictures),
        *_heads(report, pictures),
        *_codec(report),
        *_streaming(report),
        *_unmeasured(report),
        *_listening(report),
    ]
    return "\n".join(parts) + "\n"


def _about(report: Report) -> Iterator[str]:
    found, device = report["environment"], report["environment"]["device"]
    recordings, texts = report["recordings"], report["texts"]
    given = sum(each["from"] == "given" for each in recordings)
    yield (
        f"{report['model']} and {report['codec']}, {report['full']} as loaded, on "
        f"{device['name']}, {found['threads']} threads, {found['date']}.\n"
    )
    seconds = sum(each["seconds"] for each in recordings)
    yield (
        f"{len(recordings)} recordings ({seconds:.1f} s; the words of {given} were given, those of "
        f"{len(recordings) - given} are what {report['full']} hears) and {len(texts)} texts, whose "
        f"speech is heard by {report['recogniser']}. Language: {report['language']}.\n"
    )


def _losses(report: Report, pictures: Sequence[str]) -> Iterator[str]:
    rows = []
    for name, each in report["formats"].items():
        for measure, loss in each.get("losses", {}).items():
            shown = MEASURES[measure].shown
            value, low, high, bound = (shown(loss[k]) for k in ("value", "low", "high", "bound"))
            more = f", about {loss['needed']} would do" if loss["needed"] else ""
            verdict = {
                "holds": "holds",
                "broken": "**broken**",
                "open": f"too few utterances to tell{more}",
            }[loss["verdict"]]
            title = f"{MEASURES[measure].title}{MEASURES[measure].unit and ' (points)'}"
            rows.append([name, title, value, f"{low} to {high}", bound, verdict])
            rows[-1].insert(2, str(loss["utterances"]))
    yield f"## What is lost beside {report['full']}\n"
    heads = ["format", "of", "utterances", "loss", "95% interval", "allowed", "verdict"]
    yield table(heads, rows) if rows else f"{NOT_MEASURED}.\n"
    yield (
        "A format is fit if the whole interval of every loss is within what is allowed. Of the fit "
        f"ones, those within {report['bounds']['speed']:.0%} of the fastest are as fast; of these "
        f"the smallest is named. Fit: {', '.join(report['advice']['fit'])}; as fast as the "
        f"fastest: {', '.join(report['advice']['fastest'])}.\n"
    )
    yield from _picture(pictures, "losses.png")


def _formats(report: Report, pictures: Sequence[str]) -> Iterator[str]:
    heads = [
        *("format", "wrong of words heard", "wrong of words said", "voice", "DNSMOS"),
        *("real-time factor", "first audio", "elastic", "weights", "peak memory"),
    ]
    rows = []
    for name, each in report["formats"].items():
        speed, memory = each["speed"], each["memory"]
        first = speed.get("first_audio_ms", {})
        rows.append(
            [
                name,
                _percent(each.get("hearing", {}).get("rate")),
                _percent(each.get("speech", {}).get("rate")),
                _number(each.get("voice", {}).get("mean"), 3),
                _number(each.get("sound", {}).get("mean"), 2),
                _number(speed.get("real_time_factor"), 3),
                _unit(first.get("exact"), "ms"),
                _unit(first.get("elastic"), "ms"),
                _unit(memory["weights"] / 1e6, "MB"),
                _unit(memory["peak"] / 1e6, "MB"),
            ]
        )
    yield "## Each format\n"
    yield table(heads, rows)
    whose = (
        "the recording whose voice it was given"
        if any(report["voices"])
        else (f"what {report['full']} said of the other texts")
    )
    yield (
        f"Voice: cosine of Resemblyzer's embeddings of what was said and of {whose}. Speed: least "
        "of several runs of a text, median of texts; memory is this process's, or the GPU's. "
        f"Weights: the language model's by the memory plan.\n"
    )
    yield from _picture(pictures, "speed.png")


def _heads(report: Report, pictures: Sequence[str]) -> Iterator[str]:
    yield "## KL and agreement of each head\n"
    rows = []
    for name, each in report["formats"].items():
        for i, head in enumerate(each.get("heads", ())):
            title = f"codebook {i - 1}" if i else "text"
            kl, agreement = _number(head["kl"], 5), _percent(head["agreement"])
            rows.append([name, title, kl, agreement, str(head["predictions"])])
    yield table(["format", "head", "KL (nats)", "top-1 agreement", "predictions"], rows)
    yield from _picture(pictures, "heads.png")


def _codec(report: Report) -> Iterator[str]:
    yield "## The codec\n"
    small, trips = report["codecs"]["int8"], report["codecs"]["round_trips"]
    if small is None:
        yield f"{NOT_MEASURED}.\n"
        return
    rows = [
        [
            name,
            _number(each.get("voice", {}).get("mean"), 3),
            _number(each.get("sound", {}).get("mean"), 2),
        ]
        for name, each in trips.items()
        if each["files"]
    ]
    yield table(["recordings through the codec", "voice beside the recording", "DNSMOS"], rows)
    yield (
        f"In int8, beside the full codec: SNR {_number(small['snr_db'], 1)} dB, mel distance "
        f"{small['mel_distance']:.4f}, {_percent(small['code_agreement'])} of its codes the same. "
        "No format of the language model changes it.\n"
    )


def _streaming(report: Report) -> Iterator[str]:
    yield "## Streams beside one-shot decoding\n"
    if report["streaming"] is None:
        yield f"{NOT_MEASURED}.\n"
        return
    rows = [
        [
            way,
            str(each["patches_before_audio"]),
            *(
                _number(each[name][which], digits, "equal")
                for name, digits in (("snr_db", 1), ("beginning_snr_db", 1), ("mel_distance", 4))
                for which in ("mean", "worst")
            ),
        ]
        for way, each in report["streaming"].items()
    ]
    yield table(
        [
            *("look-ahead", "patches before audio", "SNR (dB), mean", "worst"),
            *("of the first 0.64 s, mean", "worst", "mel distance, mean", "worst"),
        ],
        rows,
    )


def _unmeasured(report: Report) -> Iterator[str]:
    if report["not_measured"]:
        yield "## Not measured\n"
        yield table(["what", "why"], [[*item] for item in report["not_measured"].items()])


def _listening(report: Report) -> Iterator[str]:
    """What was said and heard, with links to the files."""
    formats = report["formats"]
    if not report["texts"]:
        return
    yield "## Listen\n"
    rows = []
    for i, text in enumerate(report["texts"]):
        heard = []
        for name, each in formats.items():
            file = f"audio/{name}/text-{i + 1:03}.wav"
            words = _cell(each["speech"]["heard"][i]) if "speech" in each else "listen"
            heard.append(f"[{words}]({file})" if words else "nothing")
        rows.append([_cell(text), *heard])
    yield table(["text", *(f"heard in {name}" for name in formats)], rows)


def _picture(pictures: Sequence[str], name: str) -> Iterator[str]:
    if name in pictures:
        yield f"![{Path(name).stem}]({name})\n"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _cell(text: str) -> str:
    """Text that ends no cell, line or link."""
    return " ".join(text.split()).replace("|", "\\|").replace("[", "\\[").replace("]", "\\]")


def _percent(value: float | None) -> str:
    return NOT_MEASURED if value is None else f"{100 * value:.2f}%"


def _number(value: float | None, digits: int, missing: str = NOT_MEASURED) -> str:
    return missing if value is None else f"{value:.{digits}f}"


def _unit(value: float | None, unit: str) -> str:
    return NOT_MEASURED if value is None else f"{value:,.1f} {unit}"
