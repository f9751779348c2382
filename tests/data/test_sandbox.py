"""Templates render as in transformers, or end with one message: whatever they do."""

from threading import Thread

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from halfbyte.data import sandbox
from halfbyte.data.sandbox import ChatTemplate, TemplateFailed

VARIABLES = {
    "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "<b>é</b>\n"}],
    "tools": [{"name": "f", "parameters": {"b": [1, 2.5, None], "a": "é"}}],
    "documents": None,
    "add_generation_prompt": True,
}


def render(template):
    return ChatTemplate(template).render(VARIABLES)[0]


HARMLESS = """
{{ messages | map(attribute='role') | join(', ') }} {{ messages | map('length') | list }}
{{ tools | tojson }} {{ tools | tojson(indent=2) }} {{ tools[0] | tojson(sort_keys=true) }}
{{ 'yes' if messages | selectattr('role', 'equalto', 'tool') else 'no' }}
{{ messages | selectattr('role', 'equalto', 'tool') | list | length }}
{% for m in messages if m.role != 'system' %}{{ loop.index }}{{ loop.last }}{% continue %}x
{% else %}none{% endfor %}
{% for m in messages recursive %}{{ m.role }}{% if loop.depth < 3 %}{{ loop(messages[1:]) }}
{% endif %}{% endfor %}
{% macro f(a, b=2) %}{{ a }}-{{ b }}{{ varargs }}{{ caller() if caller else '' }}{% endmacro %}
{{ f(1) }}{{ f(1, 3, 4) }}{% call f(5) %}called{% endcall %}
{% set ns = namespace(n=0, text='') %}{% for i in range(5) %}{% if i == 3 %}{% break %}{% endif %}
{% set ns.n = ns.n + i %}{% set ns.text = ns.text ~ i %}{% endfor %}{{ ns.n }} {{ ns.text }}
{% set block %}a{{ 'b' * 3 }}{% endset %}{{ block | upper | trim }} {{ block[1:] }} {{ block[-1] }}
{% filter indent(4) %}one
two{% endfilter %}
{{ 'a,b'.split(',') }} {{ 'x'.join(['a', 'b']) }} {{ 'aXb'.replace('X', '--') }}
{{ '%s|%5d' % ('a', 3) }}
{{ '{:>5}|{a}'.format('x', a=1) }} {{ 'x' | center(9) }}
{{ 'abc' | replace('b', 'BB') | capitalize }}
{{ messages[1].content | e }} {{ messages[1].content.strip() }} {{ 'é' in messages[1].content }}
{{ 2 ** 10 }} {{ 7 // 2 }} {{ 7 % 4 }} {{ -3 }}
{{ 1 < 2 <= 2 }} {{ [1] + [2] }} {{ [1, 2] == [1, 2] }}
{{ {'a': 1, 'b': 2} | items | list }} {{ dict(a=1).items() | list }} {{ {(1, 2): 3}[(1, 2)] }}
{{ none is none }} {{ x is defined }} {{ x | default('d') }} {{ messages | first | length }}
{{ [3, 1, 2] | sort }} {{ [1, 1] | unique | list }} {{ [1, 2, 3] | batch(2) | list }}
{{ [1, 2] | sum }}
{{ strftime_now('%Y') | length }} {{ tools is iterable }}
{{ messages[0]['role'] in ['user', 'tool'] }}
"""


def test_a_template_renders_as_in_transformers():
    wanted = render_jinja_template(
        [VARIABLES["messages"]],
        tools=VARIABLES["tools"],
        chat_template=HARMLESS,
        add_generation_prompt=True,
    )
    assert render(HARMLESS) == wanted[0][0]


def test_marked_spans_are_those_of_transformers():
    template = (
        "{% for m in messages %}{{ m.role }}"
        "{% generation %}{{ m.content }}!{% endgeneration %}{% endfor %}"
    )
    texts, spans = render_jinja_template(
        [VARIABLES["messages"]], chat_template=template, return_assistant_tokens_mask=True
    )
    assert ChatTemplate(template).render(VARIABLES) == (texts[0], spans[0])


STEPS = "it takes more than 100,000 steps"
SIZE = "it makes a value of more than 100,000 characters"
DOUBLE = (
    "{% set ns = namespace(x=START) %}{% for i in range(60) %}{% set ns.x = NEXT %}{% endfor %}"
)


