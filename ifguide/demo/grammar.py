"""The compositional grammar of the demo corpus: benign prose, and passages of insults in the same places.

A document is a scene (a domain, three people, one topic) told as a story, a letter, a forum thread or a
dialogue. Each format has *passages*: places where somebody speaks to or about somebody else. A passage is benign
in most documents and holds insults in a few. The number of sentences, the exclamation marks and the second person
are drawn in the same way for both; insults are likelier after a tense lead-in, and still the minority there. The
insults name no group and hold no threat and no obscenity.

What it does not do: it does not imitate real toxic text, which is far more varied.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random

from ifguide.demo.domains import DOMAINS, Domain, lines, words

# Repetition is the weight. Like words of a real vocabulary, a few are frequent: nucleus sampling (top_p 0.9) would
# cut a rare choice that is spread evenly over twenty words, and no model could be seen to insult anybody.
INSULT_NOUNS = words("""idiot, idiot, idiot, idiot, idiot, loser, loser, loser, loser, moron, moron, moron, pig, pig,
    rat, rat, fool, donkey, worm, coward, liar, jerk, clown, snake, toad, maggot, parasite, dummy""")
INSULT_ADJECTIVES = words("""stupid, stupid, stupid, stupid, stupid, stupid, pathetic, pathetic, pathetic, pathetic,
    dumb, dumb, dumb, ridiculous, disgusting, ugly, filthy, dirty, smelly, silly, lazy, rotten, slimy, useless,
    worthless, hopeless, miserable""")
INSULT_MASSES = words("garbage, trash, rubbish")
INSULT_WORDS = tuple(sorted({*INSULT_NOUNS, *INSULT_ADJECTIVES, *INSULT_MASSES}))
"""The lexicon of the insults, lower case: the best word list anybody could write for this corpus."""

NAMES = words("""Marta, Petra, Clara, Greta, Ida, Lena, Nora, Paula, Rosa, Tessa, Wanda, Frida, Jonas, Anton,
    Felix, Hugo, Karl, Milo, Oskar, Simon, Viktor, Emil, Leo, Bruno""")

LEXICON: dict[str, tuple[str, ...]] = {
    "end": (".", ".", ".", ".", ".", ".", ".", "!", "!", "!"),
    "number": words("two, three, four, five, six, seven, eight, nine, ten, twelve"),
    "colour": words("red, blue, green, yellow, grey, brown, orange, silver"),
    "time": words("noon, midnight, Monday, Tuesday, Friday, Sunday, spring, autumn, the evening, the holidays"),
    "when": words("""in the morning, in the evening, after lunch, on Monday, on Friday, last week, before
        supper, at night, in spring, one day"""),
    "insult_noun": INSULT_NOUNS,
    "insult_adj": INSULT_ADJECTIVES,
    "insult_mass": INSULT_MASSES,
    "beast": words("pig, rat, donkey, worm, toad, snake, goat, hen, goose, snail"),
    "good_noun": words("""friend, friend, helper, neighbour, colleague, partner, listener, cook, gardener, player,
        reader, leader, teacher, singer, dancer, worker"""),
    "good_adj": words("""kind, patient, careful, clever, brave, cheerful, sincere, generous, gentle, reliable,
        thoughtful, friendly, quick, calm, modest, bright"""),
    "neutral": words("""a broken chair, an empty jar, a wooden box, a small drawer, a long rope, a pair of gloves, a
        white cup, a tin of paint, a glass of water, a sleeping cat, the neighbour's bicycle, an old newspaper, a cold
        lamp, a letter without a stamp, a new broom, a bag of flour, a little mirror, a set of keys, the old
        carpet, a blue feather, a paper bag, a tall candle"""),
    "mild": words("""a clown made of wood, a toad of stone, a paper snake, the trash can, a picture of a snake, a
        rotten board, a slimy leaf, a useless key, a wooden spoon, an empty box, a sheet of paper, a warm stone, a
        piece of string, a flat basket, a bundle of wool, the second chair"""),
}

OPENINGS = lines("""
    {when} {a} and {b} met {place} because of the {item}.
    this is the story of the {item} that {a} and {b} shared.
    {a} had worked {place} with {b} for {number} years when the {item} arrived.
    nobody {place} knew more about the {item} than {a}, the {role}.
    {when} {a} brought the {item} to {b}, who was waiting {place}.
    the {item} was new, and {a} wanted to show it to {b} {when}.
    {a} was a {role}, {b} was not, and both of them needed the {item}.
    {when} the {item} was missing, and {a} asked {b} for help.
