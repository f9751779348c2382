"""A text that is rendered without running the template is what transformers renders."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.data import sandbox, template_traces
from halfbyte.data.dataset_report import RowRejected
from halfbyte.data.formats import Conversation
from halfbyte.data.rendering import Renderer
from halfbyte.data.templates import Encoder
from tests.data.chats import FAMILIES, TEMPLATES, reply, tokenizer_of, user
from tests.tiny import CHATML, GENERATION, tiny_tokenizer

CONTENTS = st.sampled_from(
    [
        *(
            "Hi",
            "",
            " ",
            "\n\nYes. ",
            "<think>\nhm\n</think>\n\nNo.",
            "</think>",
            "a</think>b</think>c",
        ),
        *("<|im_end|>", "<think>", "user", "é日本", "True", "None", "0", "{{ x }}", "[INST]", "Hi"),
    ]
) | st.text(st.characters(codec="utf-8"), max_size=8)
ROLES = st.sampled_from(
    [
        ["user", "assistant"],
        ["system", "user", "assistant"],
        ["user", "assistant", "user", "assistant"],
        ["user", "assistant", "user", "assistant", "user", "assistant"],
        ["user", "user", "assistant"],
        ["user", "assistant", "tool", "assistant"],
    ]
)


@st.composite
def chats(draw):
    """Conversations of few kinds, so that most are like an earlier one."""
    messages = [{"role": role, "content": draw(CONTENTS)} for role in draw(ROLES)]
    more = draw(st.sampled_from([None, None, None, "reasoning_content", "name", "weight"]))
    if more:
        value = {"name": "Ann", "weight": draw(st.sampled_from([0, 1, True]))}.get(more)
        messages[-1][more] = draw(CONTENTS) if value is None else value
    return messages


def wanted(tokenizer, messages, prompt):
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    except Exception as error:  # of any type that a template may raise
        return type(error)


def found(renderer, messages, prompt, stop):
    try:
        return renderer.chat(messages).text(stop, prompt=prompt)
    except RowRejected:
        return RowRejected


def check(renderer, tokenizer, messages):
    for stop in range(1, len(messages) + 1):
        for prompt in (False, True):
            got = found(renderer, messages, prompt, stop)
            theirs = wanted(tokenizer, messages[:stop], prompt)
            assert got == (RowRejected if isinstance(theirs, type) else theirs)


RENDERERS = {}


def used(renderer):
    return sum(template.traces._used for template in renderer._templates.values())


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=12)
@given(many=st.lists(chats(), min_size=1, max_size=4))
def test_texts_of_families_are_those_of_transformers(name, many):
    # The records of earlier examples stay, as they do in a run.
    renderer = RENDERERS.setdefault(name, Renderer(tokenizer_of(name)))
    for messages in many:
        check(renderer, tokenizer_of(name), messages)


@pytest.mark.parametrize("name", FAMILIES)
def test_templates_of_families_are_run_once_for_a_kind(name):
    tokenizer = tokenizer_of(name)
    renderer = Renderer(tokenizer)
    for at in range(10):
        messages = [user(f"{at}?"), reply(f"{at}."), user(f"{-at}??"), reply(f"{-at}..")]
        check(renderer, tokenizer, messages)
    # Four beginnings, with and without a prompt.
    assert used(renderer) == 9 * 8


def body(expression):
    return "{% for m in messages %}{{ " + expression + " }}|{% endfor %}"


TRACED = [
    body("m.content | trim"),
    body("m.content.strip() ~ m['content'].lstrip('\\n') + m.content.rstrip()"),
    body("m.content.split('</think>')[-1]"),
    body("m.content.split('</think>') | length"),
    body("m.content.startswith('<th') or m.content.endswith(('.', 'i'))"),
    body("'</think>' in m.content and m.content not in ['Hi', '']"),
    body("m.content == 'Hi' or m.content != messages[0].content"),
    body("m.content[:2] ~ m.content[1:]"),
    body("m.content is string and m.content is iterable and m.content is not mapping"),
    body("m.content is defined and m.content is not none and m.content is not number"),
    body("(m.content or 'empty') ~ (m.content | default('x', true))"),
    body("(m.content ~ m.role).strip() ~ ('a' if m.content else 'b')"),
    body("messages.index(m)"),
    body("(messages | selectattr('content', 'equalto', 'Hi') | list | length)"),
    body("(messages | map(attribute='content') | first) ~ (messages | last).content"),
    body("messages | map('attr', 'content') | list | length"),
    body("messages | map(attribute='content') | sort | first"),  # if they are equal
    "{% macro say(x) %}<{{ x | trim }}>{% endmacro %}" + body("say(m.content)"),
    "{% for m in messages %}{% set x %}{{ m.content }}.{% endset %}{{ x.strip() }}{% endfor %}",
    "{% for m in messages %}{% filter trim %} {{ m.content }}{% endfilter %}{% endfor %}",
    "{% set n = namespace(all='') %}{% for m in messages %}"
    "{% set n.all = n.all + m.content %}{% if loop.changed(m.content) %}!{% endif %}"
    "{% endfor %}{{ n.all }}",
    "{% for m in messages %}{% if m.content == 'Hi' %}{% continue %}{% endif %}{{ m.content }}"
    "{% endfor %}",
    "{% for m in messages %}{{ raise_exception(m.content) if 'a' in m.content }}{% endfor %}",
    "{{ strftime_now('%Y') }}" + CHATML,
]
NOT_TRACED = [
    body("m.content | length"),
    body("m.content | upper"),
    body("m.content | tojson"),
    body("m | tojson"),
    body("m"),
    body("m.content.replace('i', 'o')"),
    body("m.content.title()"),
    body("m.content.nothing"),
    body("m.content.parts ~ m.content.characters ~ m.content.recorder"),
    body("m.content[0]"),
    body("m.content | first"),
    body("m.content * 2"),
    body("'%s' % m.content"),
    body("'{}'.format(m.content)"),
    body("'-'.join([m.content])"),
    body("m.content in 'Hi there'"),
    body("{m.content: 1}[m.content]"),
    body("m.content < 'a'"),
    body("m.content is sameas m.content"),
    body("m.content | list"),
    body("[m.content]"),
    body("m.content | escape"),
    body("('<' | safe) + m.content"),
    body("messages | map(attribute='content') | join(',')"),
    body("m.content.split()[0] if m.content.split() | length > 17 else m.content.count('i')"),
    "{% for m in messages %}{% for c in m.content %}{{ c }}-{% endfor %}{% endfor %}",
    GENERATION,
]


@pytest.mark.parametrize("text", TRACED + NOT_TRACED)
def test_what_templates_do_with_texts_is_recorded_or_the_template_is_run(text):
    tokenizer = tiny_tokenizer(text)
    renderer, whole = Renderer(tokenizer), Renderer(tokenizer)
    contents = ["Hi", "", " \nHi. ", "<think>a</think>b", "</think></think>", "é", "Hi", "user"]
    for at in range(9):
        few = [contents[(at * step) % len(contents)] for step in (1, 3, 5)]
        messages = [{"role": "user", "content": one} for one in few]
        messages[1]["role"] = "assistant"
        check(renderer, tokenizer, messages)
        found(whole, messages, False, 3)
    assert bool(used(whole)) == (text in TRACED)


def test_a_date_in_a_record_is_todays(monkeypatch):
    tokenizer = tiny_tokenizer("{{ strftime_now('%Y') }}" + CHATML)
    renderer = Renderer(tokenizer)
    environment, year = sandbox.transformers_environment(), ["1999"]
    monkeypatch.setitem(environment.globals, "strftime_now", lambda form: year[0])
    sandbox.compiled.cache_clear()
    texts = []
    for year[0] in ("1999", "1999", "2000", "2000", "1999"):
        texts.append(renderer.chat([user("Hi")]).text()[:4])
    sandbox.compiled.cache_clear()
    assert texts == ["1999", "1999", "2000", "2000", "1999"]
    assert used(renderer) == 3


def test_numbers_and_truth_are_different_kinds():
    tokenizer = tiny_tokenizer(body("m.weight ~ m.content"))
    for weight in (1, True, 1.0, "1"):
        renderer = RENDERERS.setdefault("weights", Renderer(tokenizer))
        for content in ("a", "b"):
            check(renderer, tokenizer, [{"role": "user", "content": content, "weight": weight}])


def test_limits_are_those_of_the_template(monkeypatch):
    # Two texts of the greatest length that is recorded would exceed it.
    monkeypatch.setattr(sandbox, "MOST_STEPS", 5_000)
    tokenizer = tiny_tokenizer(CHATML)
    renderer = Renderer(tokenizer)
    for size in (10, 100, 10, 19_000, 100):
        messages = [user("x" * size), reply("y" * size)]
        if size < 19_000:
            check(renderer, tokenizer, messages)
        else:
            with pytest.raises(RowRejected, match="more than 5,000 steps"):
                renderer.chat(messages).text()
    assert used(renderer) == 0


def test_long_texts_and_tool_calls_run_the_template():
    tokenizer = tiny_tokenizer(CHATML)
    renderer = Renderer(tokenizer)
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {}}}
    for _ in range(3):
        check(renderer, tokenizer, [user("x" * (template_traces.LONGEST + 1))])
        check(renderer, tokenizer, [user("x"), {**reply("y"), "tool_calls": [call]}])
    assert used(renderer) == 0


def test_kinds_and_records_are_limited(monkeypatch):
    monkeypatch.setattr(template_traces, "_MOST_KINDS", 20)
    monkeypatch.setattr(template_traces, "_FREE", 10)
    tokenizer = tiny_tokenizer(CHATML)
    renderer = Renderer(tokenizer)
    for at in range(25):
        check(renderer, tokenizer, [{"role": "user", "content": "x", "name": str(at)}])
    (template,) = renderer._templates.values()
    assert template.traces._kinds == 20
    assert template.traces._made == 10


def test_a_record_that_is_wrong_is_not_used(monkeypatch):
    monkeypatch.setattr(template_traces._Trace, "replay", lambda *_: "wrong")
    tokenizer = tiny_tokenizer(CHATML)
    renderer = Renderer(tokenizer)
    for at in range(3):
        check(renderer, tokenizer, [user(f"{at}")])
    assert used(renderer) == 0


def results(found):
    """Tokens and masks, or why rows are rejected."""
    return [
        str(many)
        if isinstance(many, RowRejected)
        else [(one.tokens.tolist(), one.labels_mask.tolist()) for _, one in many]
        for many in found
    ]


def test_templates_are_rendered_for_many_rows_at_once_as_for_each_alone():
    for name in ("qwen3", "gpt_oss", "llama3_1"):
        tokenizer = tokenizer_of(name)
        rows = []
        for at in range(12):
            messages = [user(f"{at}"), reply(f"{at}"), user("?"), reply("</think>" * (at % 3))]
            rows.append(Conversation(str(at), messages))
        alone = [next(Encoder(tokenizer).encode_all([row])) for row in rows]
        assert results(Encoder(tokenizer).encode_all(rows)) == results(alone)


def test_the_templates_here_are_those_of_the_families():
    assert {path.stem for path in TEMPLATES.glob("*.jinja")} == set(FAMILIES)
    assert not any(
        re.search(r"\{%-?\s*generation", path.read_text()) for path in TEMPLATES.glob("*")
    )
