"""The data: every row teaches its answers and their ends, and nothing was lost, doubled or leaked on the way."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from minisft.checking.context import CheckContext, Example, flat_columns, shown
from minisft.checking.result import Failed, NotRun
from minisft.data.conversation import Conversation, Message
from minisft.data.encoder import Encoder
from minisft.data.renderers.base import RefusedError

LEAST_SUPERVISED, MOST_SUPERVISED = 0.01, 0.99
MOST_CUT = 0.25  # of the tokens
MOST_SKIPPED = 0.25  # of the rows
_TEMPLATE = "choose another data.template"
_FAULT = "this is a fault of MiniSFT or of the prepared data: remove `<output>/dataset` and check again; else report it"
_LOST_SYSTEMS = ("system_dropped", "system_repeated", "system_unsupported")
_PROBE = Conversation(
    (
        Message("system", "Be brief."),
        Message("user", "Hello"),
        Message("assistant", "Hi."),
        Message("user", "Bye"),
        Message("assistant", "See you."),
    )
)


def template_does(context: CheckContext) -> str:
    """Load the tokenizer and find out how the template writes conversations, and how it ends an answer."""
    encoder = context.encoder
    ends = ", ".join(map(repr, encoder.tokenizer.convert_ids_to_tokens(list(encoder.stop_token_ids))))
    return f"{encoder.template_name}; answers end with {ends}"


def source_is_conversations(context: CheckContext) -> str:
    """Read the source's first rows as conversations, and encode them."""
    skipped = sum(context.source.skipped.values())
    return f"{len(context.source.rows):,} rows read to compare with" + (f", {skipped:,} left out" if skipped else "")


def system_prompts_survive(context: CheckContext) -> str:
    """Look for every system prompt in the tokens before its conversation's last answer."""
    _refuse_lost_systems(context)
    rows = [row for row in context.source.rows if row["messages"][0]["role"] == "system"]
    texts = context.encoder.decode_answers([_prompt_tokens(row) for row in rows])
    for row, text in zip(rows, texts, strict=True):
        system = row["messages"][0]["content"].strip()
        if system not in text and context.encoder.round_trip(system).strip() not in text:
            raise Failed(f"{row['location']}: its system prompt is not in its tokens", _TEMPLATE)
    return f"{len(rows):,} of {len(context.source.rows):,} rows have one" if rows else "no row has one"


def _refuse_lost_systems(context: CheckContext) -> None:
    """Find out whether the template refuses rows for their system prompt."""
    lost = {reason: number for reason, number in context.source.skipped.items() if reason in _LOST_SYSTEMS}
    if lost:
        counted = ", ".join(f"{reason} {number:,}" for reason, number in lost.items())
        raise Failed(f"the template loses system prompts, and their rows with them ({counted})", _TEMPLATE)


def _prompt_tokens(row: dict[str, Any]) -> list[int]:
    learned = np.flatnonzero(np.asarray(row["labels"]) >= 0)
    return list(row["input_ids"][: learned[-1]]) if len(learned) else list(row["input_ids"])


def rows_are_prepared(context: CheckContext) -> str:
    """Prepare the data as training would, and find the source's rows in it."""
    ledger = context.prepared.ledger
    rows = ledger["rows"]
    if not context.examples:
        raise Failed("no row of the source stands in the prepared data", _FAULT)
    skipped = f", {rows['skipped']:,} skipped" if rows["skipped"] else ""
    return (
        f"{rows['train']:,} train and {rows['test']:,} test rows{skipped}; {len(context.examples):,} compared with "
        f"their messages; template {ledger['template']}"
    )


def terminators_are_learned(context: CheckContext) -> str:
    """Count the learned control tokens of every row: each whole answer ends with one."""
    controls = set(context.controls.values())
    answers = 0
    for example in context.examples:
        whole = len(example.learned) - (1 if "cut_cut" in example.row.findings else 0)
        found = sum(label in controls for label in example.row.labels if label >= 0)
        if found < whole:
            where = example.conversation.location
            raise Failed(
                f"{where}: {whole} answers, but {found} learned terminators: the model would not stop",
                f"look at the row with `minisft inspect`; {_FAULT}",
            )
        answers += whole
    return f"{answers:,} answers"