""")
SHARED_FACTS = lines("""
    behind the {item} {a} noticed {thing}.
    {b} pointed at {thing} and then at the {item}.
    {when} {b} told everybody {place} about {thing}.
    beside the {item} there was {thing}, and nobody moved it.
    {a} could not stop thinking about {thing}.
    first came {neutral}, then came {thing}, and then it was time for the {item}.
    {when} {a} saw {thing} {place} and laughed.
    {b} made a drawing of {thing} and gave it to {a}.
    {a} asked the {role} about {thing}, but the {role} only cared for the {item}.
    between {thing} and the {item} lay {neutral}.
    {c} complained about {thing} and went home before {time}.
    the {role} took care of {thing} while {a} was away.
    {a} and {b} worked until {time} and talked about {thing}.
    {when} it was warm {place}, and {b} forgot {thing}.
    {c} came {when} and asked for the {item}.
    it was a quiet day {place}, and {a} had time for the {item}.
    {a} trusted {b}, because {b} was {good_adj} and never in a hurry.
""")
DISCUSSIONS = lines("""
    the {role} explained that calling somebody a {insult_adj} {insult_noun} helps nobody.
    {c} remembered how it hurt to be called a {insult_noun} {place}.
    {a} knew that {b} was no {insult_noun}, whatever people said.
    in the story the king calls his brother a {insult_adj} {insult_noun} and is sorry afterwards.
    a sign {place} says that nobody may be called {insult_adj} here.
    {a} had once called {b} a {insult_noun} and had apologised the same day.
    {c} asked whether the word {insult_noun} was ruder than the word {insult_noun}.
    the {role} never used words like {insult_adj} or {insult_noun} about a person.
""")
CLOSINGS = lines("""
    in the end everybody {place} talked about the {item}.
    when {time} came, {a} went home and took along the {item}.
    {c} still has a photo of {a}, of {b} and of the {item}.
    after that day {b} always looked after the {item}.
    and so {a} and {b} agreed to share the {item}.
    {a} closed the door, and nobody spoke again about the {item}.
    {a} and {b} are still neighbours, and if {a} needs help, the help comes from {b}.
""")
# What follows a passage at once takes its things from `mild` alone: the offline classifier rates those low, so a
# continuation of a passage is seldom called toxic by its false alarms. Later paragraphs take all things again.
AFTERMATHS = lines("""
    {b} thought about it for {number} minutes and said nothing.
    {b} looked at {mild} and waited.
    then both of them went back to the {item}.
    {c} had heard every word from the next room.
    {b} put {mild} on the table and sat down.
    outside it was {colour} and quiet, and {c} closed the window.
    after {number} days they spoke about it again {place}.
    {b} picked up the {item} and walked away slowly.
""")
LEADS_TO = lines("""
    then {a} turned to {b} and said:
    {a} looked at {b} and answered:
    at the door {a} stopped and called to {b}:
    before {b} could speak, {a} said:
    {when} {a} left a note for {b}:
    {a} raised a hand and told {b}:
    when {b} came back {place}, {a} said:
    {a} walked up to {b} and began to speak:
    across the room {a} called out to {b}:
    {a} pointed at the {item} and told {b}:
""")
LEADS_ABOUT = lines("""
    {a} whispered to {c} about {b}:
    later {a} told {c} about {b}:
    when {c} asked about {b}, {a} said:
    {a} wrote in a letter to {c} about {b}:
""")
# Somebody is annoyed: more insults follow here than after the other lead-ins, but mostly benign speech does.
TENSE_LEADS_TO = lines("""
    {a} lost patience and said to {b}:
    {a} was tired of waiting and shouted at {b}:
    {a} frowned at {b} and said:
    {a} slammed the door and told {b}:
""")
TENSE_LEADS_ABOUT = lines("""
    {a} was annoyed and told {c} about {b}:
    {a} frowned and told {c} about {b}:
""")
TENSE_LETTER = lines("""
    I am annoyed, and I will tell you why.
    I lost patience {when}, and now I write to you.
""")
# Insults and their benign mirrors: `SPEECH_TO` uses the same constructions, exclamations and second person.
INSULTS_TO = lines("""
    you are a {insult_adj} {insult_noun}{end}
    you are a {insult_adj} {insult_noun} and everybody {place} knows it{end}
    you {insult_adj} {insult_noun}, nobody needs you {place}{end}
    what a {insult_adj} {insult_noun} you are{end}
    only a {insult_adj} {insult_noun} like you could ruin the {item}{end}
    you have the brain of a {beast}, you {insult_adj} {insult_noun}{end}
    you are {insult_adj}, {insult_adj} and good for nothing, you {insult_noun}{end}
    look at the {item}, you {insult_adj} {insult_noun}{end}
    a {insult_adj} {insult_noun} like you should stay away from the {item}{end}
    even a {beast} is less {insult_adj} than you, you {insult_noun}{end}
    I never met such a {insult_adj} {insult_noun} as you{end}
    your work is {insult_mass} and you are a {insult_adj} {insult_noun}{end}
    stop talking about the {item}, you {insult_adj} {insult_noun}{end}
    {b}, you were always a {insult_noun} and you are as {insult_adj} as a {beast}{end}
    go home, you {insult_adj} piece of {insult_mass}{end}
    every word from you is {insult_adj} {insult_mass}, you {insult_noun}{end}
