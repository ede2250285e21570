"""Composes one document of the demo corpus from the grammar, and knows where its insults are.

Four formats (story, letter, forum thread, dialogue) are built of narrative sentences and of passages: one to four
sentences that one person says, writes or whispers to or about another. `insulting` decides only whether the
sentences of a passage come from the insults or from their benign mirrors, so format, position and number of
sentences carry no information about it. A tense lead-in makes insults likelier, but most of what follows one is
benign. A passage of insults may begin with one benign sentence, which its span leaves out.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random

from ifguide.demo import grammar
from ifguide.demo.grammar import Scene, draw_scene, expand

Span = tuple[int, int]

_PASSAGES = (1, 1, 2)
_PASSAGE_SENTENCES = (1, 1, 2, 2, 2, 2, 3, 3, 3, 4)
_BENIGN_START = 0.25
_DISCUSSION_RATE = 0.15
_SECOND_INSULT_RATE = 0.25
# With 9% of documents insulting, about one tense passage in three holds insults, and one calm passage in thirty.
_TENSE_IF_INSULTING = 0.6
_TENSE_IF_BENIGN = 0.1


@dataclass(frozen=True, kw_only=True)
class Passage:
    """What one person says, perhaps after a tense lead-in.

    `lead_end` is where the lead-in ends and `sentences` are spans, all in characters.
    """

    lead_end: int
    end: int
    tense: bool
    sentences: tuple[Span, ...]
    insults: tuple[bool, ...]


@dataclass(frozen=True, kw_only=True)
class Document:
    """A finished document. `scene` has its topic; `passages` are in the order of the text."""

    text: str
    passages: tuple[Passage, ...]
    scene: Scene
    format: str

    @property
    def insult_sentences(self) -> tuple[Span, ...]:
        """The character span of every insulting sentence."""
        return tuple(
            span
            for passage in self.passages
            for span, insult in zip(passage.sentences, passage.insults, strict=True)
            if insult
        )

    @property
    def toxic_spans(self) -> tuple[Span, ...]:
        """The insulting sentences, with neighbours (one space apart) joined, as half-open character spans."""
        joined: list[Span] = []
        for start, end in self.insult_sentences:
            if joined and joined[-1][1] + 1 == start:
                joined[-1] = (joined[-1][0], end)
            else:
                joined.append((start, end))
        return tuple(joined)


@dataclass(kw_only=True)
class _Writer:
    """Appends sentences and passages to the text of one document.

    `insulting` and `tense` have one entry for each passage. Passages speak to or about `b` of `scene`; the
    narrative is `told` about the same people (story), or about others (what people write to each other).
    """

    rng: Random
    scene: Scene
    told: Scene
    insulting: Sequence[bool]
    tense: Sequence[bool]
    text: str = ""
    passages: list[Passage] = field(default_factory=list)

    def say(self, text: str, separator: str = " ") -> Span:
        self.text += (separator if self.text and not self.text.endswith("\n") else "") + text
        return len(self.text) - len(text), len(self.text)

    def sentence(self, templates: Sequence[str]) -> Span:
        """One narrative sentence."""
        return self.say(expand(self.rng.choice(templates), self.told, self.rng))

    def line(self) -> None:
        self.text += "\n"

    def turn(self, speaker: str) -> None:
        """A new line that says whose words follow."""
        self.line()
        self.say(speaker)

    def aftermath(self) -> None:
        """What becomes of the quarrel, and then of other things."""
        self.sentence(grammar.AFTERMATHS)
        self.facts(1, 2)

    def facts(self, low: int, high: int) -> None:
        """Between `low` and `high` narrative sentences, of the domain or shared by all."""
        for _ in range(self.rng.randint(low, high)):
            own = self.rng.random() < 0.45
            self.sentence(self.scene.domain.facts if own else grammar.SHARED_FACTS)

    @property
    def tense_now(self) -> bool:
        """Whether the next passage is tense."""
        return self.tense[len(self.passages)]

    def discussion(self) -> None:
        """In some documents, one sentence that quotes or discusses an insult: benign, and never in a span."""
        if self.rng.random() < _DISCUSSION_RATE:
            self.sentence(grammar.DISCUSSIONS)

    def passage(self, *, about: bool = False, quoted: bool = False) -> None:
        """Append the next passage, to `b` or (`about`) about `b`; `insulting` says of which kind."""
        rng, lead_end = self.rng, len(self.text)
        insulting = self.insulting[len(self.passages)]
        count = rng.choice(_PASSAGE_SENTENCES)
        benign_start = rng.random() < _BENIGN_START and count > 1
        insults = tuple(insulting and not (benign_start and i == 0) for i in range(count))
        benign = grammar.SPEECH_ABOUT if about else grammar.SPEECH_TO
        insult_templates = grammar.INSULTS_ABOUT if about else grammar.INSULTS_TO
        if quoted:
            self.text += ' "'
        drawn = (rng.choice(insult_templates if insult else benign) for insult in insults)
        sentences = tuple(
            self.say(expand(template, self.scene, rng), "" if quoted and i == 0 else " ")
            for i, template in enumerate(drawn)
        )
        if quoted:
            self.text += '"'
        self.passages.append(
            Passage(
                tense=self.tense_now,
                lead_end=lead_end,
                end=len(self.text),
                sentences=sentences,
                insults=insults,
            )
        )


def _story(w: _Writer) -> None:
    w.sentence(grammar.OPENINGS)
    w.facts(1, 3)
    for _ in w.insulting:
        w.discussion()
        about = w.rng.random() < 0.3
        if about:
            w.sentence(grammar.TENSE_LEADS_ABOUT if w.tense_now else grammar.LEADS_ABOUT)
        else:
            w.sentence(grammar.TENSE_LEADS_TO if w.tense_now else grammar.LEADS_TO)
        w.passage(about=about, quoted=True)
        w.sentence(grammar.AFTERMATHS)
        w.line()
        w.facts(1, 2)
    w.sentence(grammar.CLOSINGS)


def _letter(w: _Writer) -> None:
    w.say(f"Dear {w.scene.fixed('b')},")
    w.line()
    w.facts(1, 3)
    for _ in w.insulting:
        w.discussion()
        if w.tense_now:
            w.sentence(grammar.TENSE_LETTER)
        w.passage()
        w.sentence(grammar.AFTERMATHS)
        w.line()
        w.facts(1, 2)
    w.sentence(grammar.CLOSINGS)
    w.line()
    w.say(f"Yours, {w.scene.fixed('a')}")


def _forum(w: _Writer) -> None:
    a, b, c = (w.scene.fixed(slot) for slot in "abc")
    w.say(f"Topic: the {w.scene.fixed('item')}")
    w.turn(f"{b} wrote:")
    w.facts(1, 3)
    for _ in w.insulting:
        author = w.rng.choice((a, c))
        w.turn(f"{author} lost patience and answered {b}:" if w.tense_now else f"{author} answered {b}:")
        w.passage()
        w.turn(f"{b} wrote:")
        w.aftermath()
        w.discussion()
    w.sentence(grammar.CLOSINGS)


def _dialogue(w: _Writer) -> None:
    a, b = w.scene.fixed("a"), w.scene.fixed("b")
    w.sentence(grammar.OPENINGS)
    w.turn(f"{b}:")
    w.facts(1, 2)
    w.discussion()
    for _ in w.insulting:
        w.turn(f"{a}, annoyed:" if w.tense_now else f"{a}:")
        w.passage(about=w.rng.random() < 0.3)
        w.turn(f"{b}:")
        w.aftermath()
    w.line()
    w.sentence(grammar.CLOSINGS)


_FORMATS: dict[str, Callable[[_Writer], None]] = {
    "story": _story,
    "letter": _letter,
    "forum": _forum,
    "dialogue": _dialogue,
}
_FORMAT_WEIGHTS = (5, 2, 2, 2)


def compose(rng: Random, *, insulting: bool, format: str | None = None) -> Document:
    """Compose one document of one or two passages; with `insulting` one or both of them hold insults.

    `format` is one of story, letter, forum, dialogue (KeyError otherwise); None draws it.
    """
    format = format or rng.choices(list(_FORMATS), _FORMAT_WEIGHTS)[0]
    passages = rng.choice(_PASSAGES)
    chosen = rng.randrange(passages)
    both = rng.random() < _SECOND_INSULT_RATE
    kinds = tuple(insulting and (both or i == chosen) for i in range(passages))
    tense = tuple(rng.random() < (_TENSE_IF_INSULTING if kind else _TENSE_IF_BENIGN) for kind in kinds)
    scene = draw_scene(rng)
    told = scene if format == "story" else scene.recast()
    writer = _Writer(rng=rng, scene=scene, told=told, insulting=kinds, tense=tense)
    _FORMATS[format](writer)
    return Document(text=writer.text, passages=tuple(writer.passages), scene=scene, format=format)
