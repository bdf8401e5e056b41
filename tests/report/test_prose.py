"""What the pages say in words is what their tables say: each sentence is made again here from the tables beside it.

The tables are made from records (`test_publication.py`); a figure in a sentence is typed by hand, and would stay what
it was when records are measured again.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from itertools import chain, product
from pathlib import Path

import pandas as pd
import pytest

from kvbench.report.publication import filled_page
from tests.parity.theirs import GIVEN, SCORED, WINDOWS

REPO = Path(__file__).parents[2]
_TABLE = re.compile(r"<!-- table: ([^>]*) -->\n(.*?)<!-- end of table -->", re.DOTALL)
_Row = Mapping[str, str]
SIDES = ("ours", "theirs")
GOOD = ("h2o", "h2o_mean", "snapkv", "vatp")  # scores that do not explode on a text


@cache
def prose(page: str) -> str:
    """The page without its tables, white space as one blank."""
    text = (REPO / page).read_text(encoding="utf-8")
    return " ".join(_TABLE.sub("", text).split())


@cache
def table(page: str, **words: str) -> tuple[_Row, ...]:
    """The rows of the one table of the page that was asked for with these words."""
    found = []
    for asked, content in _TABLE.findall((REPO / page).read_text(encoding="utf-8")):
        of = {"question": "seen"} | dict(word.split("=", 1) for word in asked.split())
        if words.items() <= of.items():
            found.append([line for line in content.splitlines() if line.startswith("|")])
    (lines,) = found
    heads, _, *rows = ([part.strip() for part in line.strip("|").split("|")] for line in lines)
    return tuple(dict(zip(heads, row, strict=True)) for row in rows)


def row(rows: Iterable[_Row], **fields: str) -> _Row:
    (found,) = (one for one in rows if fields.items() <= one.items())
    return found


def number(cell: str) -> float:
    found = re.match(r"[+-]?[\d,.]+", cell)
    assert found is not None, cell
    return float(found[0].replace(",", ""))


def says(page: str, *sentences: str) -> None:
    for sentence in sentences:
        assert " ".join(sentence.split()) in prose(page), sentence


@cache
def boards() -> pd.DataFrame:
    return pd.read_csv(REPO / "results" / "published" / "leaderboard" / "leaderboard.csv")


def board(measure: str, budget: float, question: str = "seen") -> pd.DataFrame:
    """A table of the leaderboard in full precision, by policy without what stands behind its name."""
    rows = boards()[(boards().measure == measure) & (boards().budget == budget) & (boards().question == question)]
    return rows.assign(policy=rows.policy.str.partition(" ")[0]).set_index("policy")


BEFORE_IT_WAS_DIVIDED = {"83e901a84d29d303", "9f100784fde13755"}  # a later prompt; question hidden, at a fifth
PPL, RECALL, ROUGE, OBJECTS = "ppl", "needles_recalled_fraction", "rougeL_vs_full", "objects_recalled_fraction"
LEADERBOARD, FACTORIAL, POSITIONS = "docs/leaderboard.md", "docs/factorial.md", "docs/positions.md"


def spearman(one: pd.DataFrame, other: pd.DataFrame) -> float:
    placed = [each.value[each.place.notna()] for each in (one, other)]
    both = placed[0].index.intersection(placed[1].index)
    return float(placed[0][both].rank().corr(placed[1][both].rank()))


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def test_the_leaderboards_first_sentences_follow_from_its_tables() -> None:
    ppl, recall = board(PPL, 0.2), board(RECALL, 0.2)
    best, place = recall.value, ppl.place.astype("Int64")
    assert ppl.place.idxmin() == "h2o_mean"
    assert best["h2o_mean"] == 0
    says(
        LEADERBOARD,
        f"`r_kv` recalls {100 * best['r_kv']:.0f} of 100 (full: 98), `tova` {100 * best['tova']:.0f}, `kvzip_plus` "
        f"{100 * best['kvzip_plus']:.0f}, `nacl` {100 * best['nacl']:.0f}, `kvzip` {100 * best['kvzip']:.0f}, and they "
        f"stand {place['r_kv']}th, {place['tova']}rd, {place['kvzip_plus']}th, {place['nacl']}th and "
        f"{place['kvzip']}rd in perplexity.",
        f"of perplexity and recall is {-spearman(ppl, recall):.1f} at a fifth, where 1 would be one order, and "
        f"{-spearman(ppl, board(RECALL, 0.2, 'hidden')):.1f} with the question hidden; with ROUGE it is "
        f"{-spearman(ppl, board(ROUGE, 0.2)):.1f}, and between perplexities at a tenth and a fifth "
        f"{spearman(board(PPL, 0.1), ppl):.2f}.",
    )
    first = ppl[ppl.place <= 23]
    assert set(first.verdict_against_next) == {"equivalent"}
    says(
        LEADERBOARD,
        f"places 1 to 23 cost {first.minus_full_value.min():.2f} to {first.minus_full_value.max():.2f} nats per token, "
        "and each is equivalent to the next within 0.02 nats.",
        f"`snapkv` and `snapkv_decode` are one choice with two rhythms: {ppl.value['snapkv']:.2f} against "
        f"{ppl.value['snapkv_decode']:.2f}.",
        f"`h2o` and `vatp` are first, both at {ppl.minus_full_value['h2o']:+.3f} nats.",
        f"finds {100 * best['snapkv']:.0f} of 100 at a fifth and "
        f"{100 * board(RECALL, 0.5).value['snapkv']:.0f} at half.",
    )
    assert f"{ppl.minus_full_value['h2o']:.3f}" == f"{ppl.minus_full_value['vatp']:.3f}"
    asked_before = [round(100 * best[name]) for name in ("h2o", "h2o_mean", "scissorhands", "keyformer")]
    says(LEADERBOARD, f"find {min(asked_before)} to {max(asked_before)} of 100.")


def test_what_a_hidden_question_leaves_follows_from_its_tables() -> None:
    tenth, fifth, half = (100 * board(RECALL, budget, "hidden").value for budget in (0.1, 0.2, 0.5))
    five = ["kvzip_plus", "kvzip", "fast_kvzip", "capkv", "kvzap"]
    placed = [name for name in half.index if name not in ("simlayerkv", *five)]
    others = half[placed][half[placed] >= 43]
    words = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
    place = board(PPL, 0.2).place.astype("Int64")
    seen = 100 * board(RECALL, 0.2).value[["r_kv", "tova", "nacl", "cake"]]
    assert fifth[["r_kv", "tova", "nacl", "cake"]].max() == 0
    assert list(fifth.drop("simlayerkv").sort_values(ascending=False).index[:5]) == five
    says(
        LEADERBOARD,
        f"`kvzip_plus` finds {fifth['kvzip_plus']:.0f} of 100 at a fifth, `kvzip` {fifth['kvzip']:.0f}, `fast_kvzip` "
        f"{fifth['fast_kvzip']:.0f}, `capkv` {fifth['capkv']:.0f}, `kvzap` {fifth['kvzap']:.0f},",
        f"which find {seen.min():.0f} to {seen.max():.0f} when they see it, find none.",
        f"`vatp` and `lagkv` ({fifth['vatp']:.0f}), `duo_attention` ({fifth['duo_attention']:.0f}), `keydiff` "
        f"({fifth['keydiff']:.0f}) and `chunkkv` ({fifth['chunkkv']:.0f})",
        f"At a tenth `kvzip` finds {tenth['kvzip']:.0f}, `kvzip_plus` {tenth['kvzip_plus']:.0f}, `fast_kvzip` "
        f"{tenth['fast_kvzip']:.0f}, `capkv` {tenth['capkv']:.0f} and `kvzap` none; at half {words[len(others)]} "
        f"others find {others.min():.0f} to {others.max():.0f}. In perplexity `capkv`, `kvzap` and `fast_kvzip` stand "
        f"{place['capkv']}th, {place['kvzap']}th and {place['fast_kvzip']}th.",
    )


def test_what_the_leaderboard_says_of_pictures_follows_from_its_tables() -> None:
    fifth, tenth = board(OBJECTS, 0.2), board(OBJECTS, 0.1).value
    attention = [
        *("cake", "chunkkv", "criticalkv", "d2o", "expected_attention", "fastv", "h2o", "h2o_mean", "h2o_released"),
        *("keyformer", "kvmerger", "look_m", "nacl", "prefixkv", "pyramidkv", "r_kv", "scissorhands", "snapkv"),
        *("snapkv_decode", "snapkv_released", "tova", "triattention", "vase", "vatp", "vl_cache"),
    ]
    every = set(tenth[(tenth == 1) & (tenth.index != "simlayerkv")].index)
    assert every == {"vl_cache", "fastv", "look_m", "h2o", "h2o_released", "scissorhands", "kvmerger", "capkv"}
    says(
        LEADERBOARD,
        f"**What follows attention at its true places does the pictures at a fifth**, naming "
        f"{percent(fifth.value[attention].min())} of the objects or more but for `elastic` "
        f"({percent(fifth.value['elastic'])})",
        f"`tova` {percent(tenth['tova'])}, `cake` {percent(tenth['cake'])}, `snapkv` {percent(tenth['snapkv'])}, a "
        f"random choice {percent(tenth['random'])}.",
        f"That is why pictures go from {percent(fifth.value['lagkv'])} at a fifth to "
        f"{percent(board(OBJECTS, 0.5).value['lagkv'])} at half.",
        f"all hold first and newest tokens, and {percent(fifth.value['duo_attention'])} of objects follows.",
    )
    released = {"elastic_released", "h2o_elastic_release", "local_elastic_release"}
    assert set(fifth.sort_values("place").index[-1 - len(released) : -1]) == released
    ppl = board(PPL, 0.2)
    assert set(ppl[ppl.place.notna()].sort_values("place").index[-4:]) == {*released, "random"}


def test_the_figures_of_the_leaderboards_oddities_that_stand_in_its_tables_are_those() -> None:
    ppl = {budget: board(PPL, budget) for budget in (0.1, 0.2, 0.5)}
    value, gap = (
        ppl[0.2].value,
        [of.minus_full_value["pyramidkv"] - of.minus_full_value["snapkv"] for of in ppl.values()],
    )
    assert board(ROUGE, 0.2).place["cake"] == 2
    assert ppl[0.5].place["duo_attention"] == 4
    for name in ("snapkv", "adakv", "pyramidkv", "chunkkv", "criticalkv", "snapkv_decode", "snapkv_released"):
        assert board(RECALL, 0.1).value[name] == 0
    says(
        LEADERBOARD,
        f"stand at {value['key_norm']:.1f}, {value['keydiff']:.1f} and {value['q_filters']:.1f} at a fifth, worse than "
        f"a window with sinks ({value['streaming_llm']:.1f}), though far better than a random choice "
        f"({value['random']:.0f}).",
        f"**`elastic`** ({value['elastic']:.1f}) is taken apart",
        f"before what follows, {value['prefixkv']:.1f} now)",
        f"**`d2o` ({value['d2o']:.1f}) is behind `h2o`**",
        f"no better: {value['cam']:.2f} at a fifth, as `streaming_llm`",
        f"{value['cake']:.1f} now, and second in ROUGE)",
        f"**`pyramidkv` is behind `snapkv`** ({min(gap):+.3f} to {max(gap):+.3f} nats at each budget",
        f"**`random` finds {100 * board(RECALL, 0.2).value['random']:.0f} of 100 facts at a fifth, more than `h2o`**",
        f"Its {value['simlayerkv']:.2f} has no place.",
    )


def test_what_is_said_to_be_missing_is_missing_and_is_said_no_longer_than_it_is() -> None:
    page = (REPO / LEADERBOARD).read_text(encoding="utf-8")
    laws = (REPO / "docs" / "laws.md").read_text(encoding="utf-8")
    missing = {
        (LEADERBOARD, "own cell is not measured yet there"): "Full cache: not measured yet" in page,
        (LEADERBOARD, "but for recall and perplexity at a tenth and at half"): "cake" not in board(RECALL, 0.2).index,
        (LEADERBOARD, "`vase` without perplexity"): "vase" not in board(PPL, 0.2).index,
        (LEADERBOARD, "`kvzap` and `duo_attention` stand there as before."): set(boards().key.str[:16])
        >= BEFORE_IT_WAS_DIVIDED,
        (FACTORIAL, "are not measured yet"): "Left out, because " in (REPO / FACTORIAL).read_text(),
        ("docs/laws.md", "`copied_digits` are not measured yet"): "| 13. copied_digits |" in laws
        and "not run yet |" in laws,
    }
    assert {said for said, is_so in missing.items() if is_so} == {said for said in missing if said[1] in prose(said[0])}


def test_what_is_said_of_kvpress_follows_from_the_outputs_of_both_sides() -> None:
    stored = json.loads((REPO / "tests" / "parity" / "kvpress.json").read_text())
    both = {
        (one["method"], one["entries"]): [math.exp(math.fsum(one[side]["nll"]) / (SCORED * WINDOWS)) for side in SIDES]
        for one in stored["rows"]
    }
    shown = {name: {f"{value:.3f}" for value in values} for name, values in both.items()}
    (norm,), (difference,), (full,) = (shown[name] for name in (("key_norm", 204), ("keydiff", 204), ("full", GIVEN)))
    says(
        LEADERBOARD,
        f"{norm} of its key norm and of ours at a fifth of {GIVEN:,} tokens, {difference} of both key differences",
        f"{WINDOWS} windows; full {float(full):.2f})",
    )


def combinations(dataset: str) -> dict[tuple[str, str, str], float]:
    """Every combination's difference to the full cache, by score, allocation and merge."""
    rows = table(FACTORIAL, kind="combinations", dataset=dataset)
    allocations = [head for head in rows[0] if head not in ("score", "merge")]
    return {(one["score"], name, one["merge"]): number(one[name]) for one in rows for name in allocations}