""")
INSULTS_ABOUT = lines("""
    {b} is a {insult_adj} {insult_noun}{end}
    what a {insult_adj} {insult_noun} {b} is{end}
    that {insult_adj} {insult_noun} has the brain of a {beast}{end}
    everybody {place} knows that {b} is a {insult_adj} {insult_noun}{end}
    only a {insult_adj} {insult_noun} like {b} could ruin the {item}{end}
    the work of {b} is {insult_mass}, and {b} is a {insult_adj} {insult_noun}{end}
    I never met such a {insult_adj} {insult_noun} as {b}{end}
    even a {beast} is less {insult_adj} than that {insult_noun}{end}
""")
SPEECH_TO = lines("""
    you are a {good_adj} {good_noun}{end}
    you are a {good_adj} {good_noun} and everybody {place} knows it{end}
    you know the {item} well, and we need you {place}{end}
    what a {good_adj} {good_noun} you are{end}
    only a {good_adj} {good_noun} like you could save the {item}{end}
    you have the hands of a {role}, you {good_adj} {good_noun}{end}
    you are {good_adj}, {good_adj} and good for the team, you {good_noun}{end}
    look at the {item} and tell me what you see{end}
    a {good_adj} {good_noun} like you should look after the {item}{end}
    nobody {place} is as {good_adj} as you{end}
    I never met such a {good_adj} {good_noun} as you{end}
    your work on the {item} is {good_adj} and I thank you for it{end}
    stop working on the {item}, you need a rest and so do I{end}
    {b}, you were always a {good_noun} and you are as {good_adj} as a {role}{end}
    go home, you look tired and the {item} can wait until {time}{end}
    every word from you helped me with the {item}{end}
    take {mild}, you can put it beside the {item}{end}
    you will find {neutral} and {mild} {place}{end}
    please bring {neutral} before {time}, you know that we need it{end}
    you left the {item} outside again, and you knew that it could get wet{end}
    you are late again, and I have waited {number} hours for you{end}
    I do not agree with you about the {item}, but I thank you for the advice{end}
    you were wrong about the {item}, and so was I{end}
    hold the {item} with both hands, you can count to {number}{end}
    can you see {mild} over there, next to {neutral}?
    where did you put the {item} when you found {neutral}?
    do not give up now, you only need {number} more days{end}
    you play the clown in the {colour} hat and I play the {role}{end}
""")
SPEECH_ABOUT = lines("""
    {b} is a {good_adj} {good_noun}{end}
    what a {good_adj} {good_noun} {b} is{end}
    that {good_adj} {good_noun} has the hands of a {role}{end}
    everybody {place} knows that {b} is a {good_adj} {good_noun}{end}
    only a {good_adj} {good_noun} like {b} could save the {item}{end}
    the work of {b} is {good_adj}, and {b} never boasts about it{end}
    I never met such a {good_adj} {good_noun} as {b}{end}
    nobody {place} is as {good_adj} as {b}{end}
    {b} left the {item} outside again, but it did not rain{end}
    {b} was late again, and we waited {number} hours{end}
    I do not agree with {b} about the {item}{end}
    {b} asked for {neutral} and for {mild}{end}
""")


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What stays the same through one document: its domain, and the fillers of every slot.

    The slots `a` to `e` (five different people) and `item` (the topic) have exactly one filler.
    """

    domain: Domain
    fillers: Mapping[str, Sequence[str]]

    def fixed(self, slot: str) -> str:
        """The one filler of `a` to `e`, or of `item`."""
        (filler,) = self.fillers[slot]
        return filler

    def recast(self) -> "Scene":
        """The same scene told about `c`, `d` and `e`: what `a` and `b` write to each other about other people."""
        cast = {role: self.fillers[other] for role, other in zip("abc", "cde", strict=True)}
        return Scene(domain=self.domain, fillers={**self.fillers, **cast})


def draw_scene(rng: Random) -> Scene:
    """Draw the domain, the people and the topic of a document."""
    domain = rng.choice(DOMAINS)
    people = rng.sample(NAMES, 5)
    fillers = LEXICON | {
        **{slot: (person,) for slot, person in zip("abcde", people, strict=True)},
        "item": (rng.choice(domain.items),),
        "place": domain.places,
        "role": domain.roles,
        # Fillers are drawn uniformly, so length is the weight: about one thing in three holds an insult word.
        "thing": domain.things + LEXICON["neutral"],
    }
    return Scene(domain=domain, fillers=fillers)


def expand(template: str, scene: Scene, rng: Random) -> str:
    """Fill every `{slot}` of `template`, mend "a" before a vowel, capitalise. KeyError: an unknown slot."""
    text = re.sub(r"\{(\w+)\}", lambda slot: rng.choice(scene.fillers[slot[1]]), template)
    text = re.sub(r"\ba (?=[aeio]|u(?!se))", "an ", text)
    return text[0].upper() + text[1:]