def answers_are_learned(context: CheckContext) -> str:
    """Decode the learned tokens of every row: they are its answers' texts, each with one more token for its end."""
    stops = set(context.controls.values())
    tokens, places, rows = 0, [], []
    for example in context.examples:
        expected = _answer_texts(example, context.encoder)
        stretches = example.row.answers()
        if len(stretches) != len(expected):
            problem = f"{len(stretches)} stretches of learned tokens for {len(expected)} answers"
            raise Failed(f"{example.conversation.location}: {problem}", f"look at it with `minisft inspect`; {_FAULT}")
        for text, (start, end) in zip(expected, stretches, strict=True):
            ids = example.row.labels[start:end]
            tokens += len(ids)
            places.append((example, text, (start, end)))
            rows.append(ids[:-1] if ids[-1] in stops else ids)
    for (example, text, _), decoded in zip(places, context.encoder.decode_answers(rows), strict=True):
        if not _reads(context.encoder, example, text, decoded):
            problem = f"the learned tokens read {decoded!r}, the answer is {text!r}"
            raise Failed(f"{example.conversation.location}: {problem}", f"look at it with `minisft inspect`; {_FAULT}")
    if context.verification_error is not None:
        raise Failed(str(context.verification_error), _FAULT)
    return f"{tokens:,} learned tokens of {len(rows):,} answers"


def _answer_texts(example: Example, encoder: Encoder) -> list[str]:
    """The texts that the answers should decode to; calls and reasoning as the template writes them."""
    if example.is_plain:
        return [message.text for message in example.learned]
    return [answer.text for answer in encoder.encode(example.conversation).answers if answer.supervised]


def _reads(encoder: Encoder, example: Example, text: str, decoded: str) -> bool:
    findings = example.row.findings
    accepted = {text, encoder.round_trip(text)}
    if "trimmed" in findings:
        accepted |= {form for whole in tuple(accepted) for form in (whole.strip(), whole.rstrip())}
    if decoded in accepted:
        return True
    begun = decoded.rstrip("\ufffd")  # a cut may go through a character
    return "cut_cut" in findings and any(whole.startswith(begun) for whole in accepted)


def one_bos(context: CheckContext) -> str:
    """No row begins with BOS twice, nor has one elsewhere, unless the template writes that token in every turn."""
    bos = context.encoder.tokenizer.bos_token_id
    if bos is None:
        return "the tokenizer has none"
    probe = context.encoder.encode(replace(_PROBE, messages=_PROBE.messages[1:])).input_ids
    in_turns, at_start = bos in probe[2:], probe[0] == bos
    for example in context.examples:
        ids, where = example.row.ids, example.conversation.location
        if ids[:2] == [bos, bos]:
            raise Failed(f"{where}: BOS stands twice at its beginning", _FAULT)
        if not in_turns and bos in ids[1:]:
            raise Failed(f"{where}: BOS stands within the row", _FAULT)
        if (ids[0] == bos) != at_start:
            raise Failed(f"{where}: BOS {'lacks' if at_start else 'stands'} at its beginning", _FAULT)
    if in_turns:
        return "the template writes that token in every turn"
    return "at the beginning of every row" if at_start else "the template writes none"


def control_text_stays_text(context: CheckContext) -> str:
    """Spell control tokens in a user's message, as a user could: the row has none more for it."""
    names = list(context.controls)[:200]
    spelling = [example for example in context.examples if _spells(example.conversation, names)]
    probes = [_with_user_text(example.conversation, " ".join(names)) for example in context.sample(3)]
    for conversation in [*probes, *(example.conversation for example in spelling[:200])]:
        wanted = _control_counts(context, _neutral(conversation))
        counts = _control_counts(context, conversation)
        if wanted is not None and counts is not None and counts != wanted:
            extra = counts - wanted or wanted - counts
            token = context.encoder.tokenizer.convert_ids_to_tokens(next(iter(extra)))
            raise Failed(f"{conversation.location}: the text {token!r} became a control token", _FAULT)
    return f"{len(names)} control tokens spelled in a message; {len(spelling):,} rows spell one themselves"


def _spells(conversation: Conversation, names: Sequence[str]) -> bool:
    return any(name in message.text for message in conversation.messages for name in names)


