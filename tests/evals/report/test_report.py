"""The report page: the same bytes from the same files, nothing that a text says can run, every item with all answers."""

import base64
import gzip
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from helpers import Unbroken, run_command

from evals.report.content import MOST_ITEMS, as_script, compressed, items_content, page_content
from evals.report.page import render, write_report
from evals.results.items import write_items
from evals.results.summary import read_results
from proxytune.errors import UserError

EVIL = "</script><script>alert(1)</script>\u2028<img src=x onerror=alert(2)>"


@pytest.fixture
def run(unbroken: Unbroken, tmp_path: Path) -> Path:
    """A folder as compare leaves it."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "results.json").write_text(unbroken.results.json())
    (folder / "costs.json").write_text("[]")
    write_items(unbroken.finished.records, folder)
    return folder


def answers(**columns: Any) -> pd.DataFrame:
    rows = {"reading": "task", "world": "", "seed": 0, "tuning": 0, "unit": "u", "question": "q", "answer": "a", "popularity": 1.0, "text": "t"}
    return pd.DataFrame(rows | {"right": 1.0, "unparsed": False, "tied": False, "tokens": ""} | columns)


def unpacked(page: str) -> Any:
    packed = page.split('id="packed">')[1].split("<")[0]
    return json.loads(gzip.decompress(base64.b64decode(packed)))


def test_the_files_alone_give_the_same_page_byte_for_byte(run: Path, tmp_path: Path) -> None:
    first = write_report(run).read_bytes()
    for name in ("results.json", "costs.json", "items.parquet"):
        shutil.copy(run / name, tmp_path / name)
    assert write_report(tmp_path).read_bytes() == first
    assert len(first) < 1.5e6
    (tmp_path / "costs.json").write_text('[{"arm": "full", "seconds": 5.0, "peak_memory": null, "energy": null}]')
    assert write_report(tmp_path).read_bytes() != first


def test_every_measure_and_the_answer_are_in_the_page(run: Path, unbroken: Unbroken) -> None:
    page = write_report(run).read_text()
    for name in unbroken.results.measures:
        assert f'<section id="{name}">' in page
    assert unbroken.results.headline[0] in page
    assert set(unpacked(page)["arms"]) == set(unbroken.results.header.kinds)
    assert "default-src 'none'" in page
    assert "unsafe" not in page.split("<style>")[0]
    assert not [part for part in page.split("<script>")[0].split('"') if part.startswith(("http:", "https:", "//"))]


def test_provenance_is_in_the_page(run: Path, unbroken: Unbroken) -> None:
    """Twin: results of before there was any have none."""
    results = unbroken.results
    assert results.provenance["study_hash"] in write_report(run).read_text()
    assert {"task", "knowledge"} <= set(results.provenance["first_prompts"])
    page = render(page_content(results), items_content(pd.DataFrame()))
    assert f"torch {results.provenance['versions']['torch']}" in page
    assert str(results.provenance["first_prompts"]["task"]).split(" = ")[1].split(", answer")[0] in page
    assert "Versions" not in render(page_content(replace(results, provenance={})), items_content(pd.DataFrame()))


def test_the_answer_is_the_same_when_it_is_read_back(run: Path, unbroken: Unbroken) -> None:
    """.1205 and .12049999 are one number in results.json, but not in a line of one digit: so the answer is made of the rounded ones."""
    row = {"arm": "proxy@1", "direct": "full", "measure": "task", "value": 0.12049999, "low": 0.1, "high": 0.2, "needs": None}
    results = replace(unbroken.results, compared=unbroken.results.compared | {"against_direct": [row], "gap_closed": []})
    (run / "results.json").write_text(results.json())
    again = read_results(run / "results.json")
    assert again.headline == results.headline == json.loads(results.json())["headline"]
    assert "[10.0, 20.0]" in "".join(again.headline)


def test_what_a_text_says_stays_text(unbroken: Unbroken) -> None:
    content = page_content(unbroken.results) | {"title": EVIL, "headline": [EVIL]}
    content["sections"][0]["tables"][0]["rows"][0][0] = EVIL
    page = render(content, items_content(answers(arm=["base", "full"], text=[EVIL, "x" * 10_000])))
    assert page.count("<script") == render(page_content(unbroken.results), items_content(pd.DataFrame())).count("<script")
    assert "<img" not in page
    assert "alert(1)</script>" not in page
    assert unpacked(page)["texts"][1] == "x" * 10_000


def test_data_in_a_script_element_cannot_end_it() -> None:
    text = as_script({"a": EVIL})
    assert "<" not in text
    assert "\u2028" not in text
    assert json.loads(text) == {"a": EVIL}
    assert compressed({"a": 1}) == compressed({"a": 1})


def test_items_have_every_arms_answer_and_its_state() -> None:
    frame = answers(arm=["base", "full", "base", "full"], question=["q1", "q1", "q2", "q2"], text=["no", "yes", "no", "so"])
    frame["right"], frame["unparsed"] = [0.0, 1.0, 0.0, 0.5], [True, False, False, False]
    content = items_content(frame)
    assert (content["arms"], content["readings"], content["all"]) == (["base", "full"], ["task"], 2)
    (_, _, first, _, _, places, states), (*_, more) = content["items"]
    assert first == "q1"
    assert [content["texts"][place] for place in places] == ["no", "yes"]
    assert (states, more) == ([-1.0, 1.0], [0.0, 0.5])
    assert content["texts"].count("no") == 1


def test_of_too_many_items_a_part_is_shown_and_the_rest_is_counted() -> None:
    count = MOST_ITEMS + 500
    content = items_content(answers(arm=["base"] * count, question=[f"q{number}" for number in range(count)]))
    assert (len(content["items"]), content["all"]) == (MOST_ITEMS, count)
    assert content["items"][-1][2] == f"q{count - 1}"


def test_a_folder_without_results_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"results: .*results.json"):
        write_report(tmp_path)
    done = run_command("report", tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


def test_explained_items_are_among_those_that_are_shown_and_lead_to_their_tokens() -> None:
    count = MOST_ITEMS + 500
    frame = answers(arm=["base"] * count, question=[f"q{number}" for number in range(count)])
    assert items_content(frame)["tokens"] == []
    frame.loc[[7, 20_001], "tokens"] = json.dumps([{"token": "a\u202e", "members": {"base": 0.25, "expert": None}, "mixture": 0.5, "base": "b"}])
    content = items_content(frame)
    assert [content["items"][place][2] for place, _, _ in content["tokens"]] == ["q7", "q20001"]
    assert content["tokens"][0][1:] == [0, [["a\\u202e", 0.5, {"base": 0.25, "expert": None}, "b"]]]
    assert len(content["items"]) <= MOST_ITEMS


@pytest.mark.browser
def test_a_reader_opens_an_answer_token_by_token(run: Path) -> None:
    playwright_api = pytest.importorskip("playwright.sync_api")
    items = pd.read_parquet(run / "items.parquet")
    told = [{"token": EVIL, "members": {"base": 0.25, "expert": None}, "mixture": 0.5, "base": "nothing"}]
    told.append({"token": "yes", "members": {"base": 0.75, "expert": 0.5}, "mixture": 0.875, "base": None})  # type: ignore[dict-item]
    place = items.index[(items["reading"] == "task") & (items["arm"] == "proxy@1")][3]
    items.loc[place, "tokens"] = json.dumps(told)
    items.to_parquet(run / "items.parquet", index=False)
    path = write_report(run)
    with playwright_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page()
        problems: list[str] = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(path.as_uri())
        page.wait_for_selector("#answers tbody tr")
        page.select_option("select[name=a]", "proxy@1")
        page.check("input[name=tokens]")
        assert page.inner_text("#found").startswith("1 of ")
        assert "tokens=1" in page.url
        assert not page.locator("#explained").is_visible()
        page.click("button.tokens")
        assert page.inner_text("#explained p").startswith("1 of 2 tokens")
        rows = page.locator("#explained tbody tr")
        assert rows.nth(0).locator("td").nth(0).inner_text() == json.dumps(EVIL.replace("\u2028", "\\u2028"))
        assert rows.nth(0).locator("td").all_inner_texts()[1:] == ["0.500", "0.250", "none", '"nothing"']
        assert rows.nth(1).locator("td").all_inner_texts()[1:] == ["0.875", "0.750", "0.500", ""]
        page.keyboard.press("Escape")
        assert not page.locator("#explained").is_visible()
        assert problems == []
        browser.close()


@pytest.mark.browser
@pytest.mark.parametrize(("scheme", "width"), [("light", 1200), ("dark", 1200), ("light", 420)])
def test_a_reader_filters_sorts_and_moves_the_strength(run: Path, scheme: Any, width: int) -> None:
    playwright_api = pytest.importorskip("playwright.sync_api")
    path = write_report(run)
    with playwright_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 900}).new_page()
        problems: list[str] = []
        asked: list[str] = []
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(path.as_uri())
        page.wait_for_selector("#answers tbody tr")
        everything = page.inner_text("#found")
        page.select_option("select[name=a]", "full")
        page.select_option("select[name=as]", "right")
        assert page.inner_text("#found") != everything
        assert "a=full&as=right" in page.url
        found, link = page.inner_text("#found"), page.url
        page.goto("about:blank")
        page.goto(link)
        page.wait_for_selector("#answers tbody tr")
        assert page.inner_text("#found") == found
        page.locator("#task table").first.locator("thead button").nth(1).click()
        column = page.locator("#task table").first.locator("tbody tr td:nth-child(2)").all_inner_texts()
        values = [float(text.split()[0]) for text in column]
        assert values == sorted(values)
        before = page.inner_html("#frontier")
        page.locator("#strength").fill("0")
        assert page.inner_html("#frontier") != before
        assert page.locator("figure.chart svg").count() >= page.locator("figure.chart").count() > 0
        assert problems == []
        assert [url for url in asked if not url.startswith(("file:", "about:", "blob:"))] == []
        browser.close()