def double(start, following):
    return DOUBLE.replace("START", start).replace("NEXT", following)


LISTS = double("[1]", "[ns.x, ns.x]")
TUPLES = double("(1,)", "(ns.x, ns.x)")
LOOP = "{% for i in range(99999) %}"
LONG = "{% set a = 'a\t\n' * 33000 %}"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", STEPS),
        (
            LOOP + "{% for j in range(99999) if j < 0 %}{% endfor %}{% endfor %}",
            STEPS,
        ),
        ("{% for i in range(99999) %}{{ range(9999) | sum }}{% endfor %}", STEPS),
        (
            "{% for i in range(99999) %}{{ range(9999) | map('abs') | list | length }}{% endfor %}",
            STEPS,
        ),
        (LONG + "{% for i in range(99999) %}{{ 'x' in a }}{% endfor %}", STEPS),
        (LONG + "{% for i in range(99999) %}{{ a[:0] }}{% endfor %}", STEPS),
        (LONG + "{% for i in range(99999) %}{{ a.strip() | length }}{% endfor %}", STEPS),
        (
            "{% macro f(n) %}{{ f(n-1) if n }}{{ f(n-1) if n }}{% endmacro %}{{ f(50) }}",
            STEPS,
        ),
        (
            "{% for i in [1] recursive %}{% if loop.depth < 50 %}{{ loop([1, 1]) }}{% endif %}"
            "{% endfor %}",
            STEPS,
        ),
        ("{% set x %}{% for i in range(99999) %}" + "x" * 99 + "{% endfor %}{% endset %}", STEPS),
        ("{{ 'a' * 10 ** 10 }}", SIZE),
        ("{{ [1] * 10 ** 10 }}", SIZE),
        (double("'ab'", "ns.x ~ ns.x"), SIZE),
        (double("'ab'", "ns.x + ns.x"), SIZE),
        (double("[1]", "ns.x + ns.x"), SIZE),
        (LISTS + "{{ ns.x }}", SIZE),
        (LISTS + "{{ ns.x | tojson }}", SIZE),
        (LISTS + "{{ ns.x ~ 'a' }}", SIZE),
        (LISTS + "{{ ns.x | string }}", SIZE),
        (LISTS + "{{ '%s' % ns.x }}", SIZE),
        (LISTS + "{% set a = ns.x %}" + LISTS + "{{ a == ns.x }}", SIZE),
        (LISTS + "{% set a = ns.x %}" + LISTS + "{{ a in [ns.x] }}", SIZE),
        (TUPLES + "{{ {ns.x: 1} }}", SIZE),
        ("{% macro f() %}{{ varargs }}{% endmacro %}" + LISTS + "{{ f(ns.x, ns.x) }}", SIZE),
        ("{{ 'a' | center(10 ** 10) }}", SIZE),
        ("{{ 'a'.zfill(10 ** 10) }}", SIZE),
        ("{{ 'a'.ljust(10 ** 10) }}", SIZE),
        ("{{ (1).to_bytes(10 ** 10) }}", SIZE),
        ("{{ '%10000000000d' | format(1) }}", SIZE),
        ("{{ '%10000000000d' % 1 }}", SIZE),
        ("{{ '{:10000000000}'.format(1) }}", SIZE),
        ("{{ [1] | batch(10 ** 10, 1) | list }}", SIZE),
        ("{{ 1.5 | round(10 ** 10, 'ceil') }}", SIZE),
        (LONG + "{{ a.replace('a', a) }}", SIZE),
        (LONG + "{{ a | replace('a', a) }}", SIZE),
        (LONG + "{{ a.join(a) }}", SIZE),
        (LONG + "{{ a | list | join(a) }}", SIZE),
        (LONG + "{{ a.expandtabs(999) }}", SIZE),
        (LONG + "{{ a | indent(999) }}", SIZE),
        (LONG + "{{ '{0}{0}'.format(a) }}", SIZE),
        (LONG + "{{ '{a}{a}'.format_map({'a': a}) }}", SIZE),
        (LONG + "{{ a | wordwrap(1, wrapstring=a) }}", SIZE),
        (LONG + "{{ a.translate({97: a}) }}", SIZE),
        ("{{ '{:{w}}'.format(1, w=10 ** 10) }}", "it passes the width of a format as an argument"),
        ("{{ '%*d' % (10 ** 10, 1) }}", "it passes the width of a format as an argument"),
        ("{{ [[1]] | tojson(indent=10 ** 9) }}", "it indents JSON by more than 16"),
        ("{{ 10 ** 10 ** 9 }}", None),
        ("{{ 10 ** (10 ** 10) }}", "it makes an integer of more than 10,000 bits"),
        (double("3", "ns.x * ns.x"), "it makes an integer of more than 10,000 bits"),
        ("{{ lipsum(n=10 ** 9) }}", "UndefinedError: 'lipsum' is undefined"),
        (LONG + "{{ a }}{{ a }}", "it writes more than 100,000 characters"),
    ],
)
def test_whatever_does_not_end_or_fills_the_memory_is_stopped(monkeypatch, template, reason):
    monkeypatch.setattr(sandbox, "MOST_STEPS", 100_000)
    monkeypatch.setattr(sandbox, "MOST_CHARACTERS", 100_000)
    if reason is None:
        assert len(render(template)) < 100
        return
    with pytest.raises(TemplateFailed) as caught:
        render(template)
    assert str(caught.value).startswith(reason)


