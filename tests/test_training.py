"""The training package: gradients, codebooks, data and resuming; and that what is trained is what the package runs."""

import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import mimo_fast
from mimo_fast.kernels.rvq import rvq_encode
from mimo_fast.kernels.sample_codes import sample_codes
from mimo_fast.runtime.teacher_forcing import code_logits, hidden_states
from mimo_fast.sampling import GREEDY, sampler_tensors
from mimo_fast.templates import ASR_TEMPLATES, TTS_TEMPLATES
from training import codec, codes, data, decoder, domain, lm, synthesis
from training.codec import CodecTraining
from training.decoder import DecoderTraining
from training.export import write_pair
from training.lm import LMTraining, batch_losses
from training.parameters import Tensors, embed_codebooks
from training.rvq import Quantizer
from training.tokenizer import INSTRUCTIONS, build_tokenizer

SIZES = data.Sizes(
    6, 12, 5, 6, 4, readings=4, strangers=4, strange_words=4, strange_questions=4, repeats=2, unheard=2, unsaid=2
)
STEPS = 4
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, data.Part]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthesis, "has_flite", lambda: False)
        return data.make(tmp_path_factory.mktemp("data"), SIZES)


@pytest.fixture(scope="module")
def codec_training(parts, tmp_path_factory) -> CodecTraining:
    return CodecTraining(tmp_path_factory.mktemp("codec"), parts, replace(codec.SCHEDULE, steps=STEPS))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return build_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def lm_training(parts, codec_training, tokenizer, tmp_path_factory) -> LMTraining:
    config, directory = lm.lm_config(), tmp_path_factory.mktemp("lm")
    trained = codec.build_codec(codec_training.config, codec_training.tensors)
    found = codes.make(directory / "codes", parts, trained, config.channels, config.group_size)
    return LMTraining(directory, found, tokenizer, replace(lm.SCHEDULE, steps=STEPS))


def dead_leaves(leaves: Tensors, loss: Tensor) -> list[str]:
    gradients = torch.autograd.grad(loss, [*leaves.values()], allow_unused=True)
    pairs = zip(leaves, gradients, strict=True)
    return [name for name, gradient in pairs if gradient is None or not gradient.abs().sum() > 0]


def test_gradients_reach_every_leaf_of_the_codec(codec_training):
    for step in (0, STEPS - 1):
        assert not dead_leaves(codec_training.run.trained, codec_training.losses(step)["loss"])


def test_gradients_reach_every_leaf_of_the_language_model(lm_training):
    rng = random.Random(0)
    examples = [lm_training.examples.draw(task, rng) for task in lm.JOINT for _ in range(2)]
    batch, projections = lm.collate(examples, lm_training.config, 0), list[Tensor]()
    text, codes_loss = batch_losses(lm_training.model(), batch, None, projections)
    heard = lm_training.ctc(projections, batch.spans)
    assert not dead_leaves(lm_training.run.trained, text + heard + codes_loss.sum())


def test_words_are_looked_for_where_they_are_heard(lm_training):
    rng, examples = random.Random(1), lm_training.examples
    special, size = examples._tokenizer.special, lm_training.config.group_size
    expected = {"words": 6, "spliced": 1, "asr": 1, "written": 1, "dialogue": 1, "tts": 0, "styled": 0}
    for task in lm.JOINT:
        drawn = examples.draw(task, rng)
        text = drawn.ids[0, ::size]
        if task in expected:
            assert len(drawn.spans) == expected[task]
        else:
            assert len(drawn.spans) > 1
        for span in drawn.spans:
            assert text[span.start - 1] == special.sosp
            assert text[span.stop - 1] == special.eosp
            assert (text[span.start : span.stop - 1] == special.empty).all()
            assert span.words
            assert not drawn.learned[span.start : span.stop].any()


