"""Write recipes/demo.sharegpt.jsonl: invented talks at the desk of a bicycle workshop.

Run `python recipes/make_demo_conversations.py`; the same bytes come out every time. The customers' words
vary freely, the desk answers in one house style, and what it answers is decided by the customer's details,
by the desk's note (the system prompt) and by the shop's price list. So a small model can learn the style in
a few minutes, and yet no constant answer scores well on the held-out conversations.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

SEED = 20
COUNT = 424
MOST_TURNS = 8
OUTPUT = Path(__file__).with_name("demo.sharegpt.jsonl")

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday")
NUMBERS = {9: "nine", 10: "ten", 11: "eleven", 12: "noon", 1: "one", 2: "two", 3: "three", 4: "four"}
BIKES = ("road bike", "city bike", "mountain bike", "folding bike", "gravel bike", "cargo bike", "e-bike", "tandem")
MECHANICS = ("Priya", "Otto", "Rosa", "Kenji")
NAMES = tuple(
    """
    Maria Leo Ben Anna Tom Nora Sam Lucy Omar Ella Jack Mia Hugo Ivy Paul Zoe Adam Lena Max Ruby Noah Clara
    Eric Alice Felix Grace Oscar Julia Simon Emma David Sofia Peter Laura Daniel Rachel Victor Helen Martin
    Diana George Fiona Frank Amy Henry Irene Ivan Jane Kevin Karen Louis Linda Marco Megan Nick Olivia Owen
    Paula Ray Rita Steve Sara Tim Tina Vince Wendy Carlos Bella Chloe Dean Eva Gina Hannah Joel Kate Liam
    Molly Nina Robin Stella Theo Vera Walter Yara Ahmed Bruno Carmen Dora Elias Farah
    """.split()  # noqa: SIM905
)


@dataclass(frozen=True)
class Job:
    """An entry of the price list, with the ways in which customers ask for it."""

    name: str
    price: int
    overnight: bool
    wishes: tuple[str, ...]  # fit "I need ..." and "How much is ...?"
    troubles: tuple[str, ...]  # whole clauses; {bike} is "my bike" or, say, "my road bike"


JOBS = (
    Job(
        "flat tire repair", 15, False,
        ("a flat tire repair", "a puncture repair", "a new inner tube"),
        ("the tire on {bike} is flat", "{bike} has a puncture", "{bike} keeps losing air"),
    ),
    Job(
        "brake adjustment", 20, False,
        ("a brake adjustment", "a brake fix", "a brake check"),
        ("the brakes on {bike} squeal", "{bike} barely stops when I brake", "the brakes on {bike} feel weak"),
    ),
    Job(
        "chain replacement", 30, False,
        ("a chain replacement", "a new chain", "a chain swap"),
        ("the chain on {bike} snapped", "{bike} has a rusty chain", "the chain of {bike} keeps falling off"),
    ),
    Job(
        "gear tuning", 25, False,
        ("a gear tuning", "a gear adjustment", "a gear check"),
        ("the gears on {bike} slip", "{bike} won't change gear", "the gears of {bike} are a mess"),
    ),
    Job(
        "spoke repair", 18, False,
        ("a spoke repair", "a new spoke", "a spoke replacement"),
        ("a spoke on {bike} snapped", "{bike} has a broken spoke", "two spokes of {bike} are loose"),
    ),
    Job(
        "saddle swap", 10, False,
        ("a saddle swap", "a new saddle", "a new seat"),
        ("the saddle of {bike} is torn", "the seat on {bike} broke", "{bike} has a terribly hard saddle"),
    ),
    Job(
        "light installation", 22, False,
        ("a light installation", "a new headlight", "a new rear light"),
        ("the front light on {bike} is dead", "{bike} has no lights", "the rear light of {bike} flickers"),
    ),
    Job(
        "pedal replacement", 16, False,
        ("a pedal replacement", "a new pedal", "a pedal swap"),
        ("a pedal on {bike} fell off", "the left pedal of {bike} is cracked", "{bike} lost a pedal"),
    ),
    Job(
        "wheel truing", 35, True,
        ("a wheel truing", "a wheel straightening", "a bent wheel fix"),
        ("the front wheel of {bike} wobbles", "{bike} has a bent wheel", "the back wheel on {bike} is crooked"),
    ),
    Job(
        "full tune-up", 80, True,
        ("a full tune-up", "a full service", "a complete check-up"),
        ("{bike} has not been serviced in years", "everything on {bike} rattles", "{bike} needs the full works"),
    ),
    Job(
        "hub overhaul", 45, True,
        ("a hub overhaul", "a hub service", "a hub repair"),
        ("the hub of {bike} grinds", "the rear hub on {bike} is noisy", "{bike} has a rough front hub"),
    ),
    Job(
        "paint job", 90, True,
        ("a paint job", "a respray", "a new coat of paint"),
        ("the paint on {bike} is peeling", "{bike} is covered in scratches", "I want {bike} in a new color"),
    ),
)  # fmt: skip

FOREIGN = (
    "skateboards", "scooters", "cars", "motorbikes", "strollers", "wheelchairs", "skis", "phones", "watches",
    "shoes", "lawn mowers", "laptops", "suitcases", "pianos", "sewing machines", "tents", "roller skates",
    "surfboards", "cameras", "umbrellas",
)  # fmt: skip

ASK_JOB = "Gladly! What does your bike need?"
ASK_NAME = "And what name, please?"
ASK_OWNER = "Of course! What name is it under?"


@dataclass(frozen=True)
class Visit:
    """All that a booking is made of; `bike` and `mechanic` may be unnamed."""

    job: Job
    day: str
    time: str  # as the desk writes it: "10 am", "noon", "2:30 pm"
    name: str
    bike: str | None = None
    mechanic: str | None = None


Turn = tuple[str, str]  # who speaks ("system", "human" or "gpt") and the words


# ---- What the desk says: one wording for each thing ----


def day_after(day: str) -> str:
    """The next working day: the shop is closed on Sunday."""
    return DAYS[(DAYS.index(day) + 1) % len(DAYS)]


def details(visit: Visit) -> str:
    """The booking read back, such as "wheel truing for your e-bike, Friday at noon, $35. Ready Saturday!"."""
    bike = f" for your {visit.bike}" if visit.bike else ""
    mechanic = f" with {visit.mechanic}" if visit.mechanic else ""
    end = f"Ready {day_after(visit.day)}!" if visit.job.overnight else f"See you {visit.day}!"
    return f"{visit.job.name}{bike}{mechanic}, {visit.day} at {visit.time}, ${visit.job.price}. {end}"


def confirm(visit: Visit) -> str:
    return f"Booked, {visit.name}: {details(visit)}"


def quote(job: Job) -> str:
    return f"A {job.name} is ${job.price}, done the {'next' if job.overnight else 'same'} day."


def ask_when(job: Job) -> str:
    return f"A {job.name} is ${job.price}. Which day and time?"


def refuse_day(visit: Visit) -> str:
    """Say no to a Sunday or a full day, and offer the same time on the next working day."""
    if visit.day == "Sunday":
        return f"Sorry, we are closed on Sunday. How about Monday at {visit.time}?"
    return f"Sorry, {visit.day} is full. How about {day_after(visit.day)} at {visit.time}?"


def hours(day: str) -> str:
    if day == "Sunday":
        return "We are closed on Sunday."
    return f"On {day} we are open from 9 am to {'5' if day == 'Saturday' else '6'} pm."


# ---- What customers say: many wordings ----


def say_time(rng: random.Random, time: str) -> str:
    """The time in a customer's words: "2:30 pm" may become "2:30" or "half past two"."""
    if time == "noon":
        return rng.choice(("noon", "12", "midday"))
    clock, half_day = time.split()
    hour, _, minutes = clock.partition(":")
    word = NUMBERS[int(hour)]
    spoken = f"half past {word}" if minutes else rng.choice((word, f"{word} o'clock"))
    return rng.choice((time, time, clock, f"{clock}{half_day}", spoken))


