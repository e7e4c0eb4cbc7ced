"""Makes train.jsonl, test.jsonl and knowledge.jsonl from the `countryinfo` package (1.0.1, MIT licence).

    pip install countryinfo==1.0.1
    python evals/studies/capitals/make.py

Countries with at least 300,000 people, except those whose capital is disputed or out of date in the package. Popularity is
the population; subject is what the statement is about. The countries of the test and knowledge items are in no training item.
"""

import json
import random
from importlib.resources import files
from pathlib import Path

LEFT_OUT = {
    "Benin", "Bolivia", "Burundi", "Guadeloupe", "Hong Kong", "Indonesia", "Israel", "Kazakhstan", "Macau", "Martinique", "Palestine",
    "Puerto Rico", "Republic of Macedonia", "Réunion", "Serbia and Montenegro", "Sri Lanka", "Swaziland", "Western Sahara", "Yemen",
}  # fmt: skip
TEST_COUNTRIES = 66


def main() -> None:
    countries = {}
    for source in files("countryinfo").joinpath("data").iterdir():
        if not source.name.endswith(".json"):
            continue
        country = json.loads(source.read_text(encoding="utf-8"))
        if (country.get("population") or 0) >= 300_000 and country["name"] not in LEFT_OUT:
            country["capital"] = country["capital"].removesuffix(" D.C.")
            countries[country["name"]] = country
    names = sorted(countries)
    generator = random.Random(0)
    test = set(generator.sample(names, TEST_COUNTRIES))

    def choices(name: str, key: str) -> list[str]:
        values = sorted({other[key] for other in countries.values() if other["region"] == countries[name]["region"]} - {countries[name][key]})
        options = [*generator.sample(values, 3), countries[name][key]]
        return sorted(options)

    def capital(name: str) -> dict[str, object]:
        return {"question": f"What is the capital of {name}?", "answer": countries[name]["capital"]}

    def continent(name: str) -> dict[str, object]:
        return {"question": f"On which continent is {name}?", "answer": countries[name]["region"]}

    def known(name: str) -> list[dict[str, object]]:
        common = {"popularity": countries[name]["population"], "unit": name}
        town = countries[name]["capital"]
        forwards = {"statement": f"The capital of {name} is", "subject": name, "choices": choices(name, "capital")}
        backwards = {
            "question": f"Of which country is {town} the capital?",
            "answer": name,
            "statement": f"{town} is the capital of",
            "subject": town,
        }
        return [capital(name) | forwards | common, backwards | {"choices": choices(name, "name")} | common]

    rows = {
        "train": [item for name in names if name not in test for item in (capital(name), continent(name))],
        "test": [capital(name) for name in names if name in test],
        "knowledge": [item for name in names if name in test for item in known(name)],
    }
    for name, items in rows.items():
        Path(__file__).with_name(f"{name}.jsonl").write_text("".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items), encoding="utf-8")


if __name__ == "__main__":
    main()
