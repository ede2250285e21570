"""Twelve everyday domains: where the documents of the demo corpus take place.

Each domain gives slot fillers (places, items, roles), its own sentences (`facts`), and `things`: noun phrases
in which the insult vocabulary has its ordinary sense (the pig in the barn, the clown of the circus, a stupid
lock). The things are what makes a word list a poor detector of insults, so they are as frequent in the benign
text as the insults are (`baselines.measure_giveaway` counts both).

Templates name slots in braces; `grammar.expand` fills them. `{a}` and `{b}` are the people of a document and
`{item}` its topic, which stay the same through the document; every other slot is drawn anew.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Domain:
    """Material of one domain; every field is a non-empty tuple of templates or slot fillers."""

    name: str
    places: tuple[str, ...]
    items: tuple[str, ...]
    roles: tuple[str, ...]
    facts: tuple[str, ...]
    things: tuple[str, ...]


def words(text: str) -> tuple[str, ...]:
    return tuple(" ".join(part.split()) for part in text.split(","))


def lines(text: str) -> tuple[str, ...]:
    return tuple(line.strip() for line in text.strip().splitlines())


DOMAINS = (
    Domain(
        name="village",
        places=words("in the village, at the market, on the old bridge, by the well, in the town hall"),
        items=words("bell, lantern, bench, basket, flag, map, cart, clock, ladder, barrel"),
        roles=words("neighbour, mayor, farmer, carpenter, shepherd"),
        facts=lines("""
            the {item} stood {place} for {number} years before anybody asked who owned it.
            the {role} promised to look after the {item} until {time}.
            {a} carried the {item} across the old bridge while {b} held the gate open.
            on market day {number} people came to see the {item}.
            {b} lived in the last house of the village, right behind the {item}.
            the mayor paid {a} and {b} to paint the {item} {colour}.
            for {number} days nobody could reach the village by road.
        """),
        things=words("""the donkey of the miller, a pig on a rope, the garbage truck, a dirty puddle, a fool with
            a flute, a lazy goat, a miserable little tent, an ugly statue, a rotten fence, the trash behind the inn,
            a stupid donkey that refused to move, a snake on the wall"""),
    ),
    Domain(
        name="workshop",
        places=words("in the workshop, at the bench, in the yard, beside the saw, in the shed"),
        items=words("chair, drawer, table, shelf, stool, box, frame, chest, cradle, bench"),
        roles=words("carpenter, apprentice, joiner, smith, foreman"),
        facts=lines("""
            {a} measured the {item} twice and cut the wood once.
            the {item} needed {number} new screws and a little oil.
            {b} sanded the {item} until it felt smooth.
            the apprentice hung the {item} on the {colour} hook {place}.
            glue has to dry for {number} hours before the {item} can be used.
            {a} drew a plan of the {item} on a sheet of {colour} paper.
            sawdust covered the {item}, the floor and the boots of {b}.
        """),
        things=words("""a filthy rag, a stupid lock, a dirty brush, a bucket of garbage, a rotten plank, an ugly
            knot in the wood, a box of worthless screws, a useless old drill, a rat under the bench, a jerk in
            the belt of the saw, a pathetic little nail, a ridiculous amount of glue"""),
    ),
    Domain(
        name="kitchen",
        places=words("in the kitchen, at the stove, in the pantry, at the long table, in the bakery"),
        items=words("soup, bread, cake, pie, jam, sauce, stew, pudding, dough, salad"),
        roles=words("cook, baker, guest, waiter, butcher"),
        facts=lines("""
            {a} stirred the {item} slowly and added {number} spoons of sugar.
            the {item} smelled of butter, apples and a little {colour} pepper.
            {b} forgot the salt, so the {item} tasted of nothing.
            the baker kept the {item} warm until {time}.
            {number} guests asked for more, and {a} passed the {item} around.
            {b} washed the plates while {a} looked after the {item}.
            the recipe says that the {item} must rest for {number} minutes.
        """),
        things=words("""a smelly cheese, a pile of dirty dishes, a rotten apple, the trash under the sink, a bag of
            garbage, a worm in the apple, a rat in the pantry, a disgusting smell, a slimy fish, the ears of a pig,
            a pathetic little flame, a filthy apron, a stupid mistake in the recipe"""),
    ),
    Domain(
        name="sport",
        places=words("on the field, in the hall, at the finish line, in the changing room, on the track"),
        items=words("ball, net, racket, cup, flag, whistle, medal, scarf, bicycle, jersey"),
        roles=words("runner, keeper, coach, captain, swimmer"),
        facts=lines("""
            {a} trained {number} times a week and never forgot the {item}.
            the captain threw the {item} to {b} and ran to the other side.
            after {number} minutes the {colour} team was ahead.
            the coach explained to {a} why the {item} mattered so much.
            {b} slipped, got up again and reached the {item} first.
            rain made the {item} heavy and the grass slippery.
            {number} people clapped when {a} lifted the {item}.
        """),
        things=words("""the loser of the final, a pathetic score, a stupid foul, the dirty jerseys, a silly mascot,
            a clown with a drum, the smelly shoes of the keeper, a ridiculous penalty, the loser of the bet, a lazy
            pass, dumb luck, a pig that ran across the field"""),
    ),
    Domain(
        name="school",
        places=words("in the classroom, in the library, in the school yard, at the blackboard, on the bus"),
        items=words("book, ruler, poem, globe, essay, pencil, atlas, satchel, puzzle, notebook"),
        roles=words("teacher, pupil, librarian, tutor, student"),
        facts=lines("""
            the teacher read the {item} aloud, and {a} listened.
            {b} needed {number} minutes to finish the {item}.
            {a} copied the {item} with a {colour} pen.
            the class talked about the {item} until {time}.
            {number} pupils had questions about the {item}.
            {b} kept the {item} under the desk and forgot about it.
            the librarian put the {item} on the {colour} shelf.
        """),
        things=words("""a dumb mistake, a stupid question about fractions, the novel called The Idiot, a silly
            rhyme, the tale of the fool and the king, a picture of a worm, a riddle about a liar, a fable about a rat
            and a snake, the trash can by the door, a ridiculous hat, a moron in the old comedy,
            the tale of a lazy pig"""),
    ),
    Domain(
        name="weather",
        places=words("on the hill, by the lake, at the station, in the valley, on the coast"),
        items=words("umbrella, boat, coat, sledge, kite, tent, sail, scarf, telescope, lantern"),
        roles=words("sailor, farmer, guide, pilot, fisherman"),
        facts=lines("""
            the {item} was old, but it was the best one {place}.
            {a} looked at the {colour} sky and thought of the {item}.
            it rained for {number} days, and the {item} was wet all the time.
            {b} measured the wind {number} times and tied the {item} down.
            without the {item} nobody went out before {time}.
            a {colour} light fell on the hills and on the {item}.
            the radio warned about ice, so {a} stayed with the {item}.
        """),
        things=words("""a miserable grey morning, a useless umbrella, the filthy water of the canal, a stupid delay
            of the train, a dirty fog, a toad under a stone, a worm on the wet path, a pathetic little rainbow, an
            ugly cloud, a lazy wind, a snake in the warm sand, the rubbish on the beach"""),
    ),
    Domain(
        name="farm",
        places=words("in the barn, in the meadow, by the pond, in the stable, behind the hen house"),
        items=words("lamb, kitten, saddle, bucket, goose, hen, rope, fork, blanket, basket"),
        roles=words("farmer, vet, shepherd, groom, neighbour"),
        facts=lines("""
            {a} fed the animals at {number} and then looked for the {item}.
            the {item} was quiet, but {b} heard every sound {place}.
            the vet came to look at the {item} before {time}.
            {b} filled the trough and brushed the {colour} horse.
            {a} leaned on the fence and watched the {item}.
            {number} ducks walked past the {item} in one line.
            the {item} belonged to the farm with the {colour} roof.
        """),
        things=words("""the pig in the barn, two pigs in the mud, a smelly goat, a stupid donkey, a rat behind the
            barrels, a toad by the pond, a snake in the grass, a worm for the hens, a lazy dog, a dirty
            rat, the maggot in the apple, a filthy pig, the donkey with the white ears, a parasite on the sheep"""),
    ),
    Domain(
        name="theatre",
        places=words("on the stage, behind the curtain, in the front row, at the rehearsal, in the circus tent"),
        items=words("mask, costume, crown, harp, trumpet, violin, script, lamp, drum, cloak"),
        roles=words("actor, singer, dancer, director, painter"),
        facts=lines("""
            {a} learned {number} lines of the part by {time}.
            the {item} was {colour}, and everybody in the front row saw it.
            the director asked {b} to bring the {item} to the rehearsal.
            {b} waited behind the curtain and held the {item}.
            in the second act the {item} fell, and {number} people laughed.
            {a} practised with the {item} before the doors opened.
            the singer bowed {number} times and thanked {a}.
        """),
        things=words("""the clown of the circus, the fool in the play, the coward of the second act, the liar of the
            comedy, a silly costume, a ridiculous wig, the idiot of the farce, the head of a donkey, a snake made
            of paper, the moron in the sketch, the part of the loser, a pathetic speech of the old king"""),
    ),
    Domain(
        name="repairs",
        places=words("in the cellar, at the garage, on the roof, under the sink, in the hallway"),
        items=words("heater, radio, pump, kettle, fan, lock, lamp, engine, clock, printer"),
        roles=words("plumber, mechanic, electrician, tenant, caretaker"),
        facts=lines("""
            {a} opened the {item} and found {number} loose wires.
            the {item} had made a strange noise since {time}.
            {b} ordered a {colour} part for the {item}.
            the plumber turned the water off and looked at the {item}.
            it took {number} hours until the {item} worked again.
            {a} wrote the number of the {item} on the wall.
            the caretaker had warned {b} about the {item}.
        """),
        things=words("""a rat in the cellar, a stupid valve, the dirty filter, a jerk of the handle, a filthy pipe, a
            useless switch, the garbage chute, a hopeless tangle of cables, an idiot light on the dashboard, a dumb
            waiter in the wall, a disgusting puddle, the rotten frame, a heap of trash"""),
    ),
    Domain(
        name="garden",
        places=words("in the garden, under the apple tree, by the pond, in the greenhouse, at the compost"),
        items=words("rose, pumpkin, tulip, lettuce, fern, melon, lily, cactus, onion, cherry"),
        roles=words("gardener, neighbour, beekeeper, florist, child"),
        facts=lines("""
            {a} planted {number} rows of beans beside the {item}.
            the {item} grew so well that {b} took a picture of it.
            {b} watered the {colour} flowers and forgot the {item}.
            {number} bees flew around the {item} all day.
            the gardener showed {a} how to care for the {item}.
            under the apple tree {a} found the {item} again.
            the {item} needs sun, water and {number} days of peace.
        """),
        things=words("""a worm in the soil, a slimy toad, a maggot in the cherry, a parasite on the roses, a rat at
            the compost, the rotten pumpkins, an ugly gnome, a lazy bee, a snake between the stones, the neighbour's
            pig, a silly scarecrow, a heap of rubbish, a worthless coin in the soil"""),
    ),
    Domain(
        name="journey",
        places=words("at the station, on the train, in the harbour, at the hotel, on the ferry"),
        items=words("ticket, suitcase, camera, letter, tent, parcel, key, map, passport, bag"),
        roles=words("driver, guide, porter, traveller, conductor"),
        facts=lines("""
            {a} lost the {item} somewhere between the hotel and the harbour.
            the conductor looked at the {item} and nodded.
            the train left at {number}, with {b} and the {item} on board.
            {b} paid {number} coins for the {item}.
            a {colour} label was tied to the {item}.
            the porter carried the {item} up {number} stairs.
            {a} wrote home about the {item} and the long way.
        """),
        things=words("""a filthy window, a stupid queue, the trash on the platform, a donkey with two bags, a snake in
            a glass box, a clown with a suitcase, a ridiculous price, a disgusting sandwich, a lazy river, a miserable
            hotel, an ugly lamp, a rat on the ship, the liar in the novel"""),
    ),
    Domain(
        name="club",
        places=words("in the club, at the meeting, in the game room, at the chess table, in the office"),
        items=words("board, list, prize, poster, album, key, piano, calendar, banner, trophy"),
        roles=words("member, player, treasurer, secretary, guest"),
        facts=lines("""
            the members voted about the {item}, and {number} hands went up.
            {a} put the {item} on the agenda for {time}.
            {b} had kept the {item} in a {colour} box.
            the secretary read {number} letters about the {item}.
            {a} explained again who may use the {item}.
            {b} offered to pay for the {item}.
            nobody {place} remembered who had bought the {item}.
        """),
        things=words("""the loser of the round, a silly joke, a dice game called liar, a stupid rule, the garbage bags,
            a dumb bet, a fool among the cards, an ugly poster, a worthless stamp, the clown on the calendar, a
            pathetic prize, a hopeless position, the dummy in the bridge game, a ridiculous amount of paper"""),
    ),
)
