"""The codes of the data check: what can be found, how severe it is, and what to do about it.

A code never changes its meaning. Hundreds group them: 1 reading, 2 supervision, 3 length, 4 turns,
5 duplicates, 6 text and tokenizer, 7 chat template. docs/check.md lists them all for users.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

Severity = Literal["error", "warning", "info"]


class Code(NamedTuple):
    """What is known of a code.

    Attributes:
        title: The finding, as a noun phrase.
        severity: How severe it is, however rare.
        remedy: What the user can do.
        error_from: The share from which on it is an error; None: its severity does not depend on
            how frequent it is.
    """

    title: str
    severity: Severity
    remedy: str
    error_from: float | None = None


CODES: dict[str, Code] = {
    # Reading
    "HB101": Code(
        "rows left out",
        "warning",
        "correct the rows, or leave them out on purpose; train lists all in rejected.jsonl",
        error_from=0.5,
    ),
    "HB102": Code(
        "keys that nothing reads",
        "info",
        "remove them, or rename them if they hold what is to be trained on",
    ),
    "HB103": Code("note on the source", "info", "check that this is meant"),
    # Supervision
    "HB201": Code(
        "rows without anything supervised",
        "warning",
        "see the reason; a row needs a reply of the assistant that is to be learned",
        error_from=0.1,
    ),
    "HB202": Code(
        "replies without a supervised end of turn",
        "warning",
        "the model does not learn to stop there: use a chat template that ends the assistant's "
        "turns with a token, or end the texts with the tokenizer's EOS",
        error_from=0.1,
    ),
    "HB203": Code(
        "few supervised tokens",
        "info",
        "most computation goes into prompts: shorten what they share, or train on all tokens "
        "(train_on: all)",
    ),
    "HB204": Code(
        "replies that are not supervised",
        "warning",
        "see the reason; train_on: all supervises every token",
    ),
    "HB205": Code(
        "rows that became several examples",
        "info",
        "nothing need be done: the chat template renders earlier replies otherwise than at "
        "inference, so each reply is supervised in the text that inference would have",
    ),
    "HB206": Code(
        "a token merges the end of the prompt with the beginning of the reply",
        "info",
        "begin replies without white space, or end the template's prompt with a special token",
    ),
    # Length
    "HB301": Code(
        "rows that are cut off",
        "warning",
        "raise max_length (the table of lengths says what each costs), or divide the rows",
        error_from=0.5,
    ),
    "HB302": Code(
        "replies that are cut off whole",
        "warning",
        "raise max_length: nothing is learned from them",
        error_from=0.1,
    ),
    "HB303": Code(
        "examples longer than the model's positions",
        "warning",
        "lower max_length to the model's number of positions",
    ),
    "HB304": Code(
        "examples much longer than the others",
        "info",
        "look at them; a lower max_length needs less memory",
    ),
    # Turns
    "HB401": Code(
        "the same role twice in a row",
        "warning",
        "join the two messages, or add the one that is missing between them",
    ),
    "HB402": Code(
        "conversations that begin with the assistant",
        "warning",
        "begin with a message of the user: at inference a prompt comes before each reply",
    ),
    "HB403": Code(
        "a system message that is not the first",
        "warning",
        "move it to the beginning: most chat templates drop, move or refuse it elsewhere",
    ),
    "HB404": Code(
        "conversations that do not end with a reply",
        "info",
        "remove the last message: it costs computation and nothing is learned from it",
    ),
    "HB405": Code(
        "empty messages",
        "warning",
        "remove the rows: the model would learn to answer nothing, or to answer to nothing",
        error_from=0.1,
    ),
    "HB406": Code(
        "replies that begin or end with white space",
        "info",
        "strip them: the model learns to write it, and its first token differs from that of other "
        "replies",
    ),
    # Duplicates
    "HB501": Code(
        "duplicate rows",
        "warning",
        "remove them: a row that occurs n times weighs n times as much, and is memorised",
        error_from=0.5,
    ),
    "HB502": Code(
        "near duplicates",
        "warning",
        "look at some, and keep one of each group unless the repetition is meant",
    ),
    "HB503": Code(
        "prompts with different replies",
        "info",
        "nothing need be done if several answers are right; otherwise keep the right one",
    ),
    "HB504": Code(
        "held-out rows that are also training rows",
        "error",
        "remove them from one of the two: the held-out loss would be that of memorised text",
    ),
    "HB505": Code(
        "held-out rows nearly like training rows",
        "warning",
        "remove them from the held-out data, or hold out whole groups of similar rows",
    ),
    # Text and tokenizer
    "HB601": Code(
        "text that the tokenizer has no token for",
        "warning",
        "replace these characters, or use a model whose tokenizer has them: they are trained as "
        "the unknown token",
        error_from=0.1,
    ),
    "HB602": Code(
        "text that the tokenizer changes",
        "warning",
        "compare the text with what is decoded from its tokens: what differs cannot be learned",
        error_from=0.5,
    ),
    "HB603": Code(
        "damaged characters",
        "warning",
        "read the source again in its true encoding: the text was decoded in the wrong one",
    ),
    "HB604": Code(
        "control tokens written in messages",
        "warning",
        "remove them from the text: they become the tokens that begin and end turns, and whoever "
        "writes such a message can speak in another role",
    ),
    # Chat template
    "HB701": Code(
        "two BOS tokens",
        "error",
        "remove one: at inference there would be another number of them; take it out of the rows, "
        "or out of the chat template",
    ),
    "HB702": Code(
        "no BOS token though the tokenizer has one to add",
        "warning",
        "add it to the chat template: programs that tokenise the prompt as text would add it",
    ),
    "HB703": Code(
        "a prompt at inference that training does not have",
        "warning",
        "make the chat template begin the reply as it does with add_generation_prompt",
    ),
    "HB704": Code(
        "a chat template that does not begin the reply",
        "warning",
        "give the chat template an add_generation_prompt: without it the model has to write the "
        "header of its own turn",
    ),
    "HB705": Code(
        "a date written by the chat template",
        "warning",
        "write the system message with a date of your own: training has today's, inference "
        "another one",
    ),
    "HB706": Code(
        "content that the chat template drops",
        "warning",
        "use the template of a model that has a place for it, or put it into the text of a message",
    ),
    "HB707": Code(
        "replies whose text the chat template changes",
        "warning",
        "look at the examples token by token (--show): this is what the model learns",
    ),
    "HB708": Code(
        "a system prompt that the chat template adds",
        "info",
        "give rows a system message of their own if it is not wanted",
    ),
    "HB709": Code(
        "no chat template",
        "warning",
        "use the instruction-tuned model, or give the tokenizer a chat template: without one, "
        "other programs do not know how to write a prompt for the model",
    ),
    "HB710": Code(
        "the padding token is the end-of-turn token",
        "info",
        "nothing need be done: labels come from each example's mask, so it is learned all the same",
    ),
    "HB711": Code(
        "arguments of tool calls that are converted",
        "info",
        "nothing need be done: the chat template gets them as it needs them",
    ),
    "HB712": Code(
        "BOS from the chat template and from the tokenizer",
        "info",
        "tokenise rendered prompts without special tokens, as halfbyte does: programs that add "
        "them have two",
    ),
    "HB713": Code(
        "turns end with another token than EOS",
        "info",
        "name the token as a stop token where the model is served; halfbyte's own generation "
        "stops at it",
    ),
    "HB714": Code(
        "conversations that the chat template rejects",
        "warning",
        "see the reason; most often roles are out of order",
        error_from=0.5,
    ),
}
