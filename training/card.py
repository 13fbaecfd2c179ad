"""The model card of a trained pair: nano/card.md filled in with the evaluation's results.

No figure is typed in.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mimo_fast.checkpoint.files import open_weights

from . import domain, lm
from .data import REPLY_VOICE, STRANGERS, UNHEARD_VOICE, VOICES, Sizes
from .evaluate import NOISE_DB, Results
from .tokenizer import INSTRUCTIONS

TEMPLATE = Path(__file__).parent / "nano" / "card.md"
PARTS = ("lm", "codec")


def card(pair: Path, results: Results, sizes: Sizes) -> str:
    """The card of the pair in the directory `pair` (lm, codec), given its evaluation.

    Raises:
        KeyError: a measurement is missing.
    """
    return TEMPLATE.read_text(encoding="utf-8").format(**_about(pair, sizes), **_measured(results))


def _about(pair: Path, sizes: Sizes) -> dict[str, Any]:
    files = [file for part in PARTS for file in (pair / part).iterdir()]
    strange = [count for name, count in sizes.parts.items() if name.startswith("strange")]
    return {
        "size": sum(file.stat().st_size for file in files) / 1e6,
        "parameters": sum(open_weights(pair / part).nbytes for part in PARTS) / 2 / 1e6,
        "words": len(domain.vocabulary()),
        "questions": len(domain.dialogue()),
        "styles": _listed([f'"{text}"' for text in INSTRUCTIONS.values()]),
        "speech": sum(sizes.parts.values()),
        "voices": _listed(VOICES),
        "reply": REPLY_VOICE,
        "strange": sum(strange),
        "speakers": len({*STRANGERS}),
        "unheard": UNHEARD_VOICE,
        "held_out": domain.HELD_OUT,
        "share": lm.HEARING_SHARE,
    }


def _measured(results: Results) -> dict[str, Any]:
    environment, (load, cores) = results["environment"], results["pace"]["load_before_and_cores"]
    quality = [
        (n, f"{at['stoi']:.3f}", f"{at['mel_distance']:.3f}")
        for n, at in results["codec_quality"].items()
    ]
    return {
        "utterances": results["utterances"],
        "commit": environment["commit"] or "unknown",
        "word_errors": _word_errors(results),
        "formats": _formats(results),
        "snr": results["streaming"]["snr_db"],
        "codec": _table(["codebooks", "STOI", "mel distance"], quality),
        "device": environment["device"]["name"],
        "instructions": environment["device"]["instructions"],
        "cores": cores,
        "load": load,
        "pace": _pace(results["pace"]),
        "confidence": confidence_table(results["confidence"]),
        "recordings": recordings_table(results.get("recordings", {})),
        "by_example": by_example_table(results.get("by_example", {})),
        "mistaken": mistaken(results["confidence"]),
    }


def mistaken(results: Results) -> str:
    """What the warned transcripts of the domain were."""
    found = results["domain_transcripts"]
    warned, both = found["warned"], found["warned_and_wrong"]
    return f"that were warned of, {both} of {warned} held a wrong word."


def confidence_table(results: Results) -> str:
    """What `confidence.calibrate` found: shares of utterances that are warned of."""
    tasks = {"asr": "transcripts", "spoken_dialogue": "answers"}
    kinds = {kind: None for task in tasks for kind in results[task]["warned"]}
    rows = []
    for kind in kinds:
        found = [results[task]["warned"].get(kind) for task in tasks]
        cells = [
            f"{_percent(each['warned'])} of {each['utterances']}" if each else "" for each in found
        ]
        rows.append((kind, *cells))
    return _table(["", *tasks.values()], rows)


def recordings_table(records: Mapping[str, Results]) -> str:
    """Words wrong in each condition of the robustness bench, by when it was measured."""
    if not records:
        return "Not measured."
    conditions = [record["conditions"] for record in records.values()]
    shared = [name for name in conditions[0] if all(name in each for each in conditions)]
    rows = [(name, *(_percent(each[name]["wrong"]) for each in conditions)) for name in shared]
    (count,) = {record["count"] for record in records.values()}
    return _table([f"words wrong of {count} sentences", *records], rows)


def by_example_table(record: Results) -> str:
    """Words wrong of conversions by the command (`benchmarks/studies/by_example.py`)."""
    rows = [
        (
            what,
            _percent(found["wrong"]),
            " to ".join(map(_percent, found["interval"])),
            f"{found['words']:,}",
            f"{found['conversions']:,} of {found['sentences']}",
            _percent(found["flite"]),
        )
        for kind, what in BY_EXAMPLE.items()
        if (found := record.get(kind))
    ]
    heads = ["", "words wrong", "95% interval", "words", "conversions, of sentences", "the floor"]
    return _table(heads, rows) if rows else "Not measured."


BY_EXAMPLE = {
    "card": "the dialogue's answers",
    "varied": "the same, at other rates and pitches",
    "held out": "held-out sentences",
}
"""What is said again, by the kinds of `benchmarks/studies/by_example.py`."""


def _word_errors(results: Results) -> str:
    tts, asr, dialogue = (results[name] for name in ("text_to_speech", "transcription", "dialogue"))
    streaming = results["streaming"]["word_error_rate"]
    by_example = results.get("by_example", {}).get("card", {}).get("wrong")
    rows = {
        "text to speech, heard by the recogniser": tts["word_error_rate"]["model"],
        "the same sentences by flite (the floor)": tts["word_error_rate"]["flite"],
        "flite, through the codec": tts["word_error_rate"]["codec"],
        "text to speech, heard by the model itself": tts["word_error_rate_own_asr"],
        "text to speech, all codes decoded at once": streaming["at_once"],
        "text to speech, greedy, which is its default": results["sampling"]["greedy"],
        "transcription of the unheard voice": asr["clean"],
        f"the same, in noise {NOISE_DB} dB below": asr[f"noise_{NOISE_DB}_db"],
        "transcription of flite in the voice that the model speaks in": asr["own_voice"],
        "spoken answers to spoken questions, heard by the recogniser": dialogue["heard"],
        "the text of these answers": dialogue["text"],
        "said again by example, heard by the recogniser": (
            results["examples"]["heard"] if by_example is None else by_example
        ),
    }
    shares = [(name, _percent(rate)) for name, rate in rows.items()]
    return _table(["", "words that are wrong"], shares)


def _formats(results: Results) -> str:
    tts, heard = results["text_to_speech"], results["transcription"]["clean"]
    rates = tts["word_error_rate"]["model"], tts["word_error_rate_own_asr"], heard
    rows = [("float32", *map(_percent, rates), "", "")]
    for name, found in results["formats"].items():
        text, *books = found["kl"].values()
        rates = found["word_error_rate"], found["word_error_rate_own_asr"], found["transcription"]
        kl = f"{text:.4f}", f"{min(books):.4f} to {max(books):.4f}"
        rows.append((name, *map(_percent, rates), *kl))
    words = ["tts, recogniser", "tts, by itself", "transcription"]
    return _table(["", *words, "KL of the text head", "KL of the codebooks"], rows)


def _pace(pace: Results) -> str:
    rows = []
    for name, found in pace.items():
        if isinstance(found, Mapping):
            factor, first = found["real_time_factor"], found["first_audio_ms"]
            factors = f"{factor['median']:.3f} and {factor['largest']:.3f}"
            firsts = f"{first['median']:.0f} and {first['largest']:.0f} ms"
            rows.append((name, str(found["threads"]), factors, firsts))
    return _table(["", "threads", "real-time factor", "first audio"], rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, *rows)]
    return "\n".join([lines[0], "| :-- |" + " --: |" * (len(head) - 1), *lines[1:]])


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:-1]) + f" and {names[-1]}"