def test_namespaces_that_contain_each_other_are_not_written_out():
    assert render(double("0", "namespace(a=ns.x, b=ns.x)") + "{{ ns.x }}") == "<Namespace>"


def test_the_steps_of_one_rendering_are_not_those_of_another(monkeypatch):
    monkeypatch.setattr(sandbox, "MOST_STEPS", 1000)
    template = ChatTemplate("{% for i in range(100) %}{{ i }}{% endfor %}")
    short = ChatTemplate("{% for i in range(20) %}{{ i }}{% endfor %}")
    for _ in range(5):
        with pytest.raises(TemplateFailed, match="it takes more than 1,000 steps, line 1"):
            template.render(VARIABLES)
        assert short.render(VARIABLES)[0].startswith("0123")


def test_threads_can_share_a_template():
    template = ChatTemplate(
        "{% for i in range(300) %}{% generation %}{{ i }}{% endgeneration %}{% endfor %}"
    )
    wanted, found = template.render(VARIABLES), []
    threads = [Thread(target=lambda: found.append(template.render(VARIABLES))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [wanted] * 8


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "\n\n{% for m in messages %}\n{{ 1 / 0 }}{% endfor %}",
            "ZeroDivisionError: division by zero, line 4",
        ),
        ("\n{{ messages['a'].b }}", "UndefinedError: 'list object' has no attribute 'a', line 2"),
        (
            "{{ none + 1 }}",
            "TypeError: unsupported operand type(s) for +: 'NoneType' and 'int', line 1",
        ),
        ("{{ 'a'.index('b') }}", "ValueError: substring not found, line 1"),
        ("\n{{ '{a}'.format() }}", "KeyError: 'a', line 2"),
        ("{% macro f() %}\n{{ f() }}{% endmacro %}{{ f() }}", "RecursionError: maximum recursion"),
        ("{{ range(10 ** 9) }}", "OverflowError: Range too big."),
        (
            "{{ messages.append(1) }}",
            "SecurityError: access to attribute 'append' of 'list' object",
        ),
        ("{% include 'x' %}", "TypeError: no loader for this environment specified, line 1"),
        ("\n{{ raise_exception('no\n way') }}", "no way, line 2"),
        ("\n\n{{ (1 }}", "TemplateSyntaxError: unexpected '}', expected ')', line 3"),
        ("\n{{ 1 | unknown }}", "TemplateAssertionError: No filter named 'unknown'., line 2"),
        ("{{ " + "(" * 9999 + "1" + ")" * 9999 + " }}", "RecursionError: maximum recursion depth"),
        ("{{ 1" + "0" * 9999 + " }}", "ValueError: Exceeds the limit (4300 digits)"),
        (
            "{% for i in [1] %}" * 30 + "{% endfor %}" * 30,
            "SyntaxError: too many statically nested blocks",
        ),
        ("a" * 100_001, "it has more than 100,000 characters"),
    ],
)
def test_an_error_says_what_and_in_which_line(template, message):
    with pytest.raises(TemplateFailed) as caught:
        render(template)
    assert str(caught.value).startswith(message)


def test_an_error_is_cut_to_one_line():
    with pytest.raises(TemplateFailed) as caught:
        render("{{ raise_exception('so \n' * 999) }}")
    assert len(str(caught.value)) < 220
    assert "\n" not in str(caught.value)
