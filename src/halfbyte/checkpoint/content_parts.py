"""Chat templates that take a message's content only as a list of parts, made to take text as well.

Templates of image-text models may loop over the parts of a message, ``{"type": "text", "text": …}``
or an image. Given a string they loop over its characters, none of which is a part, and write
nothing: the text is lost without an error. Templates that take both ask whether the content is a
string.
"""

import re

from jinja2 import Environment, TemplateSyntaxError, nodes

# transformers' own tags, around what the assistant wrote.
_GENERATION = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")

# On the first line, so that the lines of the template keep their numbers.
_AS_PARTS = (
    "{%- set as_parts = namespace(messages=[]) -%}"
    "{%- for message in messages -%}"
    "{%- if message['content'] is string -%}"
    "{%- set part = {'type': 'text', 'text': message['content']} -%}"
    "{%- set message = dict(message, content=[part]) -%}"
    "{%- endif -%}"
    "{%- set as_parts.messages = as_parts.messages + [message] -%}"
    "{%- endfor -%}"
    "{%- set messages = as_parts.messages -%}"
)


def takes_only_parts(template: str) -> bool:
    """Return whether a chat template loops over a message's content, and never expects a string.

    The template is parsed, not rendered. One that cannot be parsed does neither.
    """
    environment = Environment(extensions=["jinja2.ext.loopcontrols"], autoescape=True)
    try:
        tree = environment.parse(_GENERATION.sub("", template))
    except TemplateSyntaxError:
        return False
    strings = any(test.name == "string" for test in tree.find_all(nodes.Test))
    return not strings and any(_is_content(loop.iter) for loop in tree.find_all(nodes.For))


def taking_text(template: str) -> str:
    """Return a template of parts that takes strings as well; others are unchanged."""
    return _AS_PARTS + template if takes_only_parts(template) else template


def _is_content(node: nodes.Node) -> bool:
    """Return whether an expression is ``message['content']``, or a selection of it."""
    while isinstance(node, nodes.Filter) and node.node is not None:
        node = node.node
    if isinstance(node, nodes.Getitem):
        return isinstance(node.arg, nodes.Const) and node.arg.value == "content"
    return isinstance(node, nodes.Getattr) and node.attr == "content"
