"""Checkpoint pairs of other dimensions than the kit's, and prompts that fit them."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import mimo_fast
from mimo_fast.config import LMConfig


@dataclass(frozen=True)
class Variant:
    lm: dict[str, Any]
    codec: dict[str, Any]


KIT = Variant({}, {})

# One channel count below the kit's, a group of 2, no delays, as many key-value heads as heads,
# RMSNorm, no pooling.
SMALL = Variant(
    lm={"audio_channels": 3, "group_size": 2, "delay_pattern": "0-0-0"}
    | {"speech_vocab_size": "33-9-9", "speech_zeroemb_idx": "32-8-8", "tie_word_embeddings": True}
    | {"hidden_size": 48, "head_dim": 8, "num_attention_heads": 6, "num_key_value_heads": 6}
    | {"num_hidden_layers": 1, "intermediate_size": 40}
    | {"local_dim": 24, "local_attn_heads": 3, "local_layers": 1, "local_ffn_dim": 20}
    | {"input_local_dim": None, "input_local_layers": 3},
    codec={"ln_type": "RMSNorm", "avg_pooler": 1, "d_model": 36}
    | {"num_quantizers": 5, "codebook_size": [32, 8, 8]}
    | {"encoder_layers": 2, "encoder_attention_heads": 3, "encoder_ffn_dim": 30}
    | {"encoder_skip_layer_id": None}
    | {"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 44}
    | {"vocoder_dim": 24, "vocoder_num_layers": 1, "vocoder_attention_heads": 3}
    | {"vocoder_intermediate_dim": 20, "vocoder_attn_window_size": [12, 3]},
)

# Twelve channels, a group of 5, delays that leave steps at which no channel is active, one
# key-value head.
WIDE = Variant(
    lm={"audio_channels": 12, "group_size": 5, "delay_pattern": "0-1-0-2-17-17-3-0-1-24-0-5"}
    | {"speech_vocab_size": "-".join(["65"] * 2 + ["17"] * 10)}
    | {"speech_zeroemb_idx": "-".join(["64"] * 2 + ["16"] * 10)}
    | {"hidden_size": 80, "head_dim": 32, "num_attention_heads": 5, "num_key_value_heads": 1}
    | {"num_hidden_layers": 3, "local_dim": 40, "local_attn_heads": 4, "local_layers": 3}
    | {"input_local_dim": 32, "input_local_layers": 1, "input_full_attention": False},
    codec={"sampling_rate": 16000, "hop_length": 160, "nfft": 640, "window_size": 640}
    | {"n_mels": 80, "d_model": 96}
    | {"encoder_attention_heads": 6, "encoder_causal": True, "encoder_layers": 4}
    | {"encoder_attn_window_size": [30, 5], "encoder_skip_layer_id": 1}
    | {"decoder_attention_heads": 3, "decoder_attn_window_size": [50, -1], "decoder_layers": 3}
    | {"decoder_kernel_size": 4},
)

# A delay longer than the group, out of order, and channels that all start late.
LATE = Variant(
    lm={"audio_channels": 3, "group_size": 2, "delay_pattern": "1-6-2"}
    | {"speech_vocab_size": "65-65-17", "speech_zeroemb_idx": "64-64-16"}
    | {"num_key_value_heads": 4, "input_local_dim": 64, "local_dim": 64},
    codec={"num_quantizers": 3, "codebook_size": [64, 64, 16], "avg_pooler": 4},
)

VARIANTS = {"kit": KIT, "small": SMALL, "wide": WIDE, "late": LATE}


@dataclass(frozen=True)
class Loaded:
    model: mimo_fast.MimoAudio
    tensors: dict[str, Tensor]


def random_prompt(config: LMConfig, empty_id: int, groups: int) -> Tensor:
    """Ids [C + 1, T G] of alternating text and audio, with a few empty codes within patches."""
    generator = torch.Generator().manual_seed(groups)
    text = torch.randint(0, 256, (groups,), generator=generator)
    text[1::2] = empty_id
    codes = torch.stack(
        [
            torch.randint(0, size, (groups, config.group_size), generator=generator)
            for size in config.code_sizes
        ]
    )
    codes[:, 0::2] = torch.tensor(config.empty_codes)[:, None, None]
    channel = torch.full((groups, config.group_size), -100)
    channel[:, 0] = text
    return torch.cat((channel[None], codes)).flatten(1)
