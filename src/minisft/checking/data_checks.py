"""Checks of the data: every row teaches its answers and their ends; nothing is lost, duplicated or leaked."""

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np

from minisft.checking.context import CheckContext, Example, flat_columns, shown
from minisft.checking.result import Failed, NotRun
from minisft.data.conversation import Conversation, Message
from minisft.data.encoder import Encoder
from minisft.data.renderers.base import RefusedError

MIN_SUPERVISED, MAX_SUPERVISED = 0.01, 0.99  # share of the tokens
MAX_CUT = 0.25  # share of the tokens
MAX_SKIPPED = 0.25  # share of the rows
_TEMPLATE = "choose another data.template"
_FAULT = "remove `<output>/dataset` and check again; if it fails again, MiniSFT is at fault: report it"
_LOST_SYSTEM_PROMPTS = ("system_dropped", "system_repeated", "system_unsupported")
_PROBE = Conversation(
    (
        Message("system", "Be brief."),
        Message("user", "Hello"),
        Message("assistant", "Hi."),
        Message("user", "Bye"),
        Message("assistant", "See you."),
    )
)


def template_ends_answers(context: CheckContext) -> str:
    """Load the tokenizer, and find out how the template writes conversations and with which tokens it ends answers."""
    encoder = context.encoder
    stop_tokens = ", ".join(map(repr, encoder.tokenizer.convert_ids_to_tokens(list(encoder.stop_token_ids))))
    return f"{encoder.template_name}; answers end with {stop_tokens}"


def source_is_conversations(context: CheckContext) -> str:
    """Read the source's first rows as conversations, and encode them."""
    skipped = sum(context.source.skipped.values())
    return f"{len(context.source.rows):,} rows read for comparison" + (f", {skipped:,} skipped" if skipped else "")


def system_prompts_survive(context: CheckContext) -> str:
    """Look for every system prompt in the tokens before its conversation's last answer."""
    # 1. Rows that the template refuses because of their system prompt.
    skipped = context.source.skipped
    lost = {reason: number for reason, number in skipped.items() if reason in _LOST_SYSTEM_PROMPTS}
    if lost:
        counted = ", ".join(f"{reason} {number:,}" for reason, number in lost.items())
        raise Failed(f"the template loses system prompts, and their rows with them ({counted})", _TEMPLATE)
    # 2. The tokens before the last learned token of every other row that has a system prompt.
    rows = [row for row in context.source.rows if row["messages"] and row["messages"][0]["role"] == "system"]
    prompts = []
    for row in rows:
        learned = np.flatnonzero(np.asarray(row["labels"]) >= 0)
        prompts.append(list(row["input_ids"][: learned[-1] if len(learned) else None]))
    # 3. The system prompt must be in their text.
    texts = context.encoder.decode_answers(prompts)
    for row, text in zip(rows, texts, strict=True):
        system = row["messages"][0]["content"].strip()
        if system not in text and context.encoder.round_trip(system).strip() not in text:
            raise Failed(f"{row['location']}: its system prompt is not in its tokens", _TEMPLATE)
    return f"{len(rows):,} of {len(context.source.rows):,} rows have one" if rows else "no row has one"


def rows_are_prepared(context: CheckContext) -> str:
    """Prepare the data as training would, and find the source's rows in it."""
    ledger = context.prepared.ledger
    rows = ledger["rows"]
    if not context.examples:
        raise Failed("no row of the source is in the prepared data", _FAULT)
    skipped = f", {rows['skipped']:,} skipped" if rows["skipped"] else ""
    return (
        f"{rows['train']:,} train and {rows['test']:,} test rows{skipped}; {len(context.examples):,} compared with "
        f"their messages; template {ledger['template']}"
    )


def terminators_are_learned(context: CheckContext) -> str:
    """Count the learned control tokens of every row: each complete answer ends with one."""
    controls = set(context.controls.values())
    answers = 0
    for example in context.examples:
        complete = len(example.learned) - (1 if "cut_cut" in example.row.findings else 0)
        terminators = sum(label in controls for label in example.row.labels if label >= 0)
        if terminators < complete:
            where = example.conversation.location
            raise Failed(
                f"{where}: {complete} answers, but {terminators} learned terminators: the model would not stop",
                f"look at the row with `minisft inspect`; {_FAULT}",
            )
        answers += complete
    return f"{answers:,} answers"