def spread(numbers: Sequence[float], form: str = ".3f") -> str:
    return f"{min(numbers):{form}} to {max(numbers):{form}}"


def test_the_factorials_findings_on_text_follow_from_its_tables() -> None:
    nats = combinations("frankenstein_long")
    shares = {one["factor, or what several do together"]: number(one["of the variance between cells"])
              for one in table(FACTORIAL, kind="shares", dataset="frankenstein_long")}  # fmt: skip
    pictures = table(FACTORIAL, kind="shares", dataset="scenes")
    of_score = number(pictures[0]["of the variance between cells"])
    explodes = [value for levels, value in nats.items() if levels[0] == "key_norm"]
    on_pictures = [value for levels, value in combinations("scenes").items() if levels[0] == "key_norm"]
    unlike = [value for levels, value in nats.items() if levels[0] == "keydiff"]
    plain = {score: nats[score, "uniform", "drop"] for score in GOOD}
    main = {one["level"]: one["from the average [nats/token]"]
            for one in table(FACTORIAL, kind="main_effects", dataset="frankenstein_long")}  # fmt: skip
    costs = {
        merge: {score: [nats[score, name, merge] - nats[score, name, "drop"] for name in ALLOCATIONS] for score in GOOD}
        for merge in ("nearest_cosine", "voronoi")
    }
    says(
        FACTORIAL,
        f"{shares['score']:.0f} % of the variance on text and {of_score:.0f} % on pictures is the score's",
        f"explodes on both ({min(explodes):+.1f} to {max(explodes):+.1f} and {min(on_pictures):+.1f} to "
        f"{max(on_pictures):+.1f} nats over full) and stands in every average, and on text `keydiff` "
        f"({min(unlike):+.2f} to {max(unlike):+.2f}), which loses nothing on pictures.",
        f"within {max(plain.values()) - min(plain.values()):.3f} nats on text: `h2o_mean` {plain['h2o_mean']:+.3f}, "
        f"the others {plain['h2o']:+.3f}.",
        f"Its share is {shares['allocation']:.1f} %.",
        f"`nearest_cosine` costs {spread(list(chain(*costs['nearest_cosine'].values())))} nats over "
        "dropping in every combination with a good score",
        f"`voronoi` {spread(costs['voronoi']['snapkv'])} beside `snapkv`, "
        f"{spread(costs['voronoi']['vatp'])} beside `vatp`, and "
        f"{spread([*costs['voronoi']['h2o'], *costs['voronoi']['h2o_mean']], '.2f')} beside `h2o` and `h2o_mean`",
        f"The main effect, {number(main['voronoi']):+.3f} for `voronoi`",
        f"score and merge have {shares['score and merge']:.0f} % of the variance on text, merge alone "
        f"{shares['merge']:.0f} %.",
    )
    assert {f"{plain[score]:.3f}" for score in GOOD if score != "h2o_mean"} == {"0.065"}