def test_a_word_is_written_where_it_is_said(lm_training, parts, tokenizer):
    examples, special, size = lm_training.examples, tokenizer.special, lm_training.config.group_size
    patch = 24_000 // 25 * size
    for part in ("replies", "readings", "answers"):
        spoken, text = parts[part][0], parts[part].item(0).text
        drawn = examples.reading(part, 0)
        said = drawn.ids[0, ::size][drawn.learned].tolist()
        written = [token for token in said if token != special.empty]
        assert written == [*tokenizer.encode(text), special.eot, special.eostm]
        patches, starts = 0, []
        for token in said:
            patches += token == special.empty
            if token not in (special.empty, special.eot, special.eostm):
                starts.append(patches * patch)
        seconds = [(word - spoken.words[0]) / 24_000 for word in spoken.words[:-1]]
        assert len(starts) == len(seconds)
        assert all(-0.16 - 0.1 < at / 24_000 - want < 0.11 for at, want in zip(starts, seconds, strict=True))
        assert patches * patch < spoken.words[-1] - spoken.words[0] + 0.4 * 24_000


def test_the_decoder_is_trained_for_the_codes_there_are(parts, codec_training, tmp_path):
    before = {name: tensor.detach().clone() for name, tensor in codec_training.tensors.items()}
    training = DecoderTraining(tmp_path, parts, before, replace(decoder.SCHEDULE, steps=2))
    assert not dead_leaves(training.run.trained, training.losses(0)["loss"])
    training.train()
    wav = parts["unheard"][0].wav
    was, now = (codec.build_codec(training.config, tensors) for tensors in (before, training.tensors))
    assert torch.equal(was.encode(wav), now.encode(wav))
    changed = {name for name in training.tensors if not torch.equal(before[name], training.tensors[name])}
    assert changed
    assert all(name.startswith("decoder.") for name in changed)


def test_codebooks_follow_what_chose_them(codec_training):
    config, generator = codec_training.config, torch.Generator().manual_seed(0)
    trained = codec_training.tensors.items()
    books = {name: tensor.clone() for name, tensor in trained if name.endswith("_codebook.embed")}
    quantizer = Quantizer(config, books)
    centres = torch.randn(40, config.dim, generator=generator) * 3

    def batch() -> Tensor:
        chosen = torch.randint(len(centres), (600,), generator=generator)
        return centres[chosen] + torch.randn(600, config.dim, generator=generator) * 0.01

    for _ in range(300):
        x = batch()
        quantizer.update(x, rvq_encode(x, quantizer.books), generator)
    quantized = quantizer(x := batch())
    nearest = torch.cdist(x, quantizer.books[0]).amin(1)
    assert nearest.max() < 0.05 * x.norm(dim=1).mean(), "every centre has a row of the first codebook"
    assert (quantized.rows - x).norm() < 0.01 * x.norm()


def test_an_unused_row_is_replaced_and_a_used_one_moves(codec_training):
    config = codec_training.config
    names = [f"encoder.quantizer.vq.layers.{i}._codebook.embed" for i in range(len(config.codebook_sizes))]
    shapes = zip(names, config.codebook_sizes, strict=True)
    tensors = {name: torch.zeros(size, config.dim) for name, size in shapes}
    quantizer = Quantizer(config, tensors)
    first = names[0].removesuffix(".embed")
    for name in names:
        tensors[name.replace(".embed", ".inited")].fill_(1)
        tensors[name.replace(".embed", ".cluster_size")].fill_(1)
    tensors[f"{first}.cluster_size"][7] = 0
    x = torch.ones(50, config.dim)
    replaced = quantizer.update(x, torch.zeros(len(names), 50, dtype=torch.int64), torch.Generator().manual_seed(0))
    assert replaced == 1
    assert torch.equal(tensors[names[0]][7], x[0])
    # 1% of the way from one position at zero to fifty at one.
    expected = 0.01 * 50 / (0.99 + 0.01 * 50)
    assert torch.allclose(tensors[names[0]][0], torch.full((config.dim,), expected), atol=1e-4)