def answers_are_learned(context: CheckContext) -> str:
    """Decode the learned tokens of every row: they are its answers' texts, each with one more token for its end."""
    stops = set(context.controls.values())
    fix = f"look at it with `minisft inspect`; {_FAULT}"
    tokens, answers, learned = 0, [], []
    # 1. Pair the learned spans of each row with the texts that they should decode to.
    for example in context.examples:
        if example.is_plain:
            expected = [message.text for message in example.learned]
        else:  # calls and reasoning as the template writes them
            encoded = context.encoder.encode(example.conversation)
            expected = [answer.text for answer in encoded.answers if answer.supervised]
        spans = example.row.answers()
        if len(spans) != len(expected):
            problem = f"{len(spans)} spans of learned tokens for {len(expected)} answers"
            raise Failed(f"{example.conversation.location}: {problem}", fix)
        for text, (start, end) in zip(expected, spans, strict=True):
            ids = example.row.labels[start:end]
            tokens += len(ids)
            answers.append((example, text))
            learned.append(ids[:-1] if ids[-1] in stops else ids)
    # 2. Decode all of them at once, and compare.
    for (example, text), decoded in zip(answers, context.encoder.decode_answers(learned), strict=True):
        if not _is_answer_text(context.encoder, example, text, decoded):
            problem = f"the learned tokens decode to {decoded!r}, the answer is {text!r}"
            raise Failed(f"{example.conversation.location}: {problem}", fix)
    # 3. What `prepare` found in the rows that are not compared.
    if context.verification_error is not None:
        raise Failed(str(context.verification_error), _FAULT)
    return f"{tokens:,} learned tokens of {len(learned):,} answers"


def _is_answer_text(encoder: Encoder, example: Example, text: str, decoded: str) -> bool:
    """Return whether decoded tokens are an answer's text, trimmed or cut where the row's findings say so."""
    findings = example.row.findings
    accepted = {text, encoder.round_trip(text)}
    if "trimmed" in findings:
        accepted |= {trimmed for form in tuple(accepted) for trimmed in (form.strip(), form.rstrip())}
    if decoded in accepted:
        return True
    prefix = decoded.rstrip("\ufffd")  # a cut may go through a character
    return "cut_cut" in findings and any(form.startswith(prefix) for form in accepted)


def one_bos(context: CheckContext) -> str:
    """Look for BOS tokens: one at most, at the beginning of a row, unless the template writes it in every turn."""
    bos = context.encoder.tokenizer.bos_token_id
    if bos is None:
        return "the tokenizer has none"
    probe = context.encoder.encode(replace(_PROBE, messages=_PROBE.messages[1:])).input_ids
    in_turns, at_start = bos in probe[2:], probe[0] == bos
    for example in context.examples:
        ids, where = example.row.ids, example.conversation.location
        if ids[:2] == [bos, bos]:
            raise Failed(f"{where}: the row starts with BOS twice", _FAULT)
        if not in_turns and bos in ids[1:]:
            raise Failed(f"{where}: BOS is inside the row", _FAULT)
        if (ids[0] == bos) != at_start:
            problem = "the row does not start with BOS" if at_start else "the row starts with BOS"
            raise Failed(f"{where}: {problem}, unlike the template", _FAULT)
    if in_turns:
        return "the template writes that token in every turn"
    return "at the beginning of every row" if at_start else "the template writes none"


def control_text_stays_text(context: CheckContext) -> str:
    """Write the names of control tokens in user messages, as a user could: they must stay text."""
    names = list(context.controls)[:200]
    # 1. Rows that contain such a name, and some rows to whose user messages all names are appended.
    spelling = [
        example.conversation
        for example in context.examples
        if any(name in message.text for message in example.conversation.messages for name in names)
    ]
    probes = []
    for example in context.sample(3):
        messages = tuple(
            replace(message, content=f"{message.content} {' '.join(names)}") if message.role == "user" else message
            for message in example.conversation.messages
        )
        probes.append(replace(example.conversation, messages=messages))
    # 2. Each must render with as many control tokens as the same turns with the text "x".
    for conversation in [*probes, *spelling[:200]]:
        messages = tuple(replace(message, content="x" if message.content else "") for message in conversation.messages)
        expected = _count_control_tokens(context, replace(conversation, messages=messages))
        counts = _count_control_tokens(context, conversation)
        if expected is not None and counts is not None and counts != expected:
            difference = counts - expected or expected - counts
            token = context.encoder.tokenizer.convert_ids_to_tokens(next(iter(difference)))
            raise Failed(f"{conversation.location}: the text {token!r} became a control token", _FAULT)
    return f"{len(names)} names of control tokens in a message stay text; {len(spelling):,} rows contain one"