ALLOCATIONS = ("uniform", "ada", "cake", "pyramid")


def test_what_the_factorial_says_of_allocations_follows_from_its_table() -> None:
    nats = combinations("frankenstein_long")

    def added(score: str, name: str, merge: str = "drop") -> float:
        return nats[score, name, merge] - nats[score, "uniform", merge]

    more = {name: [added(score, name) for score in GOOD] for name in ALLOCATIONS}
    says(
        FACTORIAL,
        f"`ada` differs from equal shares by {spread(more['ada'], '+.3f')} nats",
        f"`cake` costs {spread(more['cake'])} and `pyramid` {spread(more['pyramid'])} more.",
        f"`ada` costs {added('keydiff', 'ada'):.3f} (`keydiff`) and {added('key_norm', 'ada'):.3f} (`key_norm`), "
        f"`cake` {added('keydiff', 'cake'):.3f} and {added('key_norm', 'cake'):.3f}; `pyramid` gives `keydiff` "
        f"{-added('keydiff', 'pyramid'):.3f} without a merge, and costs it "
        f"{added('keydiff', 'pyramid', 'nearest_cosine'):.3f} and {added('keydiff', 'pyramid', 'voronoi'):.3f} "
        "with one.",
    )


def test_what_the_factorial_says_of_keydiff_with_a_merge_follows_from_its_tables() -> None:
    nats = combinations("frankenstein_long")
    merges = {one["level"]: number(one["from the average [nats/token]"])
              for one in table(FACTORIAL, kind="main_effects", dataset="frankenstein_long")}  # fmt: skip
    gained = {
        (score, merge): [nats[score, name, "drop"] - nats[score, name, merge] for name in ALLOCATIONS]
        for score, merge in product(("keydiff", "key_norm"), ("nearest_cosine", "voronoi"))
    }
    plain, merged = (nats["keydiff", "uniform", merge] for merge in ("drop", "nearest_cosine"))
    says(
        FACTORIAL,
        f"`nearest_cosine` takes {spread(gained['keydiff', 'nearest_cosine'])} from what `keydiff` loses, at each "
        f"division: with equal shares {plain:.3f} becomes {merged:.3f}.",
        f"the best main effect of the merges ({merges['nearest_cosine']:.3f}, dropping {merges['drop']:.3f})",
        f"`voronoi` takes {spread(gained['keydiff', 'voronoi'][:3])} there, but for `pyramid`, where it costs "
        f"{-gained['keydiff', 'voronoi'][3]:.3f}",
        f"`key_norm` loses {spread([-one for one in gained['key_norm', 'voronoi']])} by `voronoi`.",
    )