def say_when(rng: random.Random, day: str, time: str) -> str:
    """A moment in a customer's words, fit for "I can come {}" and for "How about {}?"."""
    time = say_time(rng, time)
    return rng.choice((f"{day} at {time}", f"this {day} at {time}", f"{day}, {time}", f"{day} {time}"))


def say_job(rng: random.Random, visit: Visit) -> str:
    bike = f"my {visit.bike or 'bike'}"
    if rng.random() < 0.5:
        return rng.choice(visit.job.troubles).format(bike=bike)
    wish = rng.choice(visit.job.wishes)
    wish = f"{wish} for {bike}" if visit.bike else wish
    return rng.choice(("I need {}", "I'd like {}", "I'm after {}", "could you do {}?", "can I get {}?")).format(wish)


def say_name(rng: random.Random, name: str) -> str:
    return rng.choice(("I'm {}", "it's {}", "my name is {}", "{} here", "this is {}", "name's {}")).format(name)


def give_name(rng: random.Random, name: str) -> str:
    return rng.choice(("{}", "{}, please", "it's {}", "under {}", "my name is {}", "I'm {}")).format(name)


def sentences(rng: random.Random, *parts: str) -> str:
    """Join what a customer says into a message; some type in lower case and drop the last stop."""
    ended = [part if part[-1] in "?!.," else f"{part}." for part in parts if part]
    text = " ".join(part[0].upper() + part[1:] for part in ended)
    return text.lower().rstrip(".!") if rng.random() < 0.15 else text


