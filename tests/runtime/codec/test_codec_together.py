"""Chunks of several streams decoded in one call: each stream's samples are those it has alone."""

import random

import torch
from test_codec_stream import cut, random_codes, stream_in
from torch import Tensor

from mimo_fast.runtime.codec.together import Push


def test_streams_of_any_age_in_one_call(model):
    codec, rng = model.codec, random.Random(0)
    forms = [{}, {"lookahead": "elastic"}, {"lookahead": 1}, {"again": 0}]
    totals = [3, 60, 84, 92]
    codes = [random_codes(codec.config, total, i, 8) for i, total in enumerate(totals)]
    streams = [codec.stream(**form) for form in forms]
    pushes = [list(each.split(cut(each.shape[1], [4, 1, 9]), dim=1)) for each in codes]
    sizes = [[push.shape[1] for push in each] for each in pushes]
    found: list[list[Tensor]] = [[] for _ in streams]
    live = set(range(len(streams)))
    while live:
        chosen = rng.sample(sorted(live), rng.randint(1, len(live)))
        asked = [Push(streams[i], pushes[i].pop(0) if pushes[i] else None) for i in chosen]
        asked = [Push(each.stream, each.codes, each.codes is None) for each in asked]
        for i, push, got in zip(chosen, asked, codec.advance(asked), strict=True):
            assert isinstance(got, Tensor)
            found[i].append(got)
            live -= {i} if push.ended else set()
    for i, form in enumerate(forms):
        assert all(map(torch.equal, found[i], stream_in(codec, codes[i], sizes[i], **form)))


def test_a_stream_that_fails_is_the_only_one(model):
    codec = model.codec
    codes, wrong = random_codes(codec.config, 60), torch.full((8, 60), -1)
    streams = [codec.stream() for _ in range(3)]
    streams[1].close()
    asked = [Push(streams[0], codes), Push(streams[1], wrong), Push(streams[2], codes, True)]
    got = codec.advance(asked)
    assert isinstance(got[1], ValueError)
    assert torch.equal(got[0], codec.stream().push(codes))
    assert torch.equal(got[2], codec.stream().finish(codes))
