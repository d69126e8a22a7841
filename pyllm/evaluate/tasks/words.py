"""Words that tasks are made of. Within a kind, and between people's names and facts, none is part of
another, so that none is found in another's place."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator


def _listed(text: str) -> tuple[str, ...]:
    return tuple(text.split())


ADJECTIVES = _listed(
    "amber ancient brisk broken calm clever crimson crooked curious distant dusty eager empty faded "
    "gentle golden hidden hollow humble icy ivory jolly lonely loud lucky mellow mighty modest narrow "
    "noble pale patient polite proud quiet rapid rusty scarlet secret silent silver simple slender smooth "
    "solemn spare steady stormy sturdy sudden swift tender tidy tiny velvet vivid wandering warm weary "
    "wild"
)
NOUNS = _listed(
    "anchor anvil apron basket bell blanket bottle bridge bucket button candle canvas carpet chimney "
    "cottage cradle curtain drawer engine feather fiddle garden glacier hammer harbour helmet hinge "
    "island jacket kettle ladder lantern lemon magnet marble meadow mirror mountain needle orchard oven "
    "paddle pebble pillow pocket pumpkin ribbon saddle sparrow spoon tailor teapot thimble trumpet tunnel "
    "umbrella valley violin waggon walnut whistle willow window"
)
FIRST_NAMES = _listed(
    "Ada Agnes Alma Anton Astrid Bela Boris Bruno Carla Cecil Clara Conrad Dagmar Dora Edgar Edith Elias "
    "Elsa Emil Esther Felix Flora Frida Georg Gilda Greta Hanna Hector Hilda Hugo Ida Igor Irma Ivan "
    "Jonas Judith Karl Katja Lars Lena Leon Linus Lydia Magda Marta Max Mila Nadia Nils Nora Olga Oscar "
    "Otto Paula Petra Ralph Rosa Rufus Ruth Selma Simon Stella Tessa Theo Thora Ulla Viktor Vera Walter "
    "Wanda Xaver Yvonne Zora"
)
SURNAMES = _listed(
    "Abelard Ackroyd Almgren Bannister Barlow Beckett Bergman Birch Brandt Calder Carver Colby Dahlgren "
    "Dalton Drummond Eastman Ekberg Falk Farrow Fielding Fisker Galloway Garner Grieve Halloran Hartwell "
    "Hedlund Holm Ingram Jansson Jessop Keller Kessler Kirkby Lachance Langley Lindqvist Lockwood Marlow "
    "Mercer Moberg Nash Nordin Norwood Oakes Ostrow Palmgren Pemberton Prentice Quist Radcliffe Rasmussen "
    "Rowntree Sandoval Sawyer Sinclair Stroud Tennant Thorne Trask Ullman Vance Varga Wainwright Wexler "
    "Whitlock Yates"
)
TOWN_HEADS = _listed(
    "Alder Amber Bram Brook Clover Cray Elm Fern Glen Hart Hazel Kings Lark Maple Marsh Otter Raven Stone "
    "Thorn Wester"
)
TOWN_TAILS = _listed("bridge bury croft dale ferry gate haven mouth stead wick")
TOWNS = tuple(map("".join, itertools.product(TOWN_HEADS, TOWN_TAILS)))
TRADES = _listed(
    "baker barber beekeeper blacksmith bookbinder brewer butcher candlemaker carpenter clockmaker cobbler "
    "cooper dyer farrier gardener glassblower goldsmith hatter jeweller locksmith mason miller "
    "plasterer plumber potter printer roofer saddler sailmaker shipwright tanner tinsmith thatcher "
    "weaver wheelwright"
)
INSTRUMENTS = _listed(
    "accordion banjo bassoon bugle cello clarinet cornet dulcimer fiddle flute guitar harmonica harp lyre "
    "mandolin oboe organ piano piccolo saxophone sitar tambourine triangle trombone trumpet tuba ukulele "
    "viola xylophone zither"
)
CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"


def keys(rng: random.Random, n: int) -> tuple[str, ...]:
    """n keys of an adjective and a noun, all of them different words."""
    pairs = zip(rng.sample(ADJECTIVES, n), rng.sample(NOUNS, n), strict=True)
    return tuple(f"{adjective}-{noun}" for adjective, noun in pairs)


def names(rng: random.Random) -> Iterator[str]:
    """Of people, without end, no two the same."""
    seen: set[str] = set()
    while True:
        name = f"{rng.choice(FIRST_NAMES)} {rng.choice(CONSONANTS).upper()}. {rng.choice(SURNAMES)}"
        if name not in seen:
            seen.add(name)
            yield name


def syllables(rng: random.Random) -> Iterator[str]:
    """Made-up words of six letters, without end, no two the same."""
    seen: set[str] = set()
    while True:
        word = "".join(rng.choice(letters) for _ in range(3) for letters in (CONSONANTS, VOWELS))
        if word not in seen:
            seen.add(word)
            yield word
