"""Training: gradients, resuming, and an export that runs as it was trained."""

import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import seeded
from safetensors.torch import load_file
from torch import Tensor

import mimo_fast
from mimo_fast.kernels.sample_codes import sample_codes
from mimo_fast.runtime.lm.executor import layer_by_layer
from mimo_fast.runtime.lm.teacher_forcing import code_logits, hidden_states
from mimo_fast.sampling import GREEDY, sampler_tensors
from training import codec, decoder, lm
from training.codec import CodecTraining
from training.decoder import DecoderTraining
from training.export import export_lm, write_pair
from training.lm import LMTraining, batch_losses
from training.loop import save_state
from training.parameters import Tensors, embed_codebooks
from training.start import start_from

ROOT = Path(__file__).parents[2]


def dead_leaves(leaves: Tensors, loss: Tensor) -> list[str]:
    gradients = torch.autograd.grad(loss, [*leaves.values()], allow_unused=True)
    pairs = zip(leaves, gradients, strict=True)
    return [name for name, gradient in pairs if gradient is None or not gradient.abs().sum() > 0]


def test_gradients_reach_every_leaf_of_the_codec(codec_training):
    for step in (0, codec_training.run.schedule.steps - 1):
        assert not dead_leaves(codec_training.run.trained, codec_training.losses(step)["loss"])


def test_gradients_reach_every_leaf_of_the_language_model(lm_training):
    rng = random.Random(0)
    examples = [lm_training.examples.draw(task, rng) for task in lm.JOINT for _ in range(2)]
    batch = lm.collate(examples, lm_training.config, 0)
    projections = list[Tensor]()
    states = list[Tensor]()
    text, codes_loss = batch_losses(lm_training.model(), batch, None, projections, states)
    heard = lm_training.heard(projections, batch.spans)
    phones = lm_training.phones(states[0], batch.phones)
    assert not dead_leaves(lm_training.run.trained, text + heard + phones + codes_loss.sum())


def test_the_decoder_is_trained_for_the_codes_there_are(parts, codec_training, tmp_path):
    before = {name: tensor.detach().clone() for name, tensor in codec_training.tensors.items()}
    training = DecoderTraining(tmp_path, parts, before, replace(decoder.SCHEDULE, steps=2))
    assert not dead_leaves(training.run.trained, training.losses(0)["loss"])
    training.train()
    wav = parts["unheard"][0].wav
    was, now = (codec.build_codec(training.config, x) for x in (before, training.tensors))
    assert torch.equal(was.encode(wav), now.encode(wav))
    changed = {name for name, x in training.tensors.items() if not torch.equal(before[name], x)}
    assert changed
    assert all(name.startswith("decoder.") for name in changed)


def test_code_embeddings_begin_as_the_codec_hears():
    generator = seeded(0)
    sizes = {20: 1.0, 10: 0.5, 11: 0.25}
    books = [torch.randn(n, 12, generator=generator) * scale for n, scale in sizes.items()]
    tables = [torch.randn(len(book) + 1, 16) for book in books]
    tensors = {f"speech_embeddings.{i}.weight": table for i, table in enumerate(tables)}
    embed_codebooks(tensors, books, [torch.rand(len(book), generator=generator) for book in books])
    codes = torch.stack([torch.randint(len(book), (30,), generator=generator) for book in books])
    heard = sum(book[indices] for book, indices in zip(books, codes, strict=True))
    tables = tensors.values()
    # Of 16 coordinates the codec's 12 directions take the first.
    embedded = sum(table[indices][:, :12] for table, indices in zip(tables, codes, strict=True))
    ratio = torch.pdist(embedded) / torch.pdist(heard)
    assert ratio.std() < 1e-3 * ratio.mean(), "distances between frames are kept"


