"""Text: tokenizer, prompts, templates, spelling, tasks."""
