"""The vocoder of the published depth: trained over a codec that stays as it is, and written."""

from dataclasses import replace

import torch
from helpers import snr_db
from test_training import dead_leaves

from training import codec, vocoder
from training.export import write_pair
from training.parameters import build_codec
from training.vocoder import VocoderTraining, deep_codec, deep_config, export_vocoder


def test_a_vocoder_is_trained_alone_and_read_again(lm_training, codec_training, parts, tmp_path):
    before = {name: tensor.detach().clone() for name, tensor in codec_training.tensors.items()}
    training = VocoderTraining(tmp_path, parts, before, replace(vocoder.SCHEDULE, steps=1))
    assert not dead_leaves(training.run.trained, training.losses(0)["loss"])
    fresh = {name: tensor.detach().clone() for name, tensor in training.tensors.items()}
    training.train()
    changed = {name for name, x in training.tensors.items() if not torch.equal(fresh[name], x)}
    assert changed
    assert all(name.startswith("decoder.vocoder.") for name in changed)
    kept = [name for name in training.tensors if not name.startswith("decoder.vocoder.")]
    assert all(torch.equal(before[name], training.tensors[name]) for name in kept)

    _, rest = write_pair(
        tmp_path, lm_training.tensors, before, parts["replies"], dtype=torch.float32
    )
    export_vocoder(tmp_path, tmp_path / "vocoder.safetensors")
    wav = parts["unheard"][0].wav
    with torch.no_grad():
        trained = build_codec(deep_config(), training.tensors)
        codes = trained.encode(wav)
        read = deep_codec(tmp_path / "vocoder.safetensors", rest)
        # The exported one is quieter, and its weights are rounded to float16.
        got = read.decode(codes) / vocoder.LEVEL
        assert torch.equal(read.encode(wav), codes)
        assert snr_db(got, trained.decode(codes)) > 30
        assert read.receptive_patches == 10
        assert codec.codec_config().vocoder_layers == 2