def test_the_factorials_finding_on_pictures_follows_from_its_table() -> None:
    nats = combinations("scenes")
    at_the_ceiling = sum(abs(value) < 0.0005 for value in nats.values())
    for score in ("h2o", "h2o_mean", "vatp", "keydiff"):
        assert nats[score, "uniform", "drop"] == 0
    pyramid = [nats[score, "pyramid", "drop"] - nats[score, "uniform", "drop"] for score in (*GOOD, "keydiff")]
    lost = [nats[score, "cake", "drop"] - nats[score, "uniform", "drop"] for score in (*GOOD, "keydiff")]
    main = {one["level"]: one["from the average [nats/token]"]
            for one in table(FACTORIAL, kind="main_effects", dataset="scenes")}  # fmt: skip
    says(
        FACTORIAL,
        f"On pictures {at_the_ceiling} of {len(nats)} combinations are at the ceiling",
        f"`cake` takes at most {max(lost):.3f} nats from them",
        f"(`vatp`: {nats['vatp', 'pyramid', 'drop']:.3f} to {nats['vatp', 'pyramid', 'nearest_cosine']:.3f}, "
        f"`h2o`: {nats['h2o', 'pyramid', 'drop']:.3f} to {nats['h2o', 'pyramid', 'nearest_cosine']:.3f})",
        f"best main effect there ({number(main['pyramid']):.3f}) and `voronoi` the best of the merges "
        f"({number(main['voronoi']):.3f})",
        f"take from {nats['key_norm', 'uniform', 'drop']:.1f} to {nats['key_norm', 'pyramid', 'drop']:.1f} nats each; "
        f"beside every other score `pyramid` costs {spread(pyramid)} without a merge.",
    )
    assert f"{nats['key_norm', 'uniform', 'voronoi']:.1f}" == f"{nats['key_norm', 'pyramid', 'drop']:.1f}"


