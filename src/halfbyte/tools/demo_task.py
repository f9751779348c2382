"""The demo's task: turn an order in plain English into one line of YAML.

    Could you get three copper pipes over to Priya in Leeds by 14 March?
    {item: copper pipes, quantity: 3, name: Priya, city: Leeds, date: 14 March}

There is one right answer, which is easy to check. An untrained small model does not know the keys,
so it never gives it. The held-out cases share nothing with the training examples but the language:
phrasings, names, cities, words in the items, quantities and dates all differ. So only the task can
be learned.

YAML and not JSON because of tokenisation: after a space and after a quotation mark the same name is
different tokens, so JSON requires spelling where YAML requires copying. With JSON, SmolLM2-135M
misspells a word in three of ten held-out orders, at any learning rate tried.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from halfbyte.atomic import new_file
from halfbyte.errors import OutputError
from halfbyte.input_files import open_file

SYSTEM = "Turn the order into one line of YAML."
"""The system message: it says what is wanted, and leaves the keys to be learned."""


def _lines(text: str) -> tuple[str, ...]:
    return tuple(line for line in text.strip().splitlines() if line)


def _commas(text: str) -> tuple[str, ...]:
    return tuple(" ".join(part.split()) for part in text.split(","))


MONTHS = _commas(
    "January, February, March, April, May, June, July, August, September, October, November, "
    "December"
)
NUMBER_WORDS = dict(enumerate(_commas("two, three, four, five, six, seven, eight, nine, ten"), 2))
"""Numbers that may be spelled out."""


@dataclass(frozen=True)
class Vocabulary:
    """The parts of orders: one for training, one held out, with nothing in common.

    Quantities and dates have no lists: a held-out quantity is a multiple of 3, and a held-out
    date one whose day and month add up to a multiple of 4.
    """

    phrasings: tuple[str, ...]
    names: tuple[str, ...]
    cities: tuple[str, ...]
    items: tuple[str, ...]
    held_out: bool

    @property
    def quantities(self) -> list[int]:
        """From 2 to 99."""
        return [number for number in range(2, 100) if (number % 3 == 0) == self.held_out]

    @property
    def dates(self) -> list[str]:
        """Such as ``14 March``, up to the 28th."""
        return [
            f"{day} {name}"
            for month, name in enumerate(MONTHS)
            for day in range(1, 29)
            if ((day + month) % 4 == 0) == self.held_out
        ]


@dataclass(frozen=True)
class Order:
    """One case: the sentence, and its content."""

    sentence: str
    answer: dict[str, str | int]

    @property
    def expected(self) -> str:
        """The exact answer: a YAML mapping on one line."""
        return "{" + ", ".join(f"{key}: {value}" for key, value in self.answer.items()) + "}"

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation to train on, or to evaluate."""
        return [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": self.sentence},
            {"role": "assistant", "content": self.expected},
        ]


@dataclass(frozen=True)
class TaskFiles:
    """The paths of the two files of the task."""

    train: Path
    test: Path