def test_what_is_exported_is_what_was_trained(lm_training, codec_training, parts, tmp_path):
    trained = lm_training.tensors, codec_training.tensors
    pair = write_pair(tmp_path, *trained, parts["replies"], torch.float32)
    model = mimo_fast.load(*pair, device="cpu")
    wav = parts["unheard"][0].wav
    trained = codec.build_codec(codec_training.config, codec_training.tensors)
    assert torch.equal(model.codec.encode(wav), trained.encode(wav))
    got = model.codec.decode(model.codec.encode(wav))
    assert torch.equal(got, trained.decode(trained.encode(wav)))
    batch = lm.collate([lm_training.examples.transcription("unheard", 0)], lm_training.config, 0)
    with torch.no_grad():
        lms = model.lm, lm_training.model()
        hidden, own = (hidden_states(each, batch.text, batch.codes) for each in lms)
        # Native calls, which weights in training do not take, add in another order.
        got, want = (each.text_logits(x) for each, x in zip(lms, (hidden, own), strict=True))
        assert torch.allclose(got, want, atol=1e-4)
    # Its own moments are stated, so a stream waits for what the vocoder sees and no longer.
    stream, sounds = model.codec.stream(), model.codec.encode(parts["replies"][0].wav)
    lengths = [len(stream.push(patch)) for patch in sounds.split(4, dim=1)]
    assert model.codec.receptive_patches == 1
    assert lengths[0] == 0 < lengths[1]
    assert [*model.stream("tts", "seven", seed=0, max_new_tokens=3)][-1].timing.groups == 3


@pytest.mark.slow
def test_a_run_goes_on_from_a_pair(lm_training, codec_training, parts, tokenizer, tmp_path):
    pair = tmp_path / "pair"
    write_pair(pair, lm_training.tensors, codec_training.tensors, parts["replies"], torch.float16)
    start_from(pair, tmp_path / "run")
    heard = CodecTraining(tmp_path / "run", parts, replace(codec.SCHEDULE, steps=2), seed=5)
    said = LMTraining(tmp_path / "run", lm_training.codes, tokenizer, seed=5)
    for again, before in ((heard, codec_training), (said, lm_training)):
        assert again.run.step == 0
        rounded = {name: before.tensors[name].half().float() for name in again.tensors}
        kept = {name for name in rounded if torch.equal(again.tensors[name], rounded[name])}
        assert len(kept) > 0.8 * len(again.tensors), "all but what only training has"
    books = [book.clone() for book in heard.quantizer.books]
    heard.train()
    pairs = zip(heard.quantizer.books, books, strict=True)
    assert all((new - old).norm() < 0.5 * old.norm() for new, old in pairs)