def greet(rng: random.Random) -> str:
    return rng.choice(("", "", "", "", "hi!", "hello!", "hey!", "good morning!"))


def open_booking(rng: random.Random, visit: Visit, given: set[str], when: str) -> str:
    """The first message of a booking, with the slots that are `given`, in any order."""
    parts = [say_job(rng, visit)] if "job" in given else []
    if "when" in given:
        asks = (
            "can I come {}?",
            "is {} free?",
            "does {} work?",
            "I can come {}",
            "how about {}?",
            "{}, if possible",
            "I have time {}",
        )
        parts.append(rng.choice(asks).format(when))
    if "name" in given:
        parts.insert(rng.randrange(len(parts) + 1), say_name(rng, visit.name))
    if "job" not in given and "when" not in given:
        wants = (
            "I'd like to book a repair",
            "can you fix my bike?",
            "I want to bring in my bike",
            "my bike needs help",
        )
        parts.append(rng.choice(wants))
    return sentences(rng, greet(rng), *parts)


# ---- The kinds of talk ----


def draw_time(rng: random.Random) -> str:
    hour = rng.choice(tuple(NUMBERS))
    if hour == 12:
        return "noon"
    minutes = rng.choice(("", "", ":30"))
    return f"{hour}{minutes} {'am' if hour >= 9 else 'pm'}"


def draw_visit(rng: random.Random) -> Visit:
    bike = rng.choice(BIKES) if rng.random() < 0.3 else None
    return Visit(rng.choice(JOBS), rng.choice(DAYS), draw_time(rng), rng.choice(NAMES), bike)


def other(rng: random.Random, choices: tuple[str, ...], taken: str) -> str:
    return rng.choice([choice for choice in choices if choice != taken])


def draw_given(rng: random.Random) -> set[str]:
    """Which slots the first message brings; the desk asks for the others."""
    kinds = (("job", "when", "name"), ("job", "when"), ("job", "name"), ("job",), ("when", "name"), ("name",))
    return set(rng.choices(kinds, weights=(42, 26, 12, 11, 5, 4))[0])


def fill_slots(rng: random.Random, visit: Visit, given: set[str], when: str) -> tuple[list[Turn], Visit]:
    """The talk from the first message to the confirmation; a customer may change the day when giving the name."""
    turns = [("human", open_booking(rng, visit, given, when))]
    if "job" not in given:
        turns += [("gpt", ASK_JOB), ("human", sentences(rng, say_job(rng, visit)))]
    if "when" not in given:
        turns += [("gpt", ask_when(visit.job)), ("human", sentences(rng, when))]
    if "name" not in given:
        answer = [give_name(rng, visit.name)]
        if rng.random() < 0.2:
            visit = replace(visit, day=other(rng, DAYS, visit.day))
            answer.append(
                rng.choice(("oh, better {}", "no wait, make it {}", "actually, {} instead")).format(visit.day)
            )
        turns += [("gpt", ASK_NAME), ("human", sentences(rng, *answer))]
    return [*turns, ("gpt", confirm(visit))], visit


def follow_up(rng: random.Random, visit: Visit) -> list[Turn]:
    """One more question after the confirmation, whose answer needs what was said before."""
    new = replace(visit, day=other(rng, DAYS, visit.day))
    late = replace(visit, time=draw_time(rng))
    when = say_time(rng, late.time)
    asks = (
        (
            ("thanks a lot!", "great, thank you!", "perfect, thanks!"),
            f"You're welcome, {visit.name}! Until {visit.day}!",
        ),
        (("sorry, when was that?", "what time was it again?"), f"{visit.day} at {visit.time}, {visit.name}!"),
        ((f"oh, can we do {new.day} instead?", f"hmm, {new.day} is better"), f"Moved, {new.name}: {details(new)}"),
        ((f"could we make it {when}?", f"can I come at {when} instead?"), f"Moved, {late.name}: {details(late)}"),
    )
    questions, answer = rng.choice(asks)
    return [("human", sentences(rng, rng.choice(questions))), ("gpt", answer)]


