"""The small model's tokenizer: byte-level BPE in which every word of the domain is one token.

The wordings of requests are constants of the package, so each is one token as well: almost the
whole cost of a prompt is its speech. Text is lowered and every piece of it starts with a space, so
a word has the same token wherever it stands.
"""

from itertools import chain
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

from mimo_fast.checkpoint.folder import write_json
from mimo_fast.text.templates import ASR_TEMPLATES, TTS_TEMPLATES
from mimo_fast.text.tokenizer import MODEL_TOKENS, TRAINED_WORDS, Tokenizer

from . import domain

VOCABULARY = 1024

CHAT = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
SPECIAL = (*CHAT, *MODEL_TOKENS.values())

STYLE_SYSTEM = "你需要根据指定的风格指令和文本内容来生成语音。"
"""The system turn of a styled request (`prompt.tts`)."""

INSTRUCTIONS = {
    "slow": "speak slowly",
    "fast": "speak fast",
    "high": "in a high voice",
    "low": "in a low voice",
}
"""How the styles are requested."""

S2S_INSTRUCTIONS = {"questions": "Answer the question", "echoes": "Say it again in your own voice"}
"""What is requested by example, by the part of the data that is the input."""

ROLES = ("user\n", "system\n", "assistant\n")
FRAMES = (*ROLES, "\n", "\n\n", " \n\n", ": ", "[int]:", "your voice should be:")
"""Text between a prompt's parts."""


def build_tokenizer(directory: Path) -> Tokenizer:
    """Trains the tokenizer, deterministically, and writes it among a checkpoint's files."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    constants = [*ASR_TEMPLATES, *chain(*TTS_TEMPLATES.values()), STYLE_SYSTEM]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL) - len(constants),
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    texts = [*domain.vocabulary(), *FRAMES]
    texts += [f"[int]:{text.lower()}\n" for text in S2S_INSTRUCTIONS.values()]
    texts += [f"{domain.vocabulary()[0]}({text})" for text in INSTRUCTIONS.values()]
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in constants])
    tokenizer.add_special_tokens(list(SPECIAL))
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"), pretty=False)
    config = {
        # transformers 4 replaces what tokenizer.json says of it by this, which it takes for false.
        "add_prefix_space": True,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        TRAINED_WORDS: list(domain.vocabulary()),
    }
    write_json(directory / "tokenizer_config.json", config)
    return Tokenizer.from_directory(directory)