def make_orders(vocabulary: Vocabulary, count: int, *, seed: int) -> list[Order]:
    """Generates ``count`` orders; deterministic for a seed.

    Phrasings, names, cities and items are dealt in turn from shuffled decks, so that each is used
    as often as any other.
    """
    generator = np.random.Generator(np.random.PCG64([seed, vocabulary.held_out]))

    def deal(values: Sequence[str]) -> list[str]:
        rounds = -(-count // len(values))
        deck = [value for _ in range(rounds) for value in generator.permutation(values).tolist()]
        return deck[:count]

    phrasings, names = deal(vocabulary.phrasings), deal(vocabulary.names)
    cities, items, dates = deal(vocabulary.cities), deal(vocabulary.items), deal(vocabulary.dates)
    # Small numbers are what orders are made of, and only they are ever spelled out.
    small = [number for number in vocabulary.quantities if number in NUMBER_WORDS]
    orders = []
    for phrasing, name, city, item, date in zip(
        phrasings, names, cities, items, dates, strict=True
    ):
        pool = small if generator.random() < 0.5 else vocabulary.quantities
        quantity = int(generator.choice(pool))
        spelled = quantity in NUMBER_WORDS and generator.random() < 0.6
        sentence = phrasing.format(
            quantity=NUMBER_WORDS[quantity] if spelled else quantity,
            item=item,
            name=name,
            city=city,
            date=date,
        )
        answer: dict[str, str | int] = {
            "item": item,
            "quantity": quantity,
            "name": name,
            "city": city,
            "date": date,
        }
        orders.append(Order(sentence[0].upper() + sentence[1:], answer))
    return orders


def write_task(
    directory: str | Path, *, seed: int = 0, train: int = 448, test: int = 120
) -> TaskFiles:
    """Writes ``orders.train.jsonl`` and ``orders.test.jsonl``, one ``messages`` row an order.

    The held-out orders are the same for every seed, so that accuracies can be compared.

    Raises:
        OutputError: The directory cannot be made or written, or holds other files of these names.
    """
    folder = Path(directory)
    files = TaskFiles(folder / "orders.train.jsonl", folder / "orders.test.jsonl")
    for path in (files.train, files.test):
        if path.exists() and not _is_task(path):
            raise OutputError(
                f"{path} was not written by the demo, so it is not replaced: give another --output"
            )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, orders in (
            (files.train, make_orders(TRAINING, train, seed=seed)),
            (files.test, make_orders(HELD_OUT, test, seed=0)),
        ):
            rows = [json.dumps({"messages": order.messages}) for order in orders]
            with new_file(path) as file:
                file.write(("\n".join(rows) + "\n").encode())
    except OSError as error:
        raise OutputError(f"The task cannot be written to {folder}: {error.strerror}.") from error
    return files


def _is_task(path: Path) -> bool:
    try:
        with open_file(path) as file:
            row = json.loads(file.readline(10_000))
            return bool(row["messages"][0]["content"] == SYSTEM)
    except (OSError, ValueError, RecursionError, LookupError, TypeError):
        return False


TRAINING = Vocabulary(
    held_out=False,
    phrasings=_lines("""
Please send {quantity} {item} to {name} in {city} by {date}.
Could you get {quantity} {item} over to {name} in {city} by {date}?
{name} in {city} needs {quantity} {item} by {date}.
I would like {quantity} {item} delivered to {name} in {city} on {date}.
Hi, this is {name} from {city}. I need {quantity} {item} by {date}.
We owe {name} in {city} {quantity} {item}, due on {date}.
Ship {quantity} {item} to {city} for {name}, to arrive on {date}.
{quantity} {item} for {name} in {city}, by {date} please.
On {date}, {name} in {city} expects {quantity} {item}.
Can {name} have {quantity} {item} in {city} by {date}?
Order for {name}, {city}: {quantity} {item}, delivery {date}.
By {date} we must deliver {quantity} {item} to {name} in {city}.
{name} called from {city} and asked for {quantity} {item} by {date}.
Put {quantity} {item} on the van to {city} for {name} on {date}.
My name is {name}, I live in {city}, and I want {quantity} {item} on {date}.
Send them to {name} in {city} by {date}: {quantity} {item}.
Is it possible to bring {quantity} {item} to {city} by {date}? They are for {name}.
{name} is after {quantity} {item}. Deliver to {city} before {date}.
Make sure that {name} gets {quantity} {item} in {city} by {date}.
For {date}: {quantity} {item}, to be sent to {name} in {city}.
Good morning, we need {quantity} {item} in {city} on {date}, for {name}.
The customer in {city}, {name}, has ordered {quantity} {item} for {date}.
I'm {name}. Please drop off {quantity} {item} in {city} on {date}.
There is an order from {city} for {quantity} {item}; {name} wants it by {date}.
Deliver to {name}, {city}, no later than {date}: {quantity} {item}.
Would you mind sending {quantity} {item} to {name}? The address is in {city}, the date {date}.
We promised {name} {quantity} {item} by {date}. It all goes to {city}.
{city} is where {name} lives; take {quantity} {item} there on {date}.
Just {quantity} {item} for {name} this time, in {city} on {date}.
Please book {quantity} {item} for delivery on {date} to {name} in {city}.
{date} is the day {name} in {city} needs the {quantity} {item}.
Let {name} have {quantity} {item} by {date}. Our shop in {city} will hand over the goods.
From {city}, {name} writes: I need {quantity} {item} before {date}.
Get me {quantity} {item} in {city} by {date}. Thanks, {name}.
{name} would be happy to receive {quantity} {item} in {city} on {date}.
Dear all, please have {quantity} {item} ready in {city} on {date} for {name}.
A parcel of {quantity} {item} has to reach {name} in {city} by {date}.
It is urgent: {name} in {city} is out of stock and needs {quantity} {item} by {date}.
{name} ({city}) wants {quantity} {item} on {date}.
How soon can you send {quantity} {item} to {city}? {name} must have them by {date}.
Reserve {quantity} {item} for {name}, who picks them up in {city} on {date}.
Tell the warehouse that {quantity} {item} go to {city} by {date}, care of {name}.
Customer: {name}. City: {city}. Wants {quantity} {item} by {date}.
When you are in {city} on {date}, leave {quantity} {item} with {name}.
Hello, can I get {quantity} {item} sent to my flat in {city} by {date}? {name} here.
The {quantity} {item} should be with {name} in {city} by {date}.
{name} has paid for {quantity} {item}, so take them to {city} on {date}.
We are sending {quantity} {item} out to {city} on {date}; sign them over to {name}.
Remember the {quantity} {item} that {name} in {city} ordered for {date}.
Here are the {quantity} {item} that {name} from {city} asked for; they go out on {date}.
Go to {city} on {date} and hand {quantity} {item} to {name}.
Travel to {city} by {date} with {quantity} {item} for {name}.
{name} in {city} needs {quantity} {item} not later than {date}.
One more order: {name} in {city} would like {quantity} {item} by {date}.
Quick question: could {name} in {city} have {quantity} {item} before {date}?
They sold {quantity} {item} to {name}, who expects them in {city} on {date}.
Don't keep {name} waiting: {quantity} {item} to {city} by {date}.
It seems {name} never got the {quantity} {item}. Send them to {city} by {date}.
Post {quantity} {item} to {name}, our agent in {city}, so that they are there by {date}.
You may deliver the {quantity} {item} for {name} in {city} at any time until {date}.
Someone in {city} called {name} has bought {quantity} {item}; deliver on {date}.
Today's task is to load {quantity} {item} for {name} in {city}, due {date}.
Our neighbour {name} has moved to {city} and needs {quantity} {item} on {date}.
If you can, send {quantity} {item} to {name} in {city} by {date}.
"""),
    names=_commas("""
Aaron, Abigail, Adele, Adrian, Agnes, Ahmed, Aisha, Alan, Albert, Alice, Amara, Amelia, Amir,
Andrea, Anita, Anjali, Anna, Anton, Arjun, Arthur, Astrid, Barbara, Beatrice, Benjamin, Bianca,
Boris, Brenda, Brian, Bruno, Camila, Carlos, Caroline, Cecilia, Chen, Chloe, Christine, Clara,
Daniel, David, Deborah, Diana, Diego, Dmitri, Edith, Edward, Elena, Elias, Elizabeth, Emma, Eric,
Esther, Fatima, Felix, Fiona, Frank, Frederick, Gabriel, Gemma, George, Gloria, Grace, Gustav,
Hannah, Harold, Hassan, Helen, Henry, Hiroshi, Hugo, Ibrahim, Ingrid, Irene, Isabel, Ivan, Jacob,
James, Jasmine, Jennifer, Jerome, Joan, Johanna, Jonas, Joseph, Julia, Kamal, Karen, Katarina,
Keiko, Kenneth, Kevin, Kwame, Lars, Laura, Leila, Leonard, Linda, Louis, Lucia, Lucy, Magnus,
Marco, Margaret, Maria, Marie, Martin, Matilda, Matthew, Mei, Michael, Mohammed, Monica, Nadia,
Naomi, Natalie, Nathan, Nicholas, Nina, Noah, Olga, Oliver, Omar, Oscar, Pablo, Patricia, Paul,
Pedro, Peter, Philip, Priya, Rachel, Ralph, Rania, Rebecca, Ricardo, Robert, Rosa, Ruth, Samuel,
Sandra, Sanjay, Sarah, Sebastian, Simon, Sofia, Stefan, Stella, Susan, Tamara, Teresa, Thomas,
Ursula, Valerie, Vera, Victor, Walter, Wei, William, Yasmin, Yuki, Zara
"""),
    cities=_commas("""
Aberdeen, Amsterdam, Athens, Atlanta, Baltimore, Bangkok, Barcelona, Beijing, Belfast, Belgrade,
Berlin, Birmingham, Bologna, Boston, Bristol, Brussels, Budapest, Buenos Aires, Cairo, Cambridge,
Cape Town, Cardiff, Chicago, Cologne, Copenhagen, Dallas, Delhi, Denver, Dublin, Durham, Edinburgh,
Exeter, Geneva, Glasgow, Hamburg, Hanoi, Houston, Istanbul, Jakarta, Kyoto, Lagos, Las Vegas,
Leeds, Lima, Lisbon, Liverpool, London, Lyon, Madrid, Manchester, Melbourne, Miami, Milan,
Montreal, Mumbai, Munich, Nairobi, Naples, New York, Nottingham, Oslo, Ottawa, Oxford, Paris,
Philadelphia, Portland, Prague, Rome, Hong Kong, Santiago, Seattle, Sheffield, Singapore,
Stockholm, Sydney, Tokyo, Toronto, Vienna, Warsaw, Zurich
"""),
    items=_commas("""
garden chairs, copper pipes, desk lamps, paper cups, olive trees, wool blankets, steel bolts,
wooden spoons, coffee mugs, picture frames, bath towels, rubber gloves, school bags, bicycle tyres,
wine glasses, oak tables, light bulbs, leather belts, tennis balls, cotton shirts, kitchen knives,
paint brushes, plastic boxes, birthday cards, car batteries, tea pots, silk scarves, roof tiles,
office desks, water bottles, fire alarms, rain coats, cheese graters, metal shelves, flower pots,
dog leads, travel guides, winter boots, guitar strings, bread rolls, door handles, wall clocks,
swimming goggles, fishing rods, phone chargers, printer cartridges, jam jars, linen napkins, first
aid kits, folding ladders, nails, hammers, screws, pillows, mattresses, candles, notebooks,
pencils, envelopes, umbrellas, bricks, buckets, mirrors, cushions, sofas, carpets, curtains,
kettles, toasters, saucepans, plates, bowls, forks, ropes, tents, helmets, bicycles, skateboards,
violins, drums, trumpets, pianos, cameras, tripods, keyboards, monitors, laptops, routers,
headphones, microphones, radios, televisions, magazines, dictionaries, novels, maps, posters,
stamps, puzzles, dolls, kites, balloons, apples, oranges, lemons, cabbages, carrots, pumpkins,
tomatoes, melons, sandwiches, pizzas, cakes, muffins, biscuits, pies
"""),
)

HELD_OUT = Vocabulary(
    held_out=True,
    phrasings=_lines("""
Kindly dispatch {quantity} {item} to {name} in {city} before {date}.
Our client {name} in {city} has requested {quantity} {item} for {date}.
I want to order {quantity} {item} for {name}, to be delivered in {city} on {date}.
May I ask you to bring {name} {quantity} {item} by {date}? The place is {city}.
Over in {city}, {name} is waiting for {quantity} {item} and must get them by {date}.
Please pack the {quantity} {item} that {name} in {city} is expecting on {date}.
It's {name}, writing from {city}: please send me {quantity} {item} by {date}.
Next on the list: {quantity} {item} for {name} in {city}, due by {date}.
Can we manage to get {quantity} {item} to {city} by {date}? {name} is asking.
Someone named {name} in {city} ordered {quantity} {item} to arrive by {date}.
Before {date}, please wrap {quantity} {item} and mail them to {name} in {city}.
Delivery on {date} to {city}: {quantity} {item}, and the recipient is {name}.
Hello there! I'd love {quantity} {item} by {date}. I'm {name} and I live in {city}.
We have sold {quantity} {item} to {name}; they should be in {city} on {date}.
{quantity} {item}, please, for {name} of {city}, and not after {date}.
The next order is for {name} in {city}, who wants {quantity} {item} on {date}.
Drive to {city} on {date} and give {name} {quantity} {item}.
Please arrange for {quantity} {item} to reach {name} in {city} on {date}.
Yesterday {name} rang to say that {quantity} {item} are needed in {city} by {date}.
To {name} in {city}: {quantity} {item}, at the latest on {date}.
Is there any chance that {name} in {city} could get {quantity} {item} by {date}?
For {name} in {city} we need {quantity} {item}, ready on {date}.
Mail {quantity} {item} to {name} at our office in {city}, to be there by {date}.
{name} would like to buy {quantity} {item} and have them in {city} by {date}.
Add {quantity} {item} to the delivery for {name} in {city} on {date}.
A quick one: {name} in {city} wants {quantity} {item} before {date}.
Your delivery for {date} is {quantity} {item}, going to {name} in {city}.
Could somebody take {quantity} {item} to {name} in {city} on {date}?
I've got {name} from {city} on the phone, asking for {quantity} {item} by {date}.
You can send the {quantity} {item} for {name} to {city} any time before {date}.
On {date} a van leaves for {city} with {quantity} {item} for {name}.
This is an order for {quantity} {item}. Send it to {name} in {city} by {date}.
"""),
    names=_commas("""
Alfred, Amina, Angela, Antonio, Bernard, Carmen, Catherine, Charles, Claudia, Cynthia, Dennis,
Dorothy, Eduardo, Eleanor, Emil, Eva, Farah, Fernando, Gerald, Greta, Heidi, Igor, Jessica,
Joaquin, Judith, Kenji, Klaus, Lydia, Malik, Marta, Maxwell, Miriam, Nigel, Norma, Olivia, Pamela,
Patrick, Rafael, Rashid, Roger, Rosalind, Sakura, Sergei, Sylvia, Timothy, Veronica, Vikram, Wendy,
Xavier, Yolanda
"""),
    cities=_commas("""
Adelaide, Antwerp, Auckland, Austin, Bergen, Bordeaux, Brighton, Bucharest, Calgary, Casablanca,
Coventry, Detroit, Dresden, Florence, Leipzig, Gothenburg, Helsinki, Karachi, Krakow, Leicester,
Los Angeles, Malaga, Marseille, Memphis, Mexico City, Moscow, Swansea, Osaka, Perth, Phoenix,
Plymouth, Porto, Quebec, Rotterdam, San Francisco, Seoul, Seville, Southampton, Turin, Valencia
"""),
    items=_commas("""
garage locks, brass hinges, bar stools, ink pens, rose bushes, beach huts, baseball caps,
silver rings, cedar planks, hair dryers, soup ladles, gas heaters, satin ribbons, camping stoves,
soap dishes, vacuum cleaners, window blinds, board games, ceramic vases, alarm bells, denim
jackets, power drills, cherry tarts, ski poles, bookcases, suitcases, binoculars, calculators,
screwdrivers, wheelbarrows, telescopes, typewriters, armchairs, hammocks, necklaces, bracelets,
sweaters, sandals, socks, trousers, potatoes, onions, peaches, bananas, pineapples, cupcakes,
pancakes, doughnuts, shovels, flutes, harps, lanterns, baskets, barrels, anchors, paddles,
stickers, crayons
"""),
)