def _count_control_tokens(context: CheckContext, conversation: Conversation) -> Counter[int] | None:
    """Count each control token of a conversation outside its answers; None where the template refuses it.

    Answers may contain control tokens that their template writes, such as those around a call, so they do not count.
    """
    try:
        encoded = context.encoder.encode(conversation)
    except RefusedError:
        return None
    controls = set(context.controls.values())
    labelled = zip(encoded.input_ids, encoded.labels, strict=True)
    return Counter(id for id, label in labelled if label < 0 and id in controls)


def tokens_are_conserved(context: CheckContext) -> str:
    """Count the tokens on disk and compare them with the ledger."""
    ledger, splits = context.prepared.ledger, context.splits.values()
    lengths = [
        np.asarray(split.data.column("input_ids").combine_chunks().value_lengths()) for split in splits if len(split)
    ]
    kept = int(sum(length.sum() for length in lengths))
    supervised = sum(int((labels >= 0).sum()) for split in splits for labels in flat_columns(split, "labels"))
    rendered = sum(int(chunk.to_numpy().sum()) for split in splits for chunk in split.data.column("rendered").chunks)
    tokens = ledger["tokens"]
    for name, counted in (("kept", kept), ("supervised", supervised), ("rendered", rendered)):
        if counted != tokens[name]:
            raise Failed(f"{counted:,} tokens are {name} on disk, {tokens[name]:,} in the ledger", _FAULT)
    if tokens["rendered"] != tokens["kept"] + tokens["cut"]:
        raise Failed("the ledger's rendered tokens are not the sum of its kept and cut tokens", _FAULT)
    longest = max((int(length.max()) for length in lengths), default=0)
    if longest > context.recipe.data.max_length:
        raise Failed(f"a row has {longest:,} tokens, more than data.max_length", _FAULT)
    return f"{rendered:,} rendered = {kept:,} kept + {tokens['cut']:,} cut"


def held_out_stays_out(context: CheckContext) -> str:
    """Look for test rows among the train rows, by all tokens and by their first question."""
    train, test = context.splits["train"], context.splits["test"]
    if not len(test):
        raise NotRun("there are no test rows (data.test_fraction is 0)")
    train_hashes = {hash(ids.tobytes()) for ids in _token_rows(train)}
    duplicates = [index for index, ids in enumerate(_token_rows(test)) if hash(ids.tobytes()) in train_hashes]
    if duplicates:
        names = [str(name) for name in test.select(duplicates[:3])["id"]]
        fix = "remove them from data.test" if context.recipe.data.test is not None else _FAULT
        raise Failed(f"{len(duplicates):,} test rows are train rows too, such as {shown(names)}", fix)
    shared = context.prepared.ledger["overlap"]["test_rows_with_a_train_prompt"]
    if shared and context.recipe.data.test is None:
        raise Failed(f"{shared:,} test rows have the first question of a train row", _FAULT)
    return f"{len(test):,} test rows" + (f"; {shared:,} have the first question of a train row" if shared else "")


def _token_rows(dataset: Any) -> list[np.ndarray]:
    """Return the tokens of each row of a `datasets.Dataset`, as views of its Arrow chunks."""
    rows: list[np.ndarray] = []
    for chunk in filter(len, dataset.data.column("input_ids").chunks):
        offsets = chunk.offsets.to_numpy() - chunk.offsets[0].as_py()
        rows += np.split(chunk.flatten().to_numpy(), offsets[1:-1])
    return rows


def shares_are_sane(context: CheckContext) -> str:
    """Compare the shares that are learned, cut and skipped with those of an intact data set."""
    ledger = context.prepared.ledger
    tokens, rows = ledger["tokens"], ledger["rows"]
    learned, cut = tokens["supervised"] / tokens["kept"], tokens["cut"] / tokens["rendered"]
    skipped = rows["skipped"] / rows["read"]
    if not MIN_SUPERVISED <= learned <= MAX_SUPERVISED:
        fix = "see data.format and data.train_on, and look at rows with `minisft inspect --worst share`"
        raise Failed(f"{learned:.1%} of the tokens are learned", fix)
    if cut > MAX_CUT:
        raise Failed(f"{cut:.0%} of the tokens are cut", "raise data.max_length")
    if skipped > MAX_SKIPPED:
        reasons = ", ".join(f"{reason} {number:,}" for reason, number in ledger["skipped"].items())
        raise Failed(f"{skipped:.0%} of the rows are skipped ({reasons})", "fix these rows, or set data.invalid=repair")
    return f"{learned:.0%} of the tokens are learned, {cut:.0%} cut; {skipped:.0%} of the rows skipped"