@cache
def of_readme() -> str:
    return (REPO / "README.md").read_text(encoding="utf-8")


@pytest.mark.long
def test_the_readmes_tables_are_made_from_the_records() -> None:
    made = filled_page(REPO, REPO / "README.md")
    assert made == of_readme()
    assert made.count("<!-- table: ") == 2


def test_the_readmes_figures_of_the_default_sweep_are_its_records() -> None:
    with (REPO / "results" / "published" / "default-sweep" / "table.csv").open() as file:
        cells = {one["policy"]: one for one in csv.DictReader(file) if one["budget_fraction"] in ("", "0.2")}
    told = " ".join(of_readme().split())
    for name in ("h2o", "elastic", "streaming_llm", "random", "full"):
        called = "the full cache" if name == "full" else f"`{name}`"
        value, low, high = (100 * float(cells[name][f"{OBJECTS}{end}"]) for end in ("", "_low", "_high"))
        assert f"{called} {value:.1f} % [{low:.1f}, {high:.1f}]" in told


def test_the_readme_says_of_how_many_places_the_one_in_brackets_is() -> None:
    assert f"the place of {int(board(PPL, 0.2).place.max())} in brackets" in " ".join(of_readme().split())


def test_the_findings_on_positions_are_those_of_their_tables() -> None:
    shown: dict[tuple[str, str], dict[str, _Row]] = {}
    for text, budget in product(("frankenstein_long", "lectures_long"), ("0.2", "0.5")):
        words = {"dataset": text, "budget": budget, "measure": "ppl", "sweep": "positions_gpu"}
        rows = [*table(POSITIONS, kind="differences", **words), *table(POSITIONS, kind="shifts", **words)]
        shown[text, budget] = {one["PPL"]: one for one in rows}
    novel, lectures = shown["frankenstein_long", "0.2"], shown["lectures_long", "0.2"]

    def nats(of: Mapping[str, _Row], name: str, at: str) -> str:
        return f"{abs(number(of[name][at])):.2f}"

    shift, pairs = "released minus original", ("elastic minus h2o", "elastic minus streaming_llm")
    assert min(number(of[name]["original"]) for name in pairs for of in shown.values()) > 0
    assert max(number(of[name]["released"]) for name in pairs for of in shown.values()) < 0
    says(
        POSITIONS,
        f"At a fifth they add {nats(novel, 'h2o', shift)} nats per token",
        f"on the novel, {nats(lectures, 'h2o', shift)} and {nats(lectures, 'streaming_llm', shift)} on the lectures; "
        f"to Elastic {nats(novel, 'elastic', shift)}",
        f"Elastic as described is behind H2O, by {nats(novel, pairs[0], 'original')} nats",
        f"{nats(lectures, pairs[0], 'original')} [0.24, 0.29] at a fifth",
        f"and behind StreamingLLM by {nats(novel, pairs[1], 'original')}, {nats(lectures, pairs[1], 'original')}",
        f"it is ahead of H2O by {nats(novel, pairs[0], 'released')} [0.29, 0.35] and "
        f"{nats(lectures, pairs[0], 'released')}",
    )
    told = " ".join(of_readme().split())
    behind = [nats(novel, name, "original") for name in pairs]
    assert f"Elastic stands behind both, by {behind[0]} and {behind[1]} nats per token" in told


