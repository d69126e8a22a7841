"""Chat templates: the default model's, what templates may use, and what goes wrong in them."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyllm import _native
from pyllm.errors import ArgumentError, TemplateError
from pyllm.models import DEFAULT_MODEL, resolve
from pyllm.template import ChatTemplate

SMOLLM2 = (Path(__file__).parent / "data" / "smollm2-chat-template.jinja").read_text("utf-8")
SYSTEM = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
)
HI = [{"role": "user", "content": "hi"}]

messages = st.builds(
    lambda role, content: {"role": role, "content": content},
    st.sampled_from(["system", "user", "assistant"]),
    st.text(),
)


def render(source: str, conversation: Any = HI, **options: Any) -> str:
    return ChatTemplate(source, "<s>", "</s>").render(conversation, **options)


# ---- the default model's template ----


def test_the_copy_is_the_default_models_template() -> None:
    assert _native.File(resolve(DEFAULT_MODEL)).values()["tokenizer.chat_template"] == SMOLLM2


def test_smollm2_conversation() -> None:
    assert render(SMOLLM2) == SYSTEM + "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert render(SMOLLM2, add_generation_prompt=False) == SYSTEM + "<|im_start|>user\nhi<|im_end|>\n"
    own_system = [{"role": "system", "content": "Be brief."}, *HI]
    assert render(SMOLLM2, own_system, add_generation_prompt=False) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
    )


@settings(deadline=None)
@given(st.lists(messages, min_size=1, max_size=5), st.lists(messages, max_size=3))
def test_a_longer_conversation_begins_with_the_shorter_one(
    shorter: list[dict[str, str]], more: list[dict[str, str]]
) -> None:
    template = ChatTemplate(SMOLLM2)
    rendered = template.render(shorter, add_generation_prompt=False)
    assert template.render(shorter + more, add_generation_prompt=False).startswith(rendered)
    answer = {"role": "assistant", "content": "Yes."}
    with_answer = template.render([*shorter, answer], add_generation_prompt=False)
    assert with_answer == template.render(shorter) + "Yes.<|im_end|>\n"


def test_text_parts_are_joined_by_line_breaks() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert render("{{ messages[0].content }}", [{"role": "user", "content": parts}]) == "one\ntwo"


# ---- what a template may use ----


def test_tokens_of_the_vocabulary() -> None:
    assert render("{{ bos_token }}{{ messages[0]['content'] }}{{ eos_token }}") == "<s>hi</s>"


def test_block_lines_leave_no_whitespace() -> None:
    assert render("a\n  {% if true %}\nb\n  {% endif %}\nc") == "a\nb\nc"


def test_loop_controls_and_generation_blocks() -> None:
    assert render("{% for i in range(9) %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "012"
    assert render("{% generation %}{{ messages[0].content }}{% endgeneration %}!") == "hi!"


def test_tojson_is_plain_json() -> None:
    tools = [{"type": "function", "function": {"name": "größe", "description": "a < b & 'c'"}}]
    assert render("{{ tools | tojson }}", tools=tools) == (
        '[{"type": "function", "function": {"name": "größe", "description": "a < b & \'c\'"}}]'
    )
    assert render("{{ {'b': 1, 'a': 2} | tojson(indent=1, sort_keys=true) }}") == '{\n "a": 2,\n "b": 1\n}'


def test_absent_tools_and_unset_fields_are_false() -> None:
    assert render("{% if not tools and not messages[0].tool_calls %}plain{% endif %}") == "plain"


def test_strftime_now() -> None:
    before = datetime.now()
    rendered = datetime.strptime(render("{{ strftime_now('%Y-%m-%d %H:%M:%S') }}"), "%Y-%m-%d %H:%M:%S")
    assert before.replace(microsecond=0) <= rendered <= datetime.now()


def test_an_assistant_message_may_hold_tool_calls_instead_of_content() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    assert render("{{ messages[0].tool_calls[0].function.name }}", [call]) == "f"


# ---- what goes wrong in a template ----


@pytest.mark.parametrize(
    ("source", "line", "cause"),
    [
        ("a\n{% for m in messages %}", 2, "Unexpected end of template"),
        ("a\n\n{{ messages[ }}", 3, "unexpected"),
        ("{% nonsense %}", 1, "unknown tag 'nonsense'"),
        ("{{ 1 | no_such_filter }}", 1, "No filter named 'no_such_filter'"),
    ],
)
def test_syntax_errors_name_their_line(source: str, line: int, cause: str) -> None:
    with pytest.raises(TemplateError, match=f"the chat template, line {line}: .*{cause}"):
        ChatTemplate(source)


@pytest.mark.parametrize(
    ("source", "line", "cause"),
    [
        ("a\n{{ raise_exception('roles must alternate') }}", 2, "roles must alternate"),
        ("\n\n{{ messages[0].name.first }}", 3, "'dict object' has no attribute 'name'"),
        ("{{ no_such_function() }}", 1, "'no_such_function' is undefined"),
        ("{{ messages[0].content + 1 }}", 1, "str"),
        ("x\n{{ 1 / 0 }}", 2, "division by zero"),
        ("{{ messages.append(1) }}", 1, "'append' of 'list' object is unsafe"),
        ("{{ ''.__class__.__mro__ }}", 1, "'__class__' of 'str' object is unsafe"),
        ("{{ raise_exception('') }}", 1, "TemplateError"),
        ("{% macro m() %}{{ m() }}{% endmacro %}\n{{ m() }}", 1, "recursion"),
    ],
)
def test_errors_while_rendering_name_their_line(source: str, line: int, cause: str) -> None:
    with pytest.raises(TemplateError, match=f"the chat template, line {line}: .*{cause}"):
        render(source)


@pytest.mark.parametrize(
    ("source", "cause"),
    [
        (
            "{% for i in range(90000) %}{{ messages[0].content }}{% endfor %}",
            "50,000,000 characters of output",
        ),
        ("{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}", "1,000,000 steps"),
        ("{% for i in range(99999999999) %}{% endfor %}", "1,000,000 steps"),
        ("{{ messages[0].content * 1000000000 }}", "10000 items times 1000000000"),
        ("{{ 1000000000 * messages }}", "1 items times 1000000000"),
        ("{{ 10 ** 10 ** 10 }}", r"\*\* is not available"),
    ],
)
def test_runaway_templates_end(source: str, cause: str) -> None:
    with pytest.raises(TemplateError, match=f"line 1: .*{cause}"):
        render(source, [{"role": "user", "content": "x" * 10_000}])


def test_a_bound_is_for_one_rendering() -> None:
    template = ChatTemplate("{% for i in range(600000) %}{% endfor %}done")
    assert [template.render(HI), template.render(HI)] == ["done", "done"]


def test_a_template_too_deep_to_compile_is_an_error() -> None:
    with pytest.raises(TemplateError, match="the chat template"):
        ChatTemplate("{{ " + "(" * 10_000 + "1" + ")" * 10_000 + " }}")


def test_a_template_that_is_not_text_is_an_error() -> None:
    with pytest.raises(TemplateError, match="not text but bytes"):
        ChatTemplate(b"{{ 1 }}")  # type: ignore[arg-type]


# ---- messages of another shape ----


@pytest.mark.parametrize(
    ("conversation", "cause"),
    [
        ([], "at least one message"),
        ("hi", "at least one message"),
        ({"role": "user", "content": "hi"}, "at least one message"),
        (None, "at least one message"),
        (["hi"], r"messages\[0\] is str, not a mapping"),
        ([*HI, {"content": "hi"}], r"messages\[1\] has no role"),
        ([{"role": 3, "content": "hi"}], r"messages\[0\] has no role"),
        ([{"role": "user"}], r"messages\[0\]\.content must be a string or a list of text parts"),
        ([{"role": "user", "content": b"hi"}], r"messages\[0\]\.content must be"),
        ([{"role": "user", "content": []}], r"messages\[0\]\.content must be"),
        (
            [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]}],
            r"messages\[0\]\.content\[1\] must be",
        ),
        (
            [{"role": "user", "content": [{"type": "text", "text": None}]}],
            r"messages\[0\]\.content\[0\] must be",
        ),
        ([{"role": "user", "content": ["a"]}], r"messages\[0\]\.content\[0\] must be"),
    ],
)
def test_bad_messages_are_named(conversation: Any, cause: str) -> None:
    with pytest.raises(ArgumentError, match=cause):
        render(SMOLLM2, conversation)


def test_messages_are_not_changed() -> None:
    conversation = [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
    render(SMOLLM2, conversation)
    assert conversation == [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
