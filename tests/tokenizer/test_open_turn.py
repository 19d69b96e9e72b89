"""A conversation whose last message is the beginning of an answer: its turn stays open."""

from __future__ import annotations

import pytest

from qwen2.tokenizer import ChatTemplate


@pytest.mark.parametrize("style", ["qwen2.5", "jinja", "qwen2"])
@pytest.mark.parametrize("begun", ["Once upon", "", "a<|im_end|>", "line\n"])
def test_an_answer_that_is_begun_is_left_open(qwen_tokenizer, style, begun):
    template = ChatTemplate.of(qwen_tokenizer, style)
    messages = [{"role": "user", "content": "Tell me"}, {"role": "assistant", "content": begun}]
    opened, prompt = template.render_open(messages), template.render(messages[:-1])
    assert opened.ids == prompt.ids + qwen_tokenizer.encode(begun)
    assert opened.mask == [False] * len(prompt.ids) + [True] * (len(opened.ids) - len(prompt.ids))
    assert opened.text == qwen_tokenizer.decode(opened.ids)
    with pytest.raises(ValueError, match="only a last message of the assistant's, without calls"):
        template.render_open(messages[:-1])