def test_what_the_page_of_laws_says_in_figures_follows_from_its_records() -> None:
    cells = pd.read_csv(REPO / "results" / "published" / "laws-smollm2" / "table.csv").fillna({"variant": ""})
    texts, asked = cells[cells.ppl.notna()], cells[cells.dataset.str.startswith("recall_many")]

    def ppl(policy: str, budget: float | None = 0.2, variant: str = "") -> float:
        of_budget = texts.budget_fraction.isna() if budget is None else texts.budget_fraction == budget
        (found,) = texts[(texts.policy == policy) & of_budget & (texts.variant == variant)].ppl
        return float(found)

    def found_of_100(policy: str, budget: float, dataset: str = "recall_many") -> int:
        of = asked[(asked.dataset == dataset) & (asked.policy == policy) & (asked.budget_fraction == budget)]
        return round(100 * float(of[RECALL].item()))

    sinks = {number: ppl("streaming_llm", variant=f"policy.num_sinks={number}") for number in (0, 1, 2, 4, 8)}
    larger = [ppl("streaming_llm", budget, "policy.num_sinks=4") for budget in (0.1, 0.2, 0.4, 0.8)]
    norms = [
        ppl("key_norm", 0.5, f"policy.keep={keep} policy.skip_layers={skipped}")
        for keep, skipped in (("small", "[0, 1]"), ("large", "[0, 1]"), ("small", None))
    ]
    hidden = [found_of_100("streaming_llm", budget, "recall_many, question hidden") for budget in (0.5, 0.3)]
    says(
        "docs/laws.md",
        f"perplexity {sinks[0]:.1f} without sinks, {sinks[4]:.1f} with four, {ppl('full', None):.1f} full.",
        f"perplexity {sinks[1]:.2f} with one or two, {sinks[4]:.2f} with four, {sinks[8]:.2f} with eight.",
        "Every doubling helps: perplexity {:.1f}, {:.1f}, {:.1f} and {:.1f} at".format(*larger),
        f"(perplexity {norms[0]:.1f}, two layers whole)",
        f"the largest norms are far worse ({norms[1]:.0f})",
        f"({norms[2]:.1f} without)",
        f"so its {ppl('random'):.0f} is partly law 2 again",
        f"a window with sinks {hidden[0]} and {hidden[1]}: all 25 at the end, and {hidden[0] - 25} of those before",
        f"({found_of_100('lagkv', 0.5)} and {found_of_100('h2o', 0.5)} of 100, full 98)",
        f"{board(PPL, 0.1).value['tova']:.1f} against {board(PPL, 0.1).value['h2o']:.1f} ([leaderboard.md]",
    )
    assert f"{sinks[1]:.2f}" == f"{sinks[2]:.2f}"
    assert found_of_100("snapkv", 0.5, "recall_many, question hidden") == 0