def booking(rng: random.Random) -> list[Turn]:
    visit = draw_visit(rng)
    turns, visit = fill_slots(rng, visit, draw_given(rng), say_when(rng, visit.day, visit.time))
    if len(turns) <= 4 and rng.random() < 0.25:
        turns += follow_up(rng, visit)
    if len(turns) <= 4 and rng.random() < 0.15:
        turns.insert(0, ("system", idle_note(rng, turns)))
    return turns


def idle_note(rng: random.Random, turns: list[Turn]) -> str:
    """A note that does not touch the talk, so that no note is obeyed where it does not apply."""
    said = " ".join(text for _, text in turns).lower()
    day = rng.choice([day for day in DAYS if day.lower() not in said])
    return rng.choice((f"{day} is full.", f"{day} is full.", f"Today is {day}."))


def booking_with_mechanic(rng: random.Random) -> list[Turn]:
    """The desk's note names the mechanic, and so does the confirmation."""
    visit = replace(draw_visit(rng), mechanic=rng.choice(MECHANICS), bike=None)
    note = rng.choice(("The mechanic this week is {}.", "{} does the repairs this week.")).format(visit.mechanic)
    turns, _ = fill_slots(rng, visit, {"job", "when", "name"}, say_when(rng, visit.day, visit.time))
    return [("system", note), *turns]


def booking_by_date(rng: random.Random) -> list[Turn]:
    """The customer says "today" or "tomorrow"; the desk's note tells which day that is."""
    visit = draw_visit(rng)
    today, word = visit.day, "today"
    if visit.day != "Monday" and rng.random() < 0.7:
        today, word = DAYS[DAYS.index(visit.day) - 1], "tomorrow"
    turns, _ = fill_slots(rng, visit, {"job", "when", "name"}, f"{word} at {say_time(rng, visit.time)}")
    return [("system", f"Today is {today}."), *turns]


def booking_on_closed_day(rng: random.Random) -> list[Turn]:
    """The wished day is a Sunday, or full by the desk's note; the customer takes the next day or leaves it there."""
    visit = replace(draw_visit(rng), day=rng.choice((*DAYS, "Sunday", "Sunday")))
    when = say_when(rng, visit.day, visit.time)
    turns = [("human", open_booking(rng, visit, {"job", "when"}, when)), ("gpt", refuse_day(visit))]
    if visit.day != "Sunday":
        turns.insert(0, ("system", f"{visit.day} is full."))
    if rng.random() < 0.6:
        agreed = replace(visit, day="Monday" if visit.day == "Sunday" else day_after(visit.day))
        yes = rng.choice(("yes", "that works", "fine by me", "all right", "ok, good"))
        turns += [("human", sentences(rng, yes, say_name(rng, visit.name))), ("gpt", confirm(agreed))]
    return turns


def with_owner(rng: random.Random, name: str, request: str, answer: str) -> list[Turn]:
    """A request about a booking that exists: the desk asks whose it is where the customer did not say."""
    if rng.random() < 0.6:
        parts = [request, say_name(rng, name)]
        rng.shuffle(parts)
        return [("human", sentences(rng, greet(rng), *parts)), ("gpt", answer)]
    first = ("human", sentences(rng, greet(rng), request))
    return [first, ("gpt", ASK_OWNER), ("human", sentences(rng, give_name(rng, name))), ("gpt", answer)]


def move(rng: random.Random) -> list[Turn]:
    visit = draw_visit(rng)
    day = other(rng, DAYS, visit.day)
    asks = (
        "can you move me from {old} to {new}?",
        "I have to swap {old} for {new}",
        "I booked {old}, but I can only come {new}",
        "could my {old} visit go to {new}?",
    )
    request = rng.choice(asks).format(old=visit.day, new=f"{day} at {say_time(rng, visit.time)}")
    return with_owner(rng, visit.name, request, f"Moved, {visit.name}: from {visit.day} to {day} at {visit.time}.")


def cancel(rng: random.Random) -> list[Turn]:
    visit = draw_visit(rng)
    asks = (
        "please cancel my visit {}",
        "I can't make it {}",
        "I won't need my slot {} after all",
        "can you call off my repair {}?",
    )
    request = rng.choice(asks).format(say_when(rng, visit.day, visit.time))
    return with_owner(rng, visit.name, request, f"Canceled, {visit.name}: {visit.day} at {visit.time} is free again.")