@pytest.mark.slow
def test_what_hears_more_is_between_what_was_and_what_was_trained(
    lm_training, codec_training, parts, tmp_path
):
    pair, run = tmp_path / "pair", tmp_path / "run"
    write_pair(pair, lm_training.tensors, codec_training.tensors, parts["replies"], torch.float32)
    trained = {name: tensor + 1 for name, tensor in lm_training.tensors.items()}
    run.mkdir()
    save_state(run / "lm.safetensors", trained, step=9)
    export_lm(run, pair, tmp_path / "new", share=0.25)
    before, after = (load_file(each / "lm/model.safetensors") for each in (pair, tmp_path / "new"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.allclose(after[name], tensor + 0.25, atol=1e-5)
    assert model_files(tmp_path / "new") == model_files(pair)
    mimo_fast.load(tmp_path / "new/lm", tmp_path / "new/codec", device="cpu").close()


def model_files(pair):
    """Everything in it but the language model's weights."""
    files = (file for file in pair.rglob("*") if file.is_file())
    return {
        str(file.relative_to(pair)): file.read_bytes()
        for file in files
        if file.parts[-2:] != ("lm", "model.safetensors")
    }


def test_float16_on_disk_is_float32_in_memory(lm_training, codec_training, parts, tmp_path):
    trained = lm_training.tensors, codec_training.tensors
    pair = write_pair(tmp_path, *trained, parts["replies"], torch.float16)
    model = mimo_fast.load(*pair, device="cpu")
    assert model.lm.dtype == model.codec.dtype == torch.float32
    name = "model.layers.0.mlp.down_proj.weight"
    (block,) = model.lm.backbone.layers[0].down.blocks
    assert torch.equal(block, lm_training.tensors[name].half().float())
    assert sum(file.stat().st_size for part in pair for file in part.iterdir()) < 16.6e6


@torch.no_grad()
def test_teacher_forcing_is_step_by_step_decoding(loaded, monkeypatch):
    # Heads are recorded where no native call holds them.
    monkeypatch.setenv("MIMO_FAST_KERNELS", "torch")
    model, config = loaded.model.lm, loaded.model.lm.config
    monkeypatch.setattr(model, "_executor", layer_by_layer(model.network))
    ids = loaded.model.get_tts_sft_prompt("It works.", template=0).cpu()
    state, slot = model.new_state([0], 64), torch.tensor([0])
    heads: list[Tensor] = []

    def recorded(hidden: Tensor, step, table: Tensor, *rest):
        heads.append(hidden @ table.T)
        return sample_codes(hidden, step, table, *rest)

    monkeypatch.setattr("mimo_fast.runtime.lm.executor.sample_codes", recorded)
    prompt = ids.unflatten(1, (-1, config.group_size))
    text, groups = prompt[0, :, 0].tolist(), [*prompt[1:].transpose(0, 1)]
    model.prefill(ids, state, 0)
    start, hidden, greedy = len(text), [state.hidden[0].clone()], sampler_tensors([GREEDY])
    for _ in range(6):
        patch = model.sample_patch(state, slot, greedy)[0]
        model.stage(state, 0, model.empty_id, patch)
        text.append(model.empty_id)
        groups.append(patch)
        model.step(state, slot)
        hidden.append(state.hidden[0].clone())
    forced = hidden_states(model, torch.tensor([text]), torch.stack(groups)[None])[0]
    stepped = model.text_logits(torch.stack(hidden)).log_softmax(-1)
    assert (model.text_logits(forced[start - 1 :]).log_softmax(-1) - stepped).abs().max() < 1e-4
    logits = code_logits(model, forced[start - 1 : -1], torch.stack(groups[start:]))
    by_patch = torch.stack(heads).view(6, config.patch_steps, -1)
    splits = by_patch.split(config.code_sizes, dim=-1)
    for delay, got, all_steps in zip(config.delays, logits, splits, strict=True):
        want = all_steps[:, delay : delay + config.group_size].log_softmax(-1)
        assert (got.log_softmax(-1) - want).abs().max() < 1e-4


@pytest.mark.slow
def test_a_resumed_run_is_an_uninterrupted_one(parts, tmp_path):
    steps = 4

    def trained(directory: Path, stops: list[int]) -> Tensors:
        for stop in stops:
            training = CodecTraining(directory, parts, replace(codec.SCHEDULE, steps=steps))
            while training.run.step < stop:
                training.run._advance(training.losses)
            training.run.save()
        return training.tensors

    once, twice = trained(tmp_path / "once", [steps]), trained(tmp_path / "twice", [2, steps])
    assert all(torch.equal(once[name], twice[name]) for name in once)


@pytest.mark.slow
def test_smoke(tmp_path):
    """Everything, end to end, as on a machine without flite."""
    command = [sys.executable, "-m", "training", "--smoke", "--workers", "2"]
    environment = os.environ | {"PATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    options = {"capture_output": True, "text": True, "check": False}
    done = subprocess.run(command, cwd=ROOT, env=environment, **options)
    assert done.returncode == 0, done.stderr
    assert "tones stand in for its speech" in done.stderr
    assert "skipped: evaluation, which needs flite" in done.stderr
    assert done.stderr.endswith("the smoke test has passed\n")
