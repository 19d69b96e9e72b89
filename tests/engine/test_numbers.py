"""Logits, scores and embeddings: those of the network, whatever the chunks, and none at all when reading was aborted."""

from __future__ import annotations

import threading

import pytest
import torch

from qwen2.model import packed_attend
from tests.engine.oracle import network_logits


def test_logits_score_and_embed_are_the_networks(llm, model):
    ids = llm.tokenizer.encode("The quick brown fox")
    expected = network_logits(model, ids)
    logits = llm.logits("The quick brown fox")
    assert logits.dtype == torch.float32
    assert not logits.is_inference()  # those who look inside may differentiate what they build on it
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    steps = expected.log_softmax(-1)
    assert llm.score(ids)[0][0] is None
    assert llm.score(["The quick brown fox", "ab"])[0][1:] == pytest.approx([float(steps[i, t]) for i, t in enumerate(ids[1:])], abs=1e-4)
    with torch.inference_mode():
        hidden = model.network(torch.tensor(ids), packed_attend(model.config, torch.arange(len(ids)), [len(ids)]))
    mean = torch.nn.functional.normalize(hidden.mean(0), dim=-1)
    embeddings = llm.embed(["ab", "The quick brown fox"])
    assert embeddings.shape == (2, 64)
    torch.testing.assert_close(embeddings[1], mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(embeddings.norm(dim=-1), torch.ones(2))


def test_long_texts_are_read_in_chunks_with_the_same_numbers(make_llm, model, monkeypatch):
    text = "x1y2z3" * 30
    monkeypatch.setattr("qwen2.engine.logprobs.LOGIT_ELEMENTS", 512 * 4)  # four rows of logits at a time
    whole, chunked = make_llm(model), make_llm(model)
    chunked.engine.scheduler.chunk = 13
    torch.testing.assert_close(chunked.logits(text), whole.logits(text), rtol=1e-4, atol=1e-4)
    assert chunked.score(text)[0][1:] == pytest.approx(whole.score(text)[0][1:], abs=1e-4)
    torch.testing.assert_close(chunked.embed([text, "b"]), whole.embed([text, "b"]), rtol=1e-4, atol=1e-5)
    assert chunked.score("a") == [[None]]


def test_a_vector_has_the_same_bits_in_any_chunks(llm):
    hidden, vectors = torch.randn(50, 64, generator=torch.Generator().manual_seed(0)), []
    for sizes in ([50], [7, 43], [1] * 50):
        (read,), vector = llm.embedding_requests(["a"])
        for piece in hidden.split(sizes):
            read.reader(piece)
        vectors.append(vector())
    assert torch.equal(vectors[0], vectors[1])
    assert torch.equal(vectors[0], vectors[2])


@pytest.mark.parametrize("read", [lambda llm, text: llm.logits(text), lambda llm, text: llm.score(text), lambda llm, text: llm.embed(text)])
def test_reading_that_was_aborted_gives_no_numbers(llm, monkeypatch, read):
    llm.engine.scheduler.chunk = 8
    forward = llm.engine.runner.forward

    def aborted(batch):  # as another thread may, in the middle of the first chunk
        thread = threading.Thread(target=llm.abort)
        thread.start()
        thread.join()
        return forward(batch)

    monkeypatch.setattr(llm.engine.runner, "forward", aborted)
    with pytest.raises(RuntimeError, match=r"^reading 20 tokens was aborted, by abort\(\) or in another thread; ask again$"):
        read(llm, "x" * 20)
