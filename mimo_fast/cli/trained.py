"""A remark where a command asks a checkpoint for what it states that it was not trained for."""

import argparse

from mimo_fast.config import LMConfig

TASKS = {
    "asr": "asr_sft",
    "tts": "tts_sft",
    "understand": "audio_understanding_sft",
    "chat": "spoken_dialogue_sft",
    "talk": "spoken_dialogue_sft",
    "carry_on": "speech_continuation",
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


def untrained(config: LMConfig, args: argparse.Namespace) -> str | None:
    """What a command asks for and its checkpoint was not trained for; None where it was."""
    command, task = COMMANDS.get(args.module, args.module), TASKS.get(args.module)
    if args.module == "chat" and args.text:
        command, task = "chat --text", "text_dialogue_sft"
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
