"""What a checkpoint's architecture decides beside its dimensions: tasks, front end and languages.

config.json names it in `architectures`. Whatever differs between the published models is read from
here, so that nothing else asks which of them is loaded.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from mimo_fast.errors import PromptError, TaskError
from mimo_fast.json_files import shown

LANGUAGES = {"en": "english", "zh": "chinese"}
"""Languages that transcripts are asked for in: ISO 639-1 codes -> names."""


@dataclass(frozen=True)
class Architecture:
    """One of the published models, and what is tuned from it.

    Attributes:
        model: Its name.
        tasks: What it does, by keys of `text.tasks.TASKS`; empty for all of them.
        part_seconds: A recording is cut into parts of so many seconds, each encoded by itself, see
            `parts_of`. None: its spectrogram is computed whole, and cut into segments of 60 s.
        tags: A code of `LANGUAGES` -> the text that begins a transcript in that language. The model
            writes it or, where the language is known, its prompt ends with it.
    """

    model: str
    tasks: tuple[str, ...] = ()
    part_seconds: int | None = None
    tags: tuple[tuple[str, str], ...] = ()

    def check_task(self, name: str) -> None:
        """Raises TaskError for a task that the model does not do."""
        if self.tasks and name not in self.tasks:
            problem = f"{self.model} does {' and '.join(self.tasks)} alone, not {name}"
            raise TaskError(f"{problem}: load {MIMO_AUDIO.model} for it")

    def tag_of(self, language: str | None) -> str:
        """The tag of a language by its code, in any region, or its name; "" for None.

        Raises:
            PromptError: the model has no such tag, or none at all.
        """
        if language is None:
            return ""
        if not self.tags:
            raise PromptError(f"{self.model} has no language tags: leave the language out")
        tags, code = dict(self.tags), language_code(language)
        if code not in tags:
            known = " and ".join(f"{each} ({LANGUAGES[each]})" for each in tags)
            raise PromptError(
                f"{self.model} has no tag for language {shown(language)}: use {known}"
            )
        return tags[code]

    def language_of(self, tag: str) -> str | None:
        """The code of a tag's language; None for "".

        Raises:
            PromptError: the model has no such tag.
        """
        languages = {own: code for code, own in self.tags}
        if tag != "" and tag not in languages:
            known = f"only {' and '.join(languages)}" if languages else "no tags"
            raise PromptError(f"{self.model} has {known}, not the audio_tag {shown(tag)}")
        return languages.get(tag)


def language_code(language: str) -> str:
    """The code of a language by its name or its code, with or without a region; else as it is."""
    names = {name: code for code, name in LANGUAGES.items()}
    given = language.lower()
    return names.get(given, given.split("-")[0])


MIMO_AUDIO = Architecture("MiMo-Audio")

MIMO_V2_5_ASR = Architecture(
    "MiMo-V2.5-ASR",
    tasks=("asr_sft",),
    part_seconds=30,
    tags=(("zh", "<chinese>"), ("en", "<english>")),
)

ARCHITECTURES = {"MiMoV2ASRForCausalLM": MIMO_V2_5_ASR}
"""By their names in config.json; any other is MiMo-Audio's, whose files have had several."""


def architecture_of(names: Sequence[str]) -> Architecture:
    """The architecture that a list of names in config.json means."""
    known = (ARCHITECTURES[name] for name in names if name in ARCHITECTURES)
    return next(known, MIMO_AUDIO)
