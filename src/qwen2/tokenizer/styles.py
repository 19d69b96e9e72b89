"""The two chat formats that we write ourselves: Qwen2's and Qwen2.5's, without and with tools.

A conversation becomes spans. A span knows whether it is ours (control strings in it are control tokens) or came from people,
documents and models (they are text), and whether an assistant sampled it (then training has a loss on it).

Sources: the chat templates of Qwen2-Instruct and Qwen2.5-Instruct, and Qwen-Agent for tools with Qwen2 (keywords in plain text,
one call, its result and what follows in one and the same assistant turn; English, one call at a time).
What is left out: Qwen-Agent's Chinese and parallel wordings, and its code interpreter, whose input is no JSON.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qwen2.tokenizer.messages import ToolCall, Turn, dump_json

CHAT_CONTROL = ("<|im_start|>", "<|im_end|>")
QWEN2_SYSTEM = "You are a helpful assistant."
QWEN2_5_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."

# The template of Qwen2-Instruct with its default system prompt left open: SmolLM2's, for one, differs in nothing else.
QWEN2_JINJA = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nSYSTEM<|im_end|>\\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

HERMES_BEFORE = (
    "\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
HERMES_AFTER = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    '<tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
)
AGENT_COMMAND = (
    "\n\n## When you need to call a tool, please insert the following command in your reply, "
    "which can be called zero or multiple times according to your needs:\n\n"
    "✿FUNCTION✿: The tool to use, should be one of [{names}]\n✿ARGS✿: The input of the tool\n✿RESULT✿: Tool results\n"
    "✿RETURN✿: Reply based on tool results. Images need to be rendered as ![](url)"
)


@dataclass(frozen=True)
class Span:
    """A stretch of the prompt."""

    text: str
    ours: bool = False
    sampled: bool = False


class Spans(list[Span]):
    """A list of spans with a word for each kind."""

    def ours(self, text: str) -> None:
        """Format, written by us."""
        self.append(Span(text, ours=True))

    def given(self, text: str) -> None:
        """From people, documents, tools."""
        self.append(Span(text))

    def sampled(self, text: str, ours: bool = False) -> None:
        """By the assistant; `ours` for the format's own marks in it."""
        self.append(Span(text, ours=ours, sampled=True))


def qwen2_5(turns: list[Turn], tools: list[dict[str, Any]], default_system: str, prompt: bool) -> Spans:
    """Qwen2.5's format; calls and results between XML-like tags."""
    spans = Spans()
    system = turns[0].content if turns[0].role == "system" else default_system
    spans.ours("<|im_start|>system\n")
    spans.given(system)
    if tools:
        spans.ours(HERMES_BEFORE)
        for i, tool in enumerate(tools):
            spans.given("\n" + dump_json(tool, f"tools[{i}]"))
        spans.ours(HERMES_AFTER)
    spans.ours("<|im_end|>\n")
    rest = turns[turns[0].role == "system" :]
    for i, turn in enumerate(rest):
        if turn.role == "tool":
            first = i == 0 or rest[i - 1].role != "tool"
            last = i + 1 == len(rest) or rest[i + 1].role != "tool"
            _result(spans, turn.content, first, last)
        else:
            _turn(spans, turn)
    if prompt:
        spans.ours("<|im_start|>assistant\n")
    return spans


def _turn(spans: Spans, turn: Turn) -> None:
    spans.ours(f"<|im_start|>{turn.role}\n")
    if turn.role != "assistant":
        spans.given(turn.content)
        spans.ours("<|im_end|>\n")
        return
    spans.sampled(turn.content)
    for i, call in enumerate(turn.calls):
        between = "\n" if turn.content or i else ""
        spans.sampled(between + '<tool_call>\n{"name": "', ours=True)
        spans.sampled(call.name)
        spans.sampled('", "arguments": ', ours=True)
        spans.sampled(call.arguments)
        spans.sampled("}\n</tool_call>", ours=True)
    _end(spans)


def _end(spans: Spans) -> None:
    spans.sampled("<|im_end|>", ours=True)
    spans.ours("\n")


def _result(spans: Spans, content: str, first: bool, last: bool) -> None:
    """Results in a row share one user turn."""
    if first:
        spans.ours("<|im_start|>user")
    spans.ours("\n<tool_response>\n")
    spans.given(content)
    spans.ours("\n</tool_response>")
    if last:
        spans.ours("<|im_end|>\n")


def qwen2(turns: list[Turn], tools: list[dict[str, Any]], default_system: str, prompt: bool) -> Spans:
    """Qwen2's format; tools as Qwen-Agent writes them."""
    spans = Spans()
    if turns[0].role != "system":
        turns = [Turn("system", default_system), *turns]
    for i, turn in enumerate(turns):
        follower = turns[i + 1].role if i + 1 < len(turns) else None
        if turn.role == "tool":
            _agent_result(spans, turn, turns[i - 1], follower, prompt)
        elif turn.role == "assistant":
            _agent_turn(spans, turn, after_result=turns[i - 1].role == "tool", follower=follower)
        else:
            spans.ours(f"<|im_start|>{turn.role}\n")
            spans.given(turn.content + (_agent_tools(tools) if i == 0 and tools else ""))
            spans.ours("<|im_end|>\n")
    if prompt and turns[-1].role != "tool":  # after a result the open turn goes on
        spans.ours("<|im_start|>assistant\n")
    return spans


def _agent_tools(tools: list[dict[str, Any]]) -> str:
    functions = [tool["function"] for tool in tools]
    blocks = [
        f"### {function['name']}\n\n{function['name']}: {function.get('description') or ''} "
        f"Parameters: {dump_json(function.get('parameters', {}), 'parameters')} Format the arguments as a JSON object."
        for function in functions
    ]
    head = "\n\n# Tools\n\n## You have access to the following tools:\n\n"
    return head + "\n\n".join(blocks) + AGENT_COMMAND.format(names=",".join(function["name"] for function in functions))


def _agent_turn(spans: Spans, turn: Turn, after_result: bool, follower: str | None) -> None:
    """Content and calls. After a result the prompt ended at `✿RETURN✿`, so the `: ` is the model's."""
    if not after_result:
        spans.ours("<|im_start|>assistant\n")
    text = (": " if after_result else "") + turn.content
    for call in turn.calls:
        text += ("\n" if text else "") + _agent_call(call)
    spans.sampled(text)
    if follower != "tool":
        _end(spans)


def _agent_call(call: ToolCall) -> str:
    return f"✿FUNCTION✿: {call.name}\n✿ARGS✿: {call.arguments}"


def _agent_result(spans: Spans, turn: Turn, before: Turn, follower: str | None, prompt: bool) -> None:
    """A result; the mark before the first one is the model's, for it is what its call stops at."""
    if before.role not in ("assistant", "tool"):
        raise ValueError(f"a tool result follows a {before.role!r} message; in this format it follows the assistant's call")
    if before.role == "assistant":
        spans.sampled("\n✿RESULT✿")
        spans.given(": " + turn.content)
    else:
        spans.given("\n✿RESULT✿: " + turn.content)
    if follower == "tool":
        return
    spans.given("\n✿RETURN✿")
    if follower != "assistant" and not (follower is None and prompt):
        spans.given(": ")  # nothing was said after the result
        _end_unsaid(spans)


def _end_unsaid(spans: Spans) -> None:
    spans.ours("<|im_end|>\n")