def price(rng: random.Random) -> list[Turn]:
    """A price, then perhaps another one or the booking itself."""
    visit = replace(draw_visit(rng), bike=None)
    asks = ("how much is {}?", "what does {} cost?", "what do you charge for {}?", "price for {}?")
    first = rng.choice(asks).format(rng.choice(visit.job.wishes))
    turns = [("human", sentences(rng, greet(rng), first)), ("gpt", quote(visit.job))]
    draw = rng.random()
    if draw < 0.35:
        job = rng.choice([job for job in JOBS if job != visit.job])
        question = rng.choice(("and {}?", "ok, and {}?", "what about {}?")).format(rng.choice(job.wishes))
        turns += [("human", sentences(rng, question)), ("gpt", quote(job))]
    elif draw < 0.6:
        yes = rng.choice(("book me in {}", "then I'll come {}", "good, put me down {}"))
        when = yes.format(say_when(rng, visit.day, visit.time))
        turns += [("human", sentences(rng, when, say_name(rng, visit.name))), ("gpt", confirm(visit))]
    return turns


def opening_hours(rng: random.Random) -> list[Turn]:
    day = rng.choice((*DAYS, "Sunday"))
    asks = (
        "when are you open on {}?",
        "what are your hours on {}?",
        "are you open on {}?",
        "until when can I drop by on {}?",
        "how long are you there on {}?",
    )
    return [("human", sentences(rng, greet(rng), rng.choice(asks).format(day))), ("gpt", hours(day))]


def pick_up(rng: random.Random) -> list[Turn]:
    """The desk's note lists what is ready; who is not on it must wait."""
    first, second, absent = rng.sample(NAMES, 3)
    jobs = rng.sample(JOBS, 2)
    note = f"Ready: {first}'s {jobs[0].name}, {second}'s {jobs[1].name}."
    name, job = rng.choice(((first, jobs[0]), (second, jobs[1]), (absent, None)))
    request = rng.choice(("is my bike ready?", "can I pick up my bike?", "is my repair done?", "how far is my bike?"))
    answer = f"Yes, {name}! Your {job.name} is done: ${job.price}." if job else f"Not yet, {name}! We will call you."
    parts = [request, say_name(rng, name)]
    rng.shuffle(parts)
    return [("system", note), ("human", sentences(rng, greet(rng), *parts)), ("gpt", answer)]


def out_of_scope(rng: random.Random) -> list[Turn]:
    """Something that the shop does not do; some customers then book what it does."""
    thing = rng.choice(FOREIGN)
    asks = ("do you repair {}?", "can you fix {} too?", "do you also do {}?", "do you sell {}?")
    question = sentences(rng, greet(rng), rng.choice(asks).format(thing))
    turns = [("human", question), ("gpt", f"Sorry, no {thing} here, only bicycles!")]
    if rng.random() < 0.4:
        visit = draw_visit(rng)
        turns += fill_slots(rng, visit, {"job", "when", "name"}, say_when(rng, visit.day, visit.time))[0]
    return turns


KINDS: tuple[tuple[Callable[[random.Random], list[Turn]], int], ...] = (
    (booking, 42),
    (booking_with_mechanic, 6),
    (booking_by_date, 8),
    (booking_on_closed_day, 7),
    (move, 8),
    (cancel, 7),
    (price, 9),
    (opening_hours, 3),
    (pick_up, 6),
    (out_of_scope, 4),
)


def make_dialogues(count: int = COUNT, seed: int = SEED) -> list[list[Turn]]:
    """`count` talks of at most MOST_TURNS turns, no two of which start with the same words of a customer."""
    rng = random.Random(seed)
    kinds, weights = zip(*KINDS, strict=True)
    dialogues: list[list[Turn]] = []
    seen: set[str] = set()
    while len(dialogues) < count:
        turns = rng.choices(kinds, weights)[0](rng)
        first = next(text for who, text in turns if who == "human").casefold()
        if first not in seen and len(turns) <= MOST_TURNS:
            seen.add(first)
            dialogues.append(turns)
    return dialogues


def to_line(number: int, turns: list[Turn]) -> str:
    """One dialogue as a line of ShareGPT JSON, newline included."""
    conversations = [{"from": who, "value": text} for who, text in turns]
    return json.dumps({"id": f"demo-{number:04}", "conversations": conversations}, ensure_ascii=False) + "\n"


def make_file() -> bytes:
    """The whole of demo.sharegpt.jsonl."""
    lines = (to_line(number, turns) for number, turns in enumerate(make_dialogues(), start=1))
    return "".join(lines).encode()


if __name__ == "__main__":
    OUTPUT.write_bytes(make_file())
