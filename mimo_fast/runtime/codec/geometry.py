"""Stream geometry from the codec's configuration alone: frames, overlaps and look-ahead."""

from typing import Literal

from mimo_fast.config import CodecConfig

Lookahead = int | Literal["exact", "elastic"]
"""How far a stream looks ahead: patches, `default_lookahead`'s, or `elastic_rows`."""

PATCH_FRAMES = 4
"""Code frames of a patch, 160 ms."""

LOOKAHEAD = 10
"""Look-ahead of the published codec in patches: 16 vocoder layers of 10 frames of 10 ms."""


def vocoder_frames(config: CodecConfig, codes: int) -> int:
    """Vocoder frames of so many code frames."""
    return codes * config.pool * config.decoder_stride


def patch_rows(config: CodecConfig) -> int:
    """Vocoder frames of a patch."""
    return vocoder_frames(config, PATCH_FRAMES)


def receptive_patches(config: CodecConfig) -> int:
    """Patches after a sample that can still change it."""
    return -(-config.vocoder_layers * config.vocoder_window[1] // patch_rows(config))


def default_lookahead(config: CodecConfig, given: bool = False) -> int:
    """Patches that a stream waits for before it returns a sample.

    LOOKAHEAD or, if the norm statistics are known (`given` or in the config), the vocoder's reach.
    """
    known = given or config.moments is not None
    return min(LOOKAHEAD, receptive_patches(config)) if known else LOOKAHEAD


def elastic_reach(config: CodecConfig) -> int:
    """Patches that an elastic stream holds back in the end."""
    return min(LOOKAHEAD, receptive_patches(config))


def elastic_rows(config: CodecConfig, rows: int) -> int:
    """Vocoder frames that an elastic stream holds back once it has `rows` of them.

    One patch at first, then half of what has come, up to the vocoder's reach: a patch more for
    each two that come. What a listener has in hand never shrinks while a patch takes at most half
    of the time that it plays:

        patches pushed   2    3    4    5    6   ...  2 reach   2 reach + 1
        held back        1   1.5   2   2.5   3         reach       reach
        returned         1   1.5   2   2.5   3         reach     reach + 1
    """
    patch = patch_rows(config)
    return min(elastic_reach(config) * patch, max(patch, rows // 2))


def decoder_weights(config: CodecConfig) -> int:
    """Weights of the decoder's matrices: the products of one position."""
    width, ffn = config.dim, config.decoder_ffn
    return config.decoder_layers * (4 * width * width + 2 * width * ffn)


def streamable(config: CodecConfig) -> bool:
    """Whether the codec looks ahead no farther than its vocoder's window."""
    return config.decoder_causal and min(config.vocoder_window) >= 0


def conv_overlap(kernel: int, stride: int) -> int:
    """Output rows of a transposed convolution's input that the next input adds to."""
    return max(0, kernel - stride)
