"""What a checkpoint cannot do for a command, and what it states that it was not trained for."""

import argparse

from mimo_fast.config import LMConfig

TASKS = {
    "asr": "asr_sft",
    "tts": "tts_sft",
    "understand": "audio_understanding_sft",
    "chat": "spoken_dialogue_sft",
    "talk": "spoken_dialogue_sft",
    "carry_on": "speech_continuation",
    "convert": "in_context_learning_s2s",
    "demo": "tts_sft",
}
"""The task of each command's module."""

OPTIONS = {
    "instruct": "instruct",
    "natural": "read_text_only",
    "voice": "prompt_speech",
    "system": "system_prompt",
    "instructions": "system_prompt",
    "thinking": "thinking",
}
"""The argument of a task that each option sets."""

COMMANDS = {"carry_on": "continue"}


def check_asked(config: LMConfig, args: argparse.Namespace) -> None:
    """Raises PromptError for a command or a language that the checkpoint cannot serve."""
    _, task = _asked(args)
    if task is not None:
        config.architecture.check_task(task)
    config.architecture.tag_of(getattr(args, "language", None))


def untrained(config: LMConfig, args: argparse.Namespace) -> str | None:
    """What a command asks for and its checkpoint was not trained for; None where it was."""
    command, task = _asked(args)
    if task is None:
        return None
    if not config.is_trained(task):
        return command
    options = [
        f"--{option}"
        for option, name in OPTIONS.items()
        if getattr(args, option, None) and not config.is_trained(task, name)
    ]
    return f"{command} with {' and '.join(options)}" if options else None


def _asked(args: argparse.Namespace) -> tuple[str, str | None]:
    """A command's name, and its task; None where it has none of its own."""
    if args.module == "chat" and args.text:
        return "chat --text", "text_dialogue_sft"
    return COMMANDS.get(args.module, args.module), TASKS.get(args.module)