def _with_user_text(conversation: Conversation, text: str) -> Conversation:
    messages = tuple(
        replace(m, content=f"{m.content} {text}") if m.role == "user" else m for m in conversation.messages
    )
    return replace(conversation, messages=messages)


def _neutral(conversation: Conversation) -> Conversation:
    """The same turns with nothing in them that could be a control token."""
    messages = tuple(replace(m, content="x" if m.content else "") for m in conversation.messages)
    return replace(conversation, messages=messages)


def _control_counts(context: CheckContext, conversation: Conversation) -> Counter[int] | None:
    """How often each control token stands in the rendering; None where the template refuses the conversation.

    Answers may hold control tokens that their template writes, such as those around a call, so they do not count.
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
    rendered = sum(int(rows.sum()) for split in splits for rows in _numbers(split, "rendered"))
    tokens = ledger["tokens"]
    for name, counted in (("kept", kept), ("supervised", supervised), ("rendered", rendered)):
        if counted != tokens[name]:
            raise Failed(f"{counted:,} tokens are {name} on disk, {tokens[name]:,} in the ledger", _FAULT)
    if tokens["rendered"] != tokens["kept"] + tokens["cut"]:
        raise Failed("the ledger's rendered tokens are not its kept and cut ones", _FAULT)
    longest = max((int(length.max()) for length in lengths), default=0)
    if longest > context.recipe.data.max_length:
        raise Failed(f"a row has {longest:,} tokens, more than data.max_length", _FAULT)
    return f"{rendered:,} rendered = {kept:,} kept + {tokens['cut']:,} cut"


def _numbers(data: Any, name: str) -> list[np.ndarray]:
    return [chunk.to_numpy() for chunk in data.data.column(name).chunks]


def held_out_stays_out(context: CheckContext) -> str:
    """Look for test rows among the train rows, as whole rows and by their first question."""
    train, test = context.splits["train"], context.splits["test"]
    if not len(test):
        raise NotRun("there are no test rows (data.test_fraction is 0)")
    known = {hash(ids.tobytes()) for ids in _rows(train)}
    doubled = [place for place, ids in enumerate(_rows(test)) if hash(ids.tobytes()) in known]
    if doubled:
        names = [str(name) for name in test.select(doubled[:3])["id"]]
        fix = "take them out of data.test" if context.recipe.data.test is not None else _FAULT
        raise Failed(f"{len(doubled):,} test rows are train rows too, such as {shown(names)}", fix)
    shared = context.prepared.ledger["overlap"]["test_rows_with_a_train_prompt"]
    if shared and context.recipe.data.test is None:
        raise Failed(f"{shared:,} test rows have the first question of a train row", _FAULT)
    return f"{len(test):,} test rows" + (f"; {shared:,} have the first question of a train row" if shared else "")


def _rows(data: Any) -> list[np.ndarray]:
    rows: list[np.ndarray] = []
    for chunk in filter(len, data.data.column("input_ids").chunks):
        offsets = chunk.offsets.to_numpy() - chunk.offsets[0].as_py()
        rows += np.split(chunk.flatten().to_numpy(), offsets[1:-1])
    return rows


def shares_are_sane(context: CheckContext) -> str:
    """Compare how much is learned, cut and skipped with what a sound data set shows."""
    ledger = context.prepared.ledger
    tokens, rows = ledger["tokens"], ledger["rows"]
    learned, cut = tokens["supervised"] / tokens["kept"], tokens["cut"] / tokens["rendered"]
    skipped = rows["skipped"] / rows["read"]
    if not LEAST_SUPERVISED <= learned <= MOST_SUPERVISED:
        fix = "see data.format and data.train_on, and look at rows with `minisft inspect --worst share`"
        raise Failed(f"{learned:.1%} of the tokens are learned", fix)
    if cut > MOST_CUT:
        raise Failed(f"{cut:.0%} of the tokens are cut", "raise data.max_length")
    if skipped > MOST_SKIPPED:
        reasons = ", ".join(f"{reason} {number:,}" for reason, number in ledger["skipped"].items())
        raise Failed(f"{skipped:.0%} of the rows are skipped ({reasons})", "fix them, or see data.invalid: repair")
    return f"{learned:.0%} of the tokens are learned, {cut:.0%} cut; {skipped:.0%} of the rows skipped"