def test_straight_through_passes_the_gradient_on(codec_training):
    x = torch.randn(5, codec_training.config.dim, requires_grad=True)
    quantized = codec_training.quantizer(x, torch.tensor([1, 2, 3, 8, 8]))
    (gradient,) = torch.autograd.grad(quantized.rows.sum(), x)
    assert torch.equal(gradient, torch.ones_like(x))
    books = codec_training.quantizer.books
    assert torch.allclose(quantized.rows[0], books[0][quantized.codes[0, 0]], atol=1e-5)


def test_data_is_the_same_every_time(parts, tmp_path, monkeypatch):
    monkeypatch.setattr(synthesis, "has_flite", lambda: False)
    again = data.make(tmp_path, SIZES)
    for name, part in parts.items():
        for i in range(len(part)):
            assert torch.equal(part[i].wav, again[name][i].wav)
            assert part[i].phones == again[name][i].phones
    wav = parts["speech"][0].wav
    noisy = data.augment(wav, random.Random(3))[0]
    assert torch.equal(noisy, data.augment(wav, random.Random(3))[0])
    assert not torch.equal(noisy, data.augment(wav, random.Random(4))[0])


def test_parts_keep_apart_what_is_held_out():
    assert all(domain.is_held_out(data.item("unsaid", i).text) for i in range(50))
    assert not any(domain.is_held_out(data.item(part, i).text) for part in ("speech", "replies") for i in range(200))
    assert {data.item("unheard", i).manner.voice for i in range(5)} == {data.UNHEARD_VOICE}
    assert data.UNHEARD_VOICE not in {data.item("speech", i).manner.voice for i in range(100)}
    strangers = [data.item("strangers", i) for i in range(100)]
    assert all(each.manner.voice.startswith(synthesis.ESPEAK) for each in strangers)
    assert not any(domain.is_held_out(each.text) for each in strangers)
    assert data.item("strange_questions", 3).text in domain.dialogue()
    texts = [data.item("speech", i).text for i in range(300)]
    assert {word for text in texts for word in text.split()} <= set(domain.vocabulary())
    assert domain.dialogue()["what day comes after sunday"] == "monday"
    assert domain.dialogue()["what is nine plus nine"] == "eighteen"
    assert domain.spoken("the word is a b") == "the word is ay b"
    assert domain.spoken("i see a dog") == "i see a dog"


def test_code_embeddings_begin_as_the_codec_hears():
    generator = torch.Generator().manual_seed(0)
    books = [torch.randn(size, 12, generator=generator) * 2.0**-i for i, size in enumerate((20, 10, 10))]
    tensors = {f"speech_embeddings.{i}.weight": torch.randn(len(book) + 1, 16) for i, book in enumerate(books)}
    embed_codebooks(tensors, books, [torch.rand(len(book), generator=generator) for book in books])
    codes = torch.stack([torch.randint(len(book), (30,), generator=generator) for book in books])
    heard = sum(book[indices] for book, indices in zip(books, codes, strict=True))
    tables = tensors.values()
    # Of 16 coordinates the codec's 12 directions take the first.
    embedded = sum(table[indices][:, :12] for table, indices in zip(tables, codes, strict=True))
    ratio = torch.pdist(embedded) / torch.pdist(heard)
    assert ratio.std() < 1e-3 * ratio.mean(), "distances between frames are kept"


def test_every_word_of_the_domain_is_a_token(tokenizer):
    for text in (*domain.vocabulary(), *ASR_TEMPLATES, *TTS_TEMPLATES["en"]):
        assert len(tokenizer.encode(text)) == 1, text
    assert tokenizer.decode(tokenizer.encode("Seven forty two")).strip() == "seven forty two"
    assert tokenizer.decode(tokenizer.encode("Naïve 7!")).strip() == "naïve 7!"
    assert len(tokenizer.encode(f": seven({INSTRUCTIONS['slow']})")) <= 6
    tokenizer.check_vocab(lm.lm_config().vocab_size)


def test_what_is_exported_is_what_was_trained(lm_training, codec_training, parts, tmp_path):
    pair = write_pair(tmp_path, lm_training.tensors, codec_training.tensors, parts["replies"], torch.float32)
    model = mimo_fast.load(*pair, device="cpu")
    wav = parts["unheard"][0].wav
    trained = codec.build_codec(codec_training.config, codec_training.tensors)
    assert torch.equal(model.codec.encode(wav), trained.encode(wav))
    got = model.codec.decode(model.codec.encode(wav))
    assert torch.equal(got, trained.decode(trained.encode(wav)))
    batch = lm.collate([lm_training.examples.transcription("unheard", 0)], lm_training.config, 0)
    with torch.no_grad():
        hidden, own = (hidden_states(each, batch.text, batch.codes) for each in (model.lm, lm_training.model()))
        # Native calls, which weights in training do not take, add in another order.
        assert torch.allclose(model.lm.text_logits(hidden), lm_training.model().text_logits(own), atol=1e-4)
    # Its own moments are stated, so a stream waits for what the vocoder sees and no longer.
    stream, sounds = model.codec.stream(), model.codec.encode(parts["replies"][0].wav)
    lengths = [len(stream.push(patch)) for patch in sounds.split(4, dim=1)]
    assert model.codec.receptive_patches == 1
    assert lengths[0] == 0 < lengths[1]
    assert [*model.stream("tts", "seven", seed=0, max_new_tokens=3)][-1].timing.groups == 3


def test_what_is_stored_in_float16_is_computed_in_float32(lm_training, codec_training, parts, tmp_path):
    pair = write_pair(tmp_path, lm_training.tensors, codec_training.tensors, parts["replies"], torch.float16)
    model = mimo_fast.load(*pair, device="cpu")
    assert model.lm.dtype == model.codec.dtype == torch.float32
    name = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(model.lm.backbone.layers[0].down.blocks[0], lm_training.tensors[name].half().float())
    assert sum(file.stat().st_size for part in pair for file in part.iterdir()) < 16e6


@torch.no_grad()
def test_teacher_forcing_is_step_by_step_decoding(loaded, monkeypatch):
    # Heads are recorded where no native call holds them.
    monkeypatch.setenv("MIMO_FAST_KERNELS", "torch")
    model, config = loaded.model.lm, loaded.model.lm.config
    ids = loaded.model.get_tts_sft_prompt("It works.", template=0).cpu()
    state, slot = model.new_state([0], 64), torch.tensor([0])
    heads: list[Tensor] = []

    def recorded(hidden: Tensor, step, table: Tensor, *rest):
        heads.append(hidden @ table.T)
        return sample_codes(hidden, step, table, *rest)

    monkeypatch.setattr("mimo_fast.runtime.lm.sample_codes", recorded)
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


def test_a_resumed_run_is_an_uninterrupted_one(parts, tmp_path):
    def trained(directory: Path, stops: list[int]) -> Tensors:
        for stop in stops:
            training = CodecTraining(directory, parts, replace(codec.SCHEDULE, steps=STEPS))
            while training.run.step < stop:
                training.run._advance(training.losses)
            training.run.save()
        return training.tensors

    once, twice = trained(tmp_path / "once", [STEPS]), trained(tmp_path / "twice", [2, STEPS])
    assert all(torch.equal(once[name], twice[name]) for name in once)


def test_smoke(tmp_path):
    """Everything, end to end, as on a machine without flite."""
    command = [sys.executable, "-m", "training", "--smoke", "--workers", "2"]
    environment = os.environ | {"PATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "tones stand in for speech" in done.stderr
    assert "skipped: evaluation, which needs flite" in done.stderr
    assert done.stderr.endswith("the smoke test has passed\n")
